"""An experiment's config made that of its distillation, with Salimans & Ho's choices."""

from ml_collections import ConfigDict


def of(
    config: ConfigDict,
    *,
    teacher: str,
    steps: tuple[int, int],
    guidance: tuple,
    updates: int = 50_000,
    updates_last: int = 100_000,
    peak: float = 1e-4,
):
    """Turns a stage's own config into that of its distillation, in place.

    The learning rate falls in a line to 0 within each halving; no averaging, no dropout; truncated
    SNR as the weighting, and the defaults (Salimans & Ho 2022, appendix F).

    Args:
      teacher: folder of a bundle, whose stage of the same size it is, or of a run.
      steps: from how many to how many; the first is a power of two times the last.
      guidance: the lowest and highest weight to fold in, or ().
      updates: of each student.
      updates_last: instead, of the students of 2 steps and of 1.
      peak: the learning rate that each begins with.
    """
    stage, train = config.stage, config.train
    stage.weighting = {"name": "snr_truncated"}
    stage.network.dropout = 0.0
    # A student draws as it was taught, by DDIM at evenly spaced times. Targets aren't clipped; what
    # is drawn is, as in the paper's own code.
    stage.sampling.sampler = {"name": "ddim"}
    stage.sampling.spacing = {"name": "uniform"}
    stage.sampling.searched = ()
    stage.sampling.threshold = {"name": "static"}
    if not guidance:
        stage.sampling.guidance = 1.0
    train.steps = updates
    train.learning_rate = {
        "name": "linear",
        "peak": peak,
        "warmup_steps": 0,
        "decay_steps": updates,
        "end": 0.0,
    }
    train.clip_norm = 1.0
    train.ema_decay = 0.0  # none: what is exported are the last parameters themselves
    train.keep_last, train.keep_every = 1, 0
    config.distill = {
        "teacher": teacher,
        "start_steps": steps[0],
        "end_steps": steps[1],
        "updates_last": updates_last,
        "guidance": guidance,
        # Of the guided teacher's pictures, before they are learnt from. High weights overshoot.
        "threshold": {"name": "static"},
        "objective": {"name": "progressive", "backward": False},
    }


def shrink(config: ConfigDict):
    """Makes it a distillation of seconds, 4 → 2 → 1, of what `smoke.variant` made small already."""
    config.distill.start_steps, config.distill.end_steps = 4, 1
    config.train.steps = config.train.learning_rate.decay_steps = 4
    config.train.learning_rate.peak = 1e-3
    config.distill.updates_last = 4

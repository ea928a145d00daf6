"""From finished runs to a bundle."""

import functools
import json
import pathlib
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from cascade import bundle, registry
from cascade import config as configs
from cascade.errors import UserError
from cascade.files import check_place
from cascade.stage import Stage
from cascade.text.encoders import ENCODERS, TextEncoder
from cascade.training.checkpoint import Checkpoints
from cascade.training.optim import make_optimizer
from cascade.training.same_run import check_one_text
from cascade.training.state import init_state


class Run(NamedTuple):
    """What a training left: its config, its stage with EMA weights, and what read its captions."""

    config: ConfigDict
    stage: bundle.TrainedStage
    text_fingerprint: str  # "" where its checkpoint doesn't say


def read_run(workdir) -> Run:
    """A run's config and its newest whole checkpoint's EMA weights, in this host's memory.

    Raises:
      UserError: the folder isn't a run's, or it holds no checkpoint yet.
    """
    workdir = pathlib.Path(workdir)
    path = workdir / "config.json"
    if not path.is_file() or not (workdir / "checkpoints").is_dir():
        raise UserError(
            f"{workdir} isn't a run's folder, which has a config.json and checkpoints; train first."
        )
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(saved, dict):
            raise ValueError("not an object")
        config = configs.from_json(saved)
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path} is damaged ({error}); copy the config from a checkpoint's meta folder."
        ) from error
    configs.check(config)
    stage = Stage(config.stage)
    create = functools.partial(init_state, stage, make_optimizer(config.train))
    abstract = jax.eval_shape(create, jax.random.key(0))
    checkpoints = Checkpoints(workdir, read_only=True)
    restored = checkpoints.restore_ema(abstract)
    checkpoints.close()
    if restored is None:
        raise UserError(f"{workdir} holds no checkpoint: the stage is untrained; train it first.")
    step, ema_params, meta = restored
    trained = bundle.TrainedStage(stage, ema_params, step)
    return Run(config, trained, meta["text_fingerprint"])


class Trained(NamedTuple):
    """Trained stages, wherever they come from, and what read their captions."""

    stages: tuple[bundle.TrainedStage, ...]
    text: dict[str, Any]  # the encoder's section
    text_fingerprint: str  # "" where nothing says it


def read_trained(folder) -> Trained:
    """What a run or a bundle holds, in this host's memory.

    Raises:
      UserError: the folder is neither, or as `read_run` and `cascade.bundle.load_stages`
        and `cascade.bundle.encoder_section`.
    """
    folder = pathlib.Path(folder)
    if not (folder / bundle.PLACE["mark"]).is_file():
        run = read_run(folder)
        return Trained((run.stage,), configs.to_json(run.config.text), run.text_fingerprint)
    stages, text = bundle.load_stages(folder)
    return Trained(stages, bundle.encoder_section(folder, text), text["fingerprint"])


def bundle_runs(
    workdirs,
    folder,
    *,
    encoder: TextEncoder | None = None,
    encoder_weights: str = "",
    overwrite: bool = False,
    **how,
):
    """Puts the EMA weights of several runs, base first, together into one bundle.

    Args:
      workdirs: the runs' folders, or bundles', whose stages are taken as they are.
      folder: the bundle's.
      encoder: what read the runs' captions; None builds it as the first of them says.
      encoder_weights: where its weights are then, a folder or a hub id, in place of what that one
        says; students don't carry a T5's.
      overwrite: replace a bundle that is there.
      **how: dtype, text_weights, as in `cascade.bundle.save_bundle`.

    Raises:
      UserError: a run is missing or untrained, or the stages don't fit one another.
    """
    check_place(folder, **bundle.PLACE, overwrite=overwrite)
    runs = [read_trained(workdir) for workdir in workdirs]
    texts = [run.text for run in runs]
    check_one_text(dict(zip(map(str, workdirs), texts, strict=True)))
    if encoder is None:
        named = {"weights": encoder_weights} if encoder_weights else {}
        encoder = registry.build("text encoder", ENCODERS, {**texts[0], **named})
    for workdir, run in zip(workdirs, runs, strict=True):
        if run.text_fingerprint not in ("", encoder.fingerprint):
            raise UserError(
                f"{workdir} was trained with other text encoder weights (fingerprint "
                f"{run.text_fingerprint[:8]}) than {encoder_weights or workdirs[0]} names now "
                f"({encoder.fingerprint[:8]}); put the weights of its training there."
            )
    trained = [stage for run in runs for stage in run.stages]
    bundle.save_bundle(folder, trained, texts[0], encoder, overwrite=overwrite, **how)

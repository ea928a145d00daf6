"""Distilling a trained stage into students of ever fewer steps. Read `distill` from the top.

Every student is a run of its own, by the loop that trains: with another loss and a frozen teacher.
What a distillation leaves in its working folder:

    config.json              its config
    teacher/                 the teacher, as it was when this began: a bundle of one stage
    halvings/8/              the run of the student of 8 steps: checkpoints, metrics.jsonl, samples
    students/8/              that student: a bundle of one stage
    finished.json            once the last student is there
"""

import functools
import json
import logging
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from cascade import bundle, registry
from cascade import config as configs
from cascade.diffusion import guidance
from cascade.diffusion.distillation import OBJECTIVES, Objective, distillation_loss, matching
from cascade.diffusion.process import predictions
from cascade.errors import UserError
from cascade.networks import cost
from cascade.parallel import processes
from cascade.parallel.mesh import on_all_processes, on_first_process, whole_on_host
from cascade.stage import Stage
from cascade.text.interface import TextEncoder
from cascade.training.export import bundle_runs
from cascade.training.halvings import Halving, check_distillation, halvings
from cascade.training.loop import Place, Task, finish, run, unfinish, write_config
from cascade.training.same_run import (
    FIXED_DISTILLING,
    check_one_text,
    check_same,
    without_places,
)
from cascade.training.teacher import find_teacher
from cascade.training.train import inputs


def distill(config, workdir, *, progress: bool = True) -> pathlib.Path:
    """Distills one stage, student by student, going on where the folder's students end.

    Args:
      config: an experiment's with a `distill` section, checked by `cascade.config.load`.
      workdir: the distillation's folder; several processes share it.

    Returns:
      The last student's bundle.

    Raises:
      UserError: the teacher doesn't fit, the folder is another run's, or as
        `cascade.training.train.train`.
      Stopped: SIGTERM came, and the state was saved.
    """
    place = begin(config, workdir)
    return learn(config, workdir, place, progress)


def distill_cascade(stages: dict, workdir, *, progress: bool = True) -> pathlib.Path:
    """Distills every stage of a cascade, apart, and puts the last students into one bundle.

    All are looked at before the first learns.

    Args:
      stages: name -> config, base first, of one text encoder, as `cascade.config.load_cascade` has
        them; a stage's folder is `workdir/NAME`.
      workdir: as for `distill`.

    Returns:
      The bundle, `workdir/bundle`.

    Raises:
      UserError, Stopped: as `distill`.
    """
    workdir = pathlib.Path(workdir)
    check_one_text({name: configs.to_json(config.text) for name, config in stages.items()})
    places, encoder = {}, None  # one for all, so that its weights are read once
    for name, config in stages.items():
        places[name] = begin(config, workdir / name, encoder)
        encoder = places[name].encoder
    mesh = next(iter(places.values())).mesh
    on_first_process(functools.partial(unfinish, workdir), mesh)
    students = [
        learn(config, workdir / name, places[name], progress) for name, config in stages.items()
    ]
    made = workdir / "bundle"  # with the encoder's weights, which students don't carry
    write = functools.partial(bundle_runs, students, made, encoder=encoder, overwrite=True)
    on_first_process(write, mesh)
    finish(workdir, sum(_updates(config) for config in stages.values()))
    return made


def begin(config, workdir, encoder: TextEncoder | None = None) -> Place:
    """Checks that a distillation can go on, and keeps what it needs to, the teacher, in its folder.

    Args:
      encoder: what `config.text` makes, made already.

    Raises:
      UserError: as `distill`.
    """
    check_distillation(config)
    processes.agree("config", without_places(configs.to_json(config)))
    place, folder = Place.of(config, encoder), pathlib.Path(workdir)
    kept = folder / "teacher"

    def check_folder():
        """Whether the teacher is kept already."""
        if (folder / "config.json").is_file():
            check_same(config, _read(folder / "config.json"), "another run", FIXED_DISTILLING)
        return _is_bundle(kept)

    if on_all_processes(check_folder, place.mesh):
        write_config(config, folder)
        return place
    teacher = find_teacher(config, place.encoder)
    write_config(config, folder)
    _save(kept, teacher, config, place)
    return place


def learn(config, workdir, place: Place, progress: bool) -> pathlib.Path:
    """Makes all students that aren't there yet; returns the last one's bundle."""
    folder = pathlib.Path(workdir)
    for halving in halvings(config):
        student = folder / "students" / halving.name
        if on_all_processes(functools.partial(_is_bundle, student), place.mesh):
            logging.info("%s is there already.", student)
            continue
        logging.info("The student %s learns.", halving.name)
        _learn_one(config, halving, folder, place, progress)
    finish(folder, _updates(config))
    return student


def _learn_one(config, halving: Halving, folder, place: Place, progress: bool):
    """Trains one student and writes its bundle."""
    progress = progress and jax.process_index() == 0
    mesh, rules, encoder = place
    source = folder / "students" / halving.teacher if halving.teacher else folder / "teacher"
    read = functools.partial(bundle.load_stages, source, mesh, rules)
    ((teacher, params, _),), _ = on_all_processes(read, mesh)
    batches, evaluation, null_text = inputs(halving.config, encoder, mesh, progress)
    # The teacher itself is run as the config says, in its dtype.
    section = teacher.config if halving.teacher else config.stage
    lesson = Lesson(
        Stage(section, null_text, place.layout),
        Stage(halving.config.stage, null_text, place.layout),
        halving,
    )
    updates = halving.config.train.steps

    def given(step):
        return params, np.float32(step / updates)

    task = Task(lesson.student, lesson.init, lesson.loss, given, lesson.flops)
    workdir = folder / "halvings" / halving.name
    state = run(task, halving.config, workdir, place, batches, evaluation, progress)
    learnt = jax.tree.map(whole_on_host, state.ema_params)
    student = bundle.TrainedStage(lesson.student, learnt, int(state.step))
    _save(folder / "students" / halving.name, student, config, place)


class Lesson:
    """What one student is to learn of its teacher: a `Task`'s init and loss.

    Both take, after the key, the teacher's parameters and how far the student has come, 0 … 1.

    Attributes:
      teacher, student: stages.
      objective: what the student is to answer, from `cascade.diffusion.distillation`.
    """

    def __init__(self, teacher: Stage, student: Stage, halving: Halving):
        """Args: the stages, and which of a distillation's students this is."""
        self.teacher, self.student, self.halving = teacher, student, halving
        self.objective: Objective = matching()
        if halving.steps:
            told = halving.config.distill.objective
            self.objective = registry.build("objective", OBJECTIVES, told)

    def init(self, key, teacher_params, fraction):
        """The teacher's parameters, and zero for what the teacher doesn't have: the same network.

        Copies, since a training step donates its state.
        """
        fresh = self.student.init(key)
        return {**fresh, **jax.tree.map(jnp.copy, teacher_params)}

    def loss(self, params, batch, key, teacher_params, fraction, train: bool = True):
        """The weighted error of the student's answers, and metrics; see `Stage.loss`.

        Texts are dropped and `lowres` is noised as in training, alike for teacher and student; no
        network drops anything out. A student that is told a guidance weight w, and a teacher that
        is, learns with w uniform between its lowest and highest, another for each example.
        """
        student, x = self.student, batch["image"]
        example_key, text_key, aug_key, weight_key = jax.random.split(key, 4)
        cond = student.conditions(batch, text_key, aug_key, train)
        if student.embeds_guidance:
            low, high = student.config.distilled.guidance
            weights = jax.random.uniform(weight_key, len(x), minval=low, maxval=high)
            cond["guidance_weight"] = weights
        # The objective asks the student too, but learns nothing by that.
        asked = _denoiser(student, jax.lax.stop_gradient(params))
        example = self.objective(
            example_key,
            x,
            self._taught(teacher_params, cond),
            lambda z_t, logsnr: asked(z_t, logsnr, cond),
            student.schedule,
            self.halving.steps,
            fraction,
        )
        z_t, logsnr = example.z_t, example.logsnr_t
        output = student.network.apply({"params": params}, z_t, logsnr, cond)
        prediction = predictions(output, z_t, logsnr, student.config.output)
        each = distillation_loss(prediction, example, student.weighting)
        return student.tally(each, logsnr, batch)

    def _taught(self, teacher_params, cond):
        """The denoiser that teaches; the guided student's is guided, and thresholded as told."""
        denoise = _denoiser(self.teacher, teacher_params)
        if self.halving.steps:
            return lambda z_t, logsnr: denoise(z_t, logsnr, cond)
        cond = dict(cond)
        weights = cond.pop("guidance_weight")
        count = len(weights)
        null = {
            k: jnp.broadcast_to(v, (count, *v.shape)) for k, v in self.student.null_cond.items()
        }
        guided = guidance.guide(denoise, cond, {**cond, **null}, weights)
        told = self.halving.config.distill.threshold
        threshold = registry.build("threshold", guidance.THRESHOLDS, told)
        return guidance.thresholded(guided, threshold)

    @functools.cached_property
    def flops(self) -> float:
        """FLOPs of a step for one picture: the loss, and twice the student for its gradient."""
        plain = Lesson(_countable(self.teacher), _countable(self.student), self.halving)
        image, cond = plain.student.given_shapes(1)
        batch = {"image": image, **cond}
        key = jax.random.key(0)
        params, taught = (jax.eval_shape(s.init, key) for s in (plain.student, plain.teacher))
        fraction = jax.ShapeDtypeStruct((), jnp.float32)
        loss = cost.count(plain.loss, params, batch, key, taught, fraction).total()
        return loss + 2 * plain.student.forward_flops


def _denoiser(stage: Stage, params):
    """denoise(z_t, logsnr, cond) -> Denoised of a stage, neither guided nor thresholded."""

    def predict(z_t, logsnr, cond):
        return stage.network.apply({"params": params}, z_t, logsnr, cond)

    return guidance.denoiser(predict, stage.config.output)


def _countable(stage: Stage) -> Stage:
    """The stage for `cost.count`, which doesn't see into fused kernels."""
    section = stage.config.copy_and_resolve_references()
    section.network.attention_implementation = "xla"
    return Stage(section)


def _updates(config) -> int:
    """Of all of a distillation's students together."""
    return sum(halving.config.train.steps for halving in halvings(config))


def _save(folder, trained: bundle.TrainedStage, config, place: Place):
    """Writes a stage as a bundle, on process 0; the text encoder's weights aren't in it."""
    text = configs.to_json(config.text)
    write = functools.partial(
        bundle.save_bundle, folder, [trained], text, place.encoder, text_weights=False
    )
    on_first_process(write, place.mesh)


def _is_bundle(folder: pathlib.Path) -> bool:
    return (folder / bundle.PLACE["mark"]).is_file()


def _read(path: pathlib.Path) -> dict:
    """A distillation's config as it was written."""
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(saved, dict) or not isinstance(saved.get("text"), dict):
            raise ValueError("no config")
        return saved
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path} can't be read ({error}); remove it if the folder's run is the one that you "
            "mean, or use another --workdir."
        ) from error

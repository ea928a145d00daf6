"""The loop that learns, whatever it is, from a config to checkpoints. Read `run` downward."""

import contextlib
import functools
import json
import logging
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict
from tqdm import tqdm

from cascade import config as configs
from cascade import registry
from cascade.errors import Stopped, UserError
from cascade.files import write_whole
from cascade.parallel import mesh as meshes
from cascade.parallel import processes
from cascade.parallel.layout import Layout
from cascade.parallel.rules import Rules, of_config, shardings
from cascade.stage import Stage
from cascade.text.encoders import ENCODERS
from cascade.text.interface import TextEncoder
from cascade.text.on_the_fly import encoded
from cascade.training.checkpoint import Checkpoints
from cascade.training.observe import Observer, due
from cascade.training.optim import make_optimizer
from cascade.training.same_run import check_same_run
from cascade.training.state import init_state, jit_train_step, with_shardings

# A run that has reached its last step leaves {"step": N} here.
FINISHED = "finished.json"


class Task(NamedTuple):
    """What a run is to learn.

    Attributes:
      stage: what learns; samples are drawn with it.
      init: `init(key, *given) -> parameters` to begin with.
      loss: `loss(params, batch, key, *given, train=True) -> (loss, metrics)`, as `Stage.loss`.
      given: `given(step)`, what both take besides, such as a teacher's parameters. It is handed to
        compiled programs as arguments, so that it lies on the mesh as it was laid and is no
        constant of theirs; they don't change it.
      flops: of a training step, for one picture.
    """

    stage: Stage
    init: Callable[..., Any]
    loss: Callable[..., tuple[jax.Array, dict]]
    given: Callable[[int], tuple]
    flops: float


class Place(NamedTuple):
    """Where a run happens: the mesh, by which rules arrays lie on it, and who reads captions."""

    mesh: Mesh
    rules: Rules
    encoder: TextEncoder

    @classmethod
    def of(cls, config: ConfigDict, encoder: TextEncoder | None = None) -> "Place":
        """A config's.

        Args:
          encoder: what its `text` section makes, made already.

        Raises:
          UserError: the devices don't make its mesh, its batch can't be split over that, or its
            stage takes other text than the encoder gives.
        """
        settings = config.train
        mesh = meshes.make_mesh(**config.mesh)
        meshes.check_batch(settings.batch_size, settings.microbatches, mesh)
        encoder = encoder or registry.build("text encoder", ENCODERS, config.text)
        if encoder.width != config.stage.text_width:
            raise UserError(
                f"config.stage.text_width is {config.stage.text_width} but the text encoder "
                f"{config.text.name!r} gives {encoder.width}; set it to that."
            )
        return cls(mesh, of_config(config), encoder)

    @property
    def layout(self) -> Layout | None:
        """What a network is told of it."""
        return Layout.of(self.mesh, self.rules)


def run(
    task: Task,
    config: ConfigDict,
    workdir,
    place: Place,
    batches: Iterator[dict],
    evaluation: list[dict],
    progress: bool,
):
    """Learns until `config.train.steps`, resuming from `workdir` where it left off.

    eval_shape → shardings → init | restore → jit(train_step) → loop.

    Args:
      batches: this process's endless batches; a checkpoint keeps their position.
      evaluation: its held-out ones.
      progress: show a bar.

    Returns:
      The final state, on the mesh.

    Raises:
      UserError, Stopped: as `cascade.training.train.train`.
    """
    settings, (mesh, rules, encoder) = config.train, place
    optimizer = make_optimizer(settings)
    create = functools.partial(init_state, task, optimizer)
    abstract = jax.eval_shape(create, jax.random.key(config.seed), *task.given(0))
    placed = shardings(abstract, mesh, rules)

    checkpoints = Checkpoints(workdir, keep_last=settings.keep_last, keep_every=settings.keep_every)
    same_run = functools.partial(check_same_run, config, encoder.fingerprint)
    restored = checkpoints.restore(with_shardings(abstract, placed), batches, same_run)
    if restored is None:
        start, fresh = 0, jax.jit(create, out_shardings=placed)
        state = fresh(jax.random.key(config.seed), *task.given(0))
    else:
        start, state, _ = restored
    if start >= settings.steps:
        logging.info("%s is already trained for %d steps.", workdir, start)
        checkpoints.close()
        finish(workdir, start)
        return state
    write_config(config, workdir)

    step_fn = jit_train_step(task, optimizer, settings, mesh, placed)

    def placed_batch(batch):
        return encoded(encoder, meshes.put_batch(batch, mesh))

    observer = Observer(task, config, workdir, mesh, placed_batch, start, evaluation)
    key = jax.random.fold_in(jax.random.key(config.seed), 1)
    bar = tqdm(
        total=settings.steps, initial=start, unit="step", disable=not progress, smoothing=0.05
    )
    with (
        processes.stopping() as asked_to_stop,
        bar,
        contextlib.closing(observer),
        contextlib.closing(checkpoints),
        interruptible(checkpoints),
    ):
        for step in range(start + 1, settings.steps + 1):
            with observer.waiting_for_input():
                batch = placed_batch(next(batches))
            state, metrics = step_fn(state, batch, key, *task.given(step - 1))
            observer.after_step(step, state, metrics, bar)
            bar.update()
            stop = asked_to_stop(step)
            last = stop or step == settings.steps
            if due(step, settings.checkpoint_every) or last:
                observer.check_finite(step, metrics)
                saved = configs.to_json(config), encoder.fingerprint
                checkpoints.save(step, state, batches, *saved)
            if last:
                break
    if step == settings.steps:
        finish(workdir, step)
    # Asked once more, for the last save takes its time. After the last step too: what would have
    # followed, another stage or student, doesn't begin.
    if stop or asked_to_stop(step):
        raise Stopped(f"Stopped at step {step}, saved; the same command goes on.")
    return state


@contextlib.contextmanager
def interruptible(checkpoints):
    """Gives Ctrl-C inside `with` a sentence that says where the run goes on."""
    try:
        yield
    except KeyboardInterrupt as error:
        saved = checkpoints.latest() or 0
        said = f"Interrupted; the same command goes on from step {saved}."
        raise type(error)(said) from None


def write_config(config, workdir):
    """Leaves the run's settings as `workdir/config.json`, for people and for `cascade bundle`.

    The run isn't finished then, whatever it was before.
    """
    if jax.process_index() == 0:
        folder = pathlib.Path(workdir)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(folder / "config.json", json.dumps(configs.to_json(config), indent=2))
        except OSError as error:
            raise UserError(
                f"Can't write {folder / 'config.json'} ({error.strerror}); give another --workdir."
            ) from error
    unfinish(workdir)


def unfinish(workdir):
    """Takes back what `finish` said, where there is more to do now."""
    if jax.process_index() == 0:
        try:
            (pathlib.Path(workdir) / FINISHED).unlink(missing_ok=True)
        except OSError as error:
            raise UserError(
                f"Can't remove {FINISHED} from {workdir} ({error.strerror}); give another "
                "--workdir."
            ) from error


def finish(workdir, step: int):
    """Says in `workdir/finished.json` that there is nothing left to do: launchers look there."""
    if jax.process_index() == 0:
        try:
            write_whole(pathlib.Path(workdir) / FINISHED, json.dumps({"step": step}))
        except OSError as error:
            raise UserError(
                f"Can't write {FINISHED} in {workdir} ({error.strerror}); make room and run the "
                "same command again."
            ) from error

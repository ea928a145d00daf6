"""Training one stage, from a config to checkpoints. Read `train` from top to bottom."""

import contextlib
import functools
import itertools
import json
import logging
import pathlib

import jax
from tqdm import tqdm

from cascade import config as configs
from cascade import registry
from cascade.data.loader import make_loader, make_source
from cascade.data.sources import captions_of
from cascade.errors import Stopped, UserError
from cascade.files import write_whole
from cascade.parallel import mesh as meshes
from cascade.parallel import processes
from cascade.parallel.layout import Layout
from cascade.parallel.rules import of_config, shardings
from cascade.stage import Stage
from cascade.text.cache import EmbeddingCache
from cascade.text.encoders import ENCODERS
from cascade.text.on_the_fly import Tokenized, encoded
from cascade.training.checkpoint import Checkpoints
from cascade.training.observe import Observer, due
from cascade.training.optim import make_optimizer
from cascade.training.state import init_state, jit_train_step, with_shardings

# Of a config, what a resumed run may not change without becoming another run.
FIXED = (
    "seed",
    "stage",
    "text",
    "data",
    "train.batch_size",
    "train.microbatches",
    "train.optimizer",
    "train.clip_norm",
    "train.ema_decay",
)
# What may: where the same data lies on this machine, and what a step recomputes.
PLACES = ("data_dir", "path", "files")
COMPUTED = ("remat",)
# A run that has reached its last step leaves {"step": N} here.
FINISHED = "finished.json"


def train(config, workdir, *, progress: bool = True):
    """Trains one stage until `config.train.steps`, resuming from `workdir` where it left off.

    mesh → Stage → data → eval_shape → shardings → init | restore → jit(train_step) → loop.

    Args:
      config: an experiment's config, already checked by `cascade.config.load`.
      workdir: the run's folder: checkpoints, metrics.jsonl, tensorboard, samples, config.json, and
        once it has reached its last step finished.json. Several processes share it.

    Raises:
      UserError: the data, the mesh or the folder doesn't fit, the loss stopped being a number,
        a checkpoint couldn't be written, or processes disagree about the config.
      Stopped: SIGTERM came, and the state was saved.
    """
    settings = config.train
    processes.agree("config", without_places(configs.to_json(config)))
    progress = progress and jax.process_index() == 0
    mesh = meshes.make_mesh(**config.mesh)
    meshes.check_batch(settings.batch_size, settings.microbatches, mesh)
    encoder = registry.build("text encoder", ENCODERS, config.text)
    check_width(config, encoder)
    stage = Stage(config.stage)
    optimizer = make_optimizer(settings)
    create = functools.partial(init_state, stage, optimizer)
    abstract = jax.eval_shape(create, jax.random.key(config.seed))
    rules = of_config(config)
    placed = shardings(abstract, mesh, rules)

    batches, evaluation, null_text = inputs(config, encoder, mesh, progress)
    stage = Stage(config.stage, null_text, Layout.of(mesh, rules))

    checkpoints = Checkpoints(workdir, keep_last=settings.keep_last, keep_every=settings.keep_every)
    same_run = functools.partial(check_same_run, config, encoder.fingerprint)
    restored = checkpoints.restore(with_shardings(abstract, placed), batches, same_run)
    if restored is None:
        start, state = 0, jax.jit(create, out_shardings=placed)(jax.random.key(config.seed))
    else:
        start, state, _ = restored
    if start >= settings.steps:
        logging.info("%s is already trained for %d steps.", workdir, start)
        checkpoints.close()
        finish(workdir, start)
        return state
    write_config(config, workdir)

    step_fn = jit_train_step(stage, optimizer, settings, mesh, placed)

    def placed_batch(batch):
        return encoded(encoder, meshes.put_batch(batch, mesh))

    observer = Observer(stage, config, workdir, mesh, placed_batch, start, evaluation)
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
            state, metrics = step_fn(state, batch, key)
            observer.after_step(step, state, metrics, bar)
            bar.update()
            last = step == settings.steps or asked_to_stop(step)
            if due(step, settings.checkpoint_every) or last:
                observer.check_finite(step, metrics)
                saved = configs.to_json(config), encoder.fingerprint
                checkpoints.save(step, state, batches, *saved)
            if last:
                break
    if step < settings.steps:
        raise Stopped(f"Stopped at step {step}, saved; the same command goes on.")
    finish(workdir, step)
    return state


def check_width(config, encoder):
    """Raises a UserError unless the stage takes what the text encoder gives."""
    if encoder.width != config.stage.text_width:
        raise UserError(
            f"config.stage.text_width is {config.stage.text_width} but the text encoder "
            f"{config.text.name!r} gives {encoder.width}; set it to that."
        )


@contextlib.contextmanager
def interruptible(checkpoints):
    """Gives Ctrl-C inside `with` a sentence that says where the run goes on."""
    try:
        yield
    except KeyboardInterrupt as error:
        saved = checkpoints.latest() or 0
        said = f"Interrupted; the same command goes on from step {saved}."
        raise type(error)(said) from None


def inputs(config, encoder, mesh, progress: bool):
    """This process's endless training batches, its held-out ones, and the null condition."""
    sources = {train: make_source(config.data, train=train) for train in (True, False)}
    texts, null_text = caption_arrays(config, encoder, mesh, sources.values(), progress)
    batches = loader(config, mesh, sources[True], texts, train=True)
    evaluation = loader(config, mesh, sources[False], texts, train=False)
    return batches, list(itertools.islice(evaluation, config.train.eval_batches)), null_text


def caption_arrays(config, encoder, mesh, sources, progress: bool):
    """Fills the cache of captions' states or, without one, gives the encoder its place on the mesh.

    A full cache has the null condition too, so that training from it loads no encoder's weights.

    Returns:
      What turns captions into a batch's arrays: their states, or tokens to encode; and the null
      condition (emb [L, D], mask [L]).
    """
    if not config.text_cache.folder:
        encoder.place(mesh)
        return Tokenized(encoder), encoder.null()
    cache = EmbeddingCache(config.text_cache.folder, encoder, config.text_cache.dtype)
    captions = ["", *itertools.chain.from_iterable(map(captions_of, sources))]
    cache.ensure(captions, mesh, progress=progress)
    (null_emb,), (null_mask,) = cache.lookup([""]).values()
    return cache.lookup, (null_emb, null_mask)


def loader(config, mesh, source, texts, *, train: bool):
    """This process's share of a source's batches."""
    stage = config.stage
    share, shares = meshes.process_share(mesh)
    return make_loader(
        config.data,
        source=source,
        resolution=stage.resolution,
        lowres_resolution=stage.lowres_resolution,
        crop_resolution=stage.crop_resolution,
        texts=texts,
        seed=config.seed,
        batch_size=config.train.batch_size // shares,
        train=train,
        process_index=share,
        process_count=shares,
    )


def write_config(config, workdir):
    """Leaves the run's settings as `workdir/config.json`, for people and for `cascade bundle`.

    The run isn't finished then, whatever it was before.
    """
    if jax.process_index() == 0:
        folder = pathlib.Path(workdir)
        try:
            write_whole(folder / "config.json", json.dumps(configs.to_json(config), indent=2))
            (folder / FINISHED).unlink(missing_ok=True)
        except OSError as error:
            raise UserError(
                f"Can't write {folder / 'config.json'} ({error.strerror}); give another --workdir."
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


def check_same_run(config, text_fingerprint: str, saved: dict, step: int):
    """Raises a UserError where a checkpoint is another run's.

    Args:
      config, text_fingerprint: this run's.
      saved: the checkpoint's meta.
      step: its number.
    """
    configured = (configs.to_json(config), saved["config"])
    now, then = (_without(COMPUTED, without_places(each)) for each in configured)
    for path in FIXED:
        ours, theirs = now, then
        for key in path.split("."):
            ours, theirs = ours.get(key), theirs.get(key)
        if ours != theirs:
            where, ours, theirs = processes.first_difference(f"config.{path}", ours, theirs)
            raise UserError(
                f"This working folder holds step {step} of another run: {where} is {ours!r} now "
                f"and was {theirs!r}; use another --workdir."
            )
    if saved["text_fingerprint"] not in ("", text_fingerprint):
        raise UserError(
            f"This working folder holds step {step} of a run with another text encoder: its "
            f"fingerprint is {text_fingerprint[:8]} now and was {saved['text_fingerprint'][:8]}; "
            "give the weights that it began with, or another --workdir."
        )


def portable_text(section: dict) -> dict:
    """A text section without its weights' place, which differs between machines.

    Whether two places hold the same weights is for the encoder's fingerprint to tell.
    """
    return {key: value for key, value in section.items() if key != "weights"}


def without_places(config: dict) -> dict:
    """A config as JSON without where its data, captions' states and weights lie on this machine."""
    kept = _without(PLACES, config)
    kept["text"] = portable_text(kept["text"])
    kept["text_cache"] = {**kept["text_cache"], "folder": bool(kept["text_cache"]["folder"])}
    return kept


def _without(keys, tree):
    if not isinstance(tree, dict):
        return tree
    return {key: _without(keys, value) for key, value in tree.items() if key not in keys}

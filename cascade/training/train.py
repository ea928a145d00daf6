"""Training one stage, from a config to checkpoints. Read `train` from top to bottom."""

import contextlib
import functools
import itertools
import json
import logging
import pathlib

import jax
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from cascade import config as configs
from cascade import registry
from cascade.data.loader import make_loader, make_source
from cascade.data.sources import captions_of
from cascade.errors import UserError
from cascade.files import write_whole
from cascade.parallel import mesh as meshes
from cascade.parallel.rules import shardings
from cascade.stage import Stage
from cascade.text.cache import EmbeddingCache
from cascade.text.encoders import ENCODERS
from cascade.text.on_the_fly import Tokenized, encoded
from cascade.training.checkpoint import Checkpoints
from cascade.training.observe import Observer, due
from cascade.training.optim import make_optimizer
from cascade.training.state import init_state, make_train_step, with_shardings

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
# What may: where the same data lies on this machine.
PLACES = ("data_dir", "path", "files")


def train(config, workdir, *, progress: bool = True):
    """Trains one stage until `config.train.steps`, resuming from `workdir` where it left off.

    mesh → Stage → data → eval_shape → shardings → init | restore → jit(train_step) → loop.

    Args:
      config: an experiment's config, already checked by `cascade.config.load`.
      workdir: the run's folder: checkpoints, metrics.jsonl, tensorboard, samples, config.json.

    Raises:
      UserError: the data, the mesh or the folder doesn't fit, the loss stopped being a number, or
        a checkpoint couldn't be written.
    """
    settings = config.train
    mesh = meshes.make_mesh(**config.mesh)
    meshes.check_batch(settings.batch_size, settings.microbatches, mesh)
    encoder = registry.build("text encoder", ENCODERS, config.text)
    check_width(config, encoder)
    stage = Stage(config.stage)
    optimizer = make_optimizer(settings)
    create = functools.partial(init_state, stage, optimizer)
    abstract = jax.eval_shape(create, jax.random.key(config.seed))
    rules = [(pattern, P(*spec)) for pattern, spec in config.sharding_rules]
    placed = shardings(abstract, mesh, rules)

    sources = {train: make_source(config.data, train=train) for train in (True, False)}
    texts, null_text = caption_arrays(config, encoder, mesh, sources.values())
    stage = Stage(config.stage, null_text)
    batches = loader(config, sources[True], texts, train=True)
    evaluation = loader(config, sources[False], texts, train=False)
    evaluation = list(itertools.islice(evaluation, settings.eval_batches))

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
        return state
    write_config(config, workdir)

    step_fn = jax.jit(
        make_train_step(stage, optimizer, settings),
        donate_argnums=0,
        out_shardings=(placed, meshes.replicated(mesh)),
    )

    def placed_batch(batch):
        return encoded(encoder, meshes.put_batch(batch, mesh))

    observer = Observer(stage, config, workdir, placed_batch, start, evaluation)
    key = jax.random.fold_in(jax.random.key(config.seed), 1)
    bar = tqdm(
        total=settings.steps, initial=start, unit="step", disable=not progress, smoothing=0.05
    )
    with bar, contextlib.closing(observer), contextlib.closing(checkpoints):
        try:
            for step in range(start + 1, settings.steps + 1):
                with observer.waiting_for_input():
                    batch = placed_batch(next(batches))
                state, metrics = step_fn(state, batch, key)
                observer.after_step(step, state, metrics, bar)
                bar.update()
                if due(step, settings.checkpoint_every) or step == settings.steps:
                    observer.check_finite(step, metrics)
                    saved = configs.to_json(config), encoder.fingerprint
                    checkpoints.save(step, state, batches, *saved)
        except KeyboardInterrupt:
            saved = checkpoints.latest() or 0
            raise UserError(
                f"Interrupted at step {step}; the same command goes on from step {saved}."
            ) from None
    return state


def check_width(config, encoder):
    """Raises a UserError unless the stage takes what the text encoder gives."""
    if encoder.width != config.stage.text_width:
        raise UserError(
            f"config.stage.text_width is {config.stage.text_width} but the text encoder "
            f"{config.text.name!r} gives {encoder.width}; set it to that."
        )


def caption_arrays(config, encoder, mesh, sources):
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
    cache.ensure(["", *itertools.chain.from_iterable(map(captions_of, sources))], mesh)
    (null_emb,), (null_mask,) = cache.lookup([""]).values()
    return cache.lookup, (null_emb, null_mask)


def loader(config, source, texts, *, train: bool):
    """This process's share of a source's batches."""
    stage, processes = config.stage, jax.process_count()
    return make_loader(
        config.data,
        source=source,
        resolution=stage.resolution,
        lowres_resolution=stage.lowres_resolution,
        crop_resolution=stage.crop_resolution,
        texts=texts,
        seed=config.seed,
        batch_size=config.train.batch_size // processes,
        train=train,
        process_index=jax.process_index(),
        process_count=processes,
    )


def write_config(config, workdir):
    """Leaves the run's settings as `workdir/config.json`, for people and for `cascade bundle`."""
    if jax.process_index() == 0:
        path = pathlib.Path(workdir) / "config.json"
        try:
            write_whole(path, json.dumps(configs.to_json(config), indent=2))
        except OSError as error:
            raise UserError(
                f"Can't write {path} ({error.strerror}); give another --workdir."
            ) from error


def check_same_run(config, text_fingerprint: str, saved: dict, step: int):
    """Raises a UserError where a checkpoint is another run's.

    Args:
      config, text_fingerprint: this run's.
      saved: the checkpoint's meta.
      step: its number.
    """
    now, then = (_without_places(c) for c in (configs.to_json(config), saved["config"]))
    now["text"], then["text"] = portable_text(now["text"]), portable_text(then["text"])
    for path in FIXED:
        ours, theirs = now, then
        for key in path.split("."):
            ours, theirs = ours.get(key), theirs.get(key)
        if ours != theirs:
            raise UserError(
                f"This working folder holds step {step} of another run: "
                f"{_first_difference(f'config.{path}', ours, theirs)}; use another --workdir."
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


def _without_places(tree):
    if not isinstance(tree, dict):
        return tree
    return {key: _without_places(value) for key, value in tree.items() if key not in PLACES}


def _first_difference(path: str, ours, theirs) -> str:
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in sorted(ours.keys() | theirs.keys()):
            if ours.get(key) != theirs.get(key):
                return _first_difference(f"{path}.{key}", ours.get(key), theirs.get(key))
    return f"{path} is {ours!r} now and was {theirs!r}"

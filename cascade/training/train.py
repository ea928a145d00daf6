"""Training one stage, from a config to checkpoints. Read `train` from top to bottom."""

import functools
import itertools
import json
import pathlib

import jax
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from cascade import config as configs
from cascade import registry
from cascade.data.loader import make_loader
from cascade.data.sources import SOURCES, captions_of
from cascade.errors import UserError
from cascade.parallel import mesh as meshes
from cascade.parallel.rules import shardings
from cascade.stage import Stage
from cascade.text.cache import EmbeddingCache
from cascade.text.encoders import ENCODERS
from cascade.training.checkpoint import Checkpoints
from cascade.training.observe import Observer
from cascade.training.optim import make_optimizer
from cascade.training.state import init_state, make_train_step, with_shardings

# Of a config, what a resumed run may not change without becoming another run.
FIXED = ("seed", "stage", "text", "train.batch_size", "train.optimizer")


def train(config, workdir, *, progress: bool = True):
    """Trains one stage until `config.train.steps`, resuming from `workdir` where it left off.

    mesh → loader → Stage → eval_shape → shardings → init | restore → jit(train_step) → loop.

    Args:
      config: an experiment's config, already checked by `cascade.config.load`.
      workdir: the run's folder: checkpoints, metrics.jsonl, tensorboard, samples, config.json.

    Raises:
      UserError: the data, the mesh or the folder doesn't fit, or a checkpoint couldn't be written.
    """
    settings = config.train
    mesh = meshes.make_mesh(**config.mesh)
    checkpoints = Checkpoints(workdir, keep_last=settings.keep_last, keep_every=settings.keep_every)
    embeddings = embedding_cache(config)
    batches = loader(config, embeddings, train=True)
    evaluation = list(
        itertools.islice(loader(config, embeddings, train=False), settings.eval_batches)
    )

    stage = Stage(config.stage)
    optimizer = make_optimizer(settings)
    create = functools.partial(init_state, stage, optimizer)
    abstract = jax.eval_shape(create, jax.random.key(config.seed))
    rules = [(pattern, P(*spec)) for pattern, spec in config.sharding_rules]
    placed = shardings(abstract, mesh, rules)
    restored = checkpoints.restore(with_shardings(abstract, placed), batches)
    if restored is None:
        start, state = 0, jax.jit(create, out_shardings=placed)(jax.random.key(config.seed))
    else:
        start, state, meta = restored
        check_same_run(config, meta["config"], start)
    write_config(config, workdir)

    step_fn = jax.jit(
        make_train_step(stage, optimizer, settings),
        donate_argnums=0,
        out_shardings=(placed, meshes.replicated(mesh)),
    )
    observer = Observer(stage, config, workdir, mesh, start, evaluation)
    key = jax.random.fold_in(jax.random.key(config.seed), 1)
    bar = tqdm(
        total=settings.steps, initial=start, unit="step", disable=not progress, smoothing=0.05
    )
    for step in range(start + 1, settings.steps + 1):
        with observer.waiting_for_input():
            batch = meshes.put_batch(next(batches), mesh)
        state, metrics = step_fn(state, batch, key)
        observer.after_step(step, state, metrics, bar)
        bar.update()
        if step % settings.checkpoint_every == 0 or step == settings.steps:
            checkpoints.save(step, state, batches, configs.to_json(config))
    bar.close()
    observer.close()
    checkpoints.close()
    return state


def embedding_cache(config) -> EmbeddingCache:
    """The text encoder's embeddings of every caption of the run's data, computed where missing."""
    encoder = registry.build("text encoder", ENCODERS, config.text)
    if encoder.width != config.stage.text_width:
        raise UserError(
            f"config.stage.text_width is {config.stage.text_width} but the text encoder "
            f"{config.text.name!r} gives {encoder.width}; set it to that."
        )
    cache = EmbeddingCache(config.text_cache, encoder)
    for section in (config.data.source, config.data.eval_source):
        cache.ensure(captions_of(registry.build("data source", SOURCES, section)))
    return cache


def loader(config, embeddings: EmbeddingCache, *, train: bool):
    """This process's share of the batches, as `cascade.data.loader.make_loader` says."""
    stage, processes = config.stage, jax.process_count()
    if config.train.batch_size % processes:
        raise UserError(
            f"config.train.batch_size={config.train.batch_size} can't be split over {processes} "
            "processes; choose a multiple of that."
        )
    return make_loader(
        config.data,
        resolution=stage.resolution,
        lowres_resolution=stage.lowres_resolution,
        crop_resolution=stage.crop_resolution,
        embedding=embeddings,
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
        temporary = path.with_name("config.json.tmp")
        temporary.write_text(json.dumps(configs.to_json(config), indent=2), encoding="utf-8")
        temporary.replace(path)


def check_same_run(config, saved: dict, step: int):
    """Raises a UserError where a resumed run's config is another run's."""
    for path in FIXED:
        now, then = configs.to_json(config), saved
        for key in path.split("."):
            now, then = now[key], then[key]
        if now != then:
            raise UserError(
                f"This working folder holds step {step} of a run whose config.{path} differs: "
                f"{_first_difference(f'config.{path}', now, then)}. Use another --workdir."
            )


def _first_difference(path: str, now, then) -> str:
    if isinstance(now, dict) and isinstance(then, dict):
        for key in sorted(now.keys() | then.keys()):
            if now.get(key) != then.get(key):
                return _first_difference(f"{path}.{key}", now.get(key), then.get(key))
    return f"{path} is {now!r} now and was {then!r}"

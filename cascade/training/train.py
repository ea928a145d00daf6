"""Training one stage, from a config to checkpoints."""

import functools
import itertools

import jax

from cascade import config as configs
from cascade.data.loader import make_loader, make_source
from cascade.data.sources import captions_of
from cascade.errors import UserError
from cascade.files import check_writable
from cascade.parallel import mesh as meshes
from cascade.parallel import processes
from cascade.stage import Stage
from cascade.text.cache import EmbeddingCache
from cascade.text.on_the_fly import Tokenized
from cascade.training.checkpoint import Checkpoints
from cascade.training.loop import Place, Task, run
from cascade.training.same_run import check_same_run, without_places


def train(config, workdir, *, progress: bool = True):
    """Trains one stage until `config.train.steps`, resuming from `workdir` where it left off.

    mesh and text encoder → data → Stage → loop.

    Args:
      config: an experiment's config, already checked by `cascade.config.load`.
      workdir: the run's folder: checkpoints, metrics.jsonl, tensorboard, samples, config.json, and
        once it has reached its last step finished.json. Several processes share it.

    Raises:
      UserError: the data, the mesh or the folder doesn't fit, the loss stopped being a number,
        a checkpoint couldn't be written, or processes disagree about the config.
      Stopped: SIGTERM came, and the state was saved.
    """
    if "distill" in config:
        raise UserError(
            "This config has a `distill` section, so it is for `cascade distill`; train with the "
            "config that it is made of."
        )
    processes.agree("config", without_places(configs.to_json(config)))
    progress = progress and jax.process_index() == 0
    place = Place.of(config)
    Stage(config.stage)  # refuses what doesn't fit before the data is looked at
    check_folder(config, workdir, place)
    batches, evaluation, null_text = inputs(config, place.encoder, place.mesh, progress)
    stage = Stage(config.stage, null_text, place.layout)
    task = Task(stage, stage.init, stage.loss, lambda step: (), 3 * stage.forward_flops)
    return run(task, config, workdir, place, batches, evaluation, progress)


def check_folder(config, workdir, place: Place):
    """Raises a UserError where a run's folder can't be written or holds another run."""
    meshes.on_all_processes(functools.partial(check_writable, workdir, "run"), place.mesh)
    checkpoints = Checkpoints(workdir, read_only=True)

    def check():
        if newest := checkpoints.newest_meta():
            check_same_run(config, place.encoder.fingerprint, *newest)

    meshes.on_all_processes(check, place.mesh)


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

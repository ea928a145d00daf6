"""From finished runs to a bundle."""

import functools
import json
import pathlib

import jax
from ml_collections import ConfigDict

from cascade import bundle, registry
from cascade import config as configs
from cascade.errors import UserError
from cascade.parallel.mesh import make_mesh
from cascade.parallel.rules import shardings
from cascade.stage import Stage
from cascade.text.encoders import ENCODERS
from cascade.training.checkpoint import Checkpoints
from cascade.training.optim import make_optimizer
from cascade.training.state import init_state, with_shardings


def read_run(workdir) -> tuple[ConfigDict, bundle.TrainedStage]:
    """A run's config and its newest whole checkpoint's EMA weights.

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
    here = make_mesh(data=1, fsdp=1, tensor=1, devices=jax.local_devices()[:1])
    checkpoints = Checkpoints(workdir, read_only=True)
    restored = checkpoints.restore(with_shardings(abstract, shardings(abstract, here)))
    checkpoints.close()
    if restored is None:
        raise UserError(f"{workdir} holds no checkpoint: the stage is untrained; train it first.")
    step, state, _ = restored
    return config, bundle.TrainedStage(stage, state.ema_params, step)


def bundle_runs(workdirs, folder, **how):
    """Puts the EMA weights of several runs, base first, together into one bundle.

    Args:
      workdirs: the runs' folders.
      folder: the bundle's.
      **how: dtype, text_weights, overwrite, as in `cascade.bundle.save_bundle`.

    Raises:
      UserError: a run is missing or untrained, or the stages don't fit one another.
    """
    runs = [read_run(workdir) for workdir in workdirs]
    texts = [configs.to_json(config.text) for config, _ in runs]
    for workdir, text in zip(workdirs, texts, strict=True):
        if text != texts[0]:
            raise UserError(
                f"{workdir} was trained with the text encoder {text}, {workdirs[0]} with "
                f"{texts[0]}; a cascade encodes a prompt once, so all stages must share it."
            )
    encoder = registry.build("text encoder", ENCODERS, texts[0])
    stages = [stage for _, stage in runs]
    bundle.save_bundle(folder, stages, texts[0], encoder, **how)

"""Pictures in batches: each goes through every stage before the next batch is begun."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import FrozenConfigDict
from tqdm import tqdm

from cascade.bundle import TrainedStage
from cascade.errors import UserError
from cascade.images import to_float, to_uint8


class Request(NamedTuple):
    """Which pictures to draw, checked.

    Attributes:
      text: text_emb [P, L, D] and text_mask [P, L], of each prompt once.
      null: likewise, a batch of one: what guidance leads away from.
      images: pictures a prompt.
      count: pictures in all.
      rows: pictures that go through a network at once.
      seed, first_index: picture i's randomness follows from (seed, first_index + i).
    """

    text: dict[str, np.ndarray]
    null: dict[str, np.ndarray]
    images: int
    count: int
    rows: int
    seed: int
    first_index: int


def draw(
    trained: Sequence[TrainedStage],
    request: Request,
    stages: Sequence[int],
    settings: Mapping[int, FrozenConfigDict] | Sequence[FrozenConfigDict],
    sizes: Mapping[int, tuple[int, int]] | Sequence[tuple[int, int]],
    lowres: np.ndarray | None = None,
    progress: bool = True,
) -> Iterator[list[np.ndarray]]:
    """Each batch's pictures, a list of uint8 [B, H, W, 3], one for each of `stages`.

    Args:
      trained: all stages of the cascade.
      stages: which of them draw, in order.
      settings, sizes: of stage i, at [i]; a size is (height, width).
      lowres: what the first of `stages` enlarges, uint8 [count, h, w, 3]; None for a base stage.
      progress: show a bar.

    Raises:
      UserError: a stage drew NaN.
    """
    rows, count = request.rows, request.count
    null = {key: np.repeat(value, rows, axis=0) for key, value in request.null.items()}
    total = math.ceil(count / rows) * len(stages)
    with tqdm(total=total, unit="batch", disable=not progress) as bar:
        for start in range(0, count, rows):
            # The last batch repeats its last picture, so that it's no shape of its own.
            take = np.minimum(np.arange(start, start + rows), count - 1)
            text = {key: value[take // request.images] for key, value in request.text.items()}
            pictures = None if lowres is None else lowres[take]
            drawn = []
            for i in stages:
                bar.set_description(f"stage {i}, {sizes[i][1]}×{sizes[i][0]}")
                keys = _keys(request.seed, request.first_index + take, i)
                pictures = _draw(trained[i], i, text, null, pictures, keys, settings[i], sizes[i])
                drawn.append(pictures[: count - start])
                bar.update()
            yield drawn


def _draw(trained, index, cond, null, lowres, keys, settings, size) -> np.ndarray:
    """One batch of one stage, uint8."""
    stage, params, _ = trained
    # What is traced is no part of the program's key. A weight of 1 is: it takes half the work.
    traced = {"aug_level": "aug_level"}
    if settings.guidance != 1.0:
        traced["guidance"] = "guidance_weight"
    program = FrozenConfigDict({k: v for k, v in settings.items() if k not in traced})
    values = {name: float(settings[key]) for key, name in traced.items()}
    if not stage.is_base:
        cond = {**cond, "lowres": to_float(lowres)}
    x = np.asarray(stage.draw(params, cond, null, keys, program, size, **values))
    if not np.isfinite(x).all():
        raise UserError(
            f"Stage {index} drew NaN, with guidance {settings.guidance:g} and "
            f"{settings.steps} steps; lower the guidance or train the stage anew."
        )
    return to_uint8(x)


@jax.jit
def _fold(key, indices, stage):
    return jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(key, i), stage))(indices)


def _keys(seed: int, indices: np.ndarray, stage: int) -> jax.Array:
    """One key a picture: fold_in(fold_in(key(seed), index), stage)."""
    return _fold(jax.random.key(np.uint32(seed)), indices.astype(np.uint32), stage)

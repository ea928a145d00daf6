"""Pictures in batches: each goes through every stage before the next batch is begun.

A batch's pictures are split over a mesh's devices and stay there, from the noise to the last
stage's uint8. Only what someone asks of a `Batch` reaches a host.
"""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import FrozenConfigDict
from tqdm import tqdm

from cascade.bundle import TrainedStage
from cascade.errors import UserError
from cascade.images import to_float
from cascade.parallel.mesh import batch_sharding, replicated, split_rows, whole_on_host
from cascade.request import Request


class Batch(Sequence):
    """Pictures of one batch, on the devices that drew them.

    As a sequence it is, of each stage, all pictures: uint8 [count, H, W, 3] on every process. Of a
    mesh over several processes they ask for an item together, since it is sent to all.

    Attributes:
      start: how many pictures were drawn before.
      count: how many these are; rows after them fill the batch up.
      stages: of each stage that drew, uint8 [rows, H, W, 3], split over the mesh.
    """

    def __init__(self, start: int, count: int, stages: Sequence[jax.Array]):
        self.start, self.count, self.stages = start, count, stages

    def __len__(self) -> int:
        return len(self.stages)

    def __getitem__(self, stage: int | slice) -> np.ndarray | list[np.ndarray]:
        if isinstance(stage, slice):
            return [self[i] for i in range(len(self))[stage]]
        return whole_on_host(self.stages[stage])[: self.count]

    def own(self) -> Iterator[tuple[int, np.ndarray]]:
        """This process's part of the last stage's pictures: each one's number, and uint8 [H, W, 3].

        Every picture is some process's, and none is two's. Nothing is sent.
        """
        shards = [s for s in self.stages[-1].addressable_shards if s.replica_id == 0]
        for first, shard in sorted({s.index[0].start or 0: s for s in shards}.items()):
            kept = max(self.count - first, 0)
            for row, picture in enumerate(np.asarray(shard.data)[:kept], first):
                yield self.start + row, picture

    def first(self, most: int) -> Sequence[np.ndarray]:
        """Up to `most` of the last stage's pictures, on every process; they ask together."""
        wanted = max(min(most, self.count), 0)
        return whole_on_host(self.stages[-1][:wanted]) if wanted else []


def draw(
    trained: Sequence[TrainedStage],
    mesh: Mesh,
    request: Request,
    stages: Sequence[int],
    settings: Mapping[int, FrozenConfigDict] | Sequence[FrozenConfigDict],
    sizes: Mapping[int, tuple[int, int]] | Sequence[tuple[int, int]],
    lowres: np.ndarray | None = None,
    progress: bool = True,
) -> Iterator[Batch]:
    """Draws batches; all of the mesh's processes call this together, with the same arguments.

    Args:
      trained: all stages of the cascade, their parameters on the mesh.
      mesh: pictures are split over its `data` and `fsdp` axes, which divide `request.rows`.
      stages: which of them draw, in order.
      settings, sizes: of stage i, at [i]; a size is (height, width).
      lowres: what the first of `stages` enlarges, uint8 [count, h, w, 3]; None for a base stage.
      progress: show a bar, on process 0.

    Raises:
      UserError: a stage drew NaN, on any process.
    """
    rows, count = request.rows, request.count
    split = functools.partial(split_rows, mesh=mesh)
    null = {key: split(np.repeat(value, rows, axis=0)) for key, value in request.null.items()}
    total = math.ceil(count / rows) * len(stages)
    with tqdm(total=total, unit="batch", disable=not progress or jax.process_index() > 0) as bar:
        for start in range(0, count, rows):
            # The last batch repeats its last picture, so that it's no shape of its own.
            take = np.minimum(np.arange(start, start + rows), count - 1)
            text = {
                key: split(value[take // request.images]) for key, value in request.text.items()
            }
            pictures = None if lowres is None else split(lowres[take])
            indices = split((request.first_index + take).astype(np.uint32))
            drawn = []
            for i in stages:
                compiles = "" if start else " (compiling, unless it was before)"
                bar.set_description(f"stage {i}, {sizes[i][1]}×{sizes[i][0]}{compiles}")
                keys = picture_keys(np.uint32(request.seed), indices, np.uint32(i))
                pictures = _draw(trained[i], i, text, null, pictures, keys, settings[i], sizes[i])
                drawn.append(pictures)
                bar.update()
            yield Batch(start, min(rows, count - start), drawn)


def _draw(trained, index, cond, null, lowres, keys, settings, size) -> jax.Array:
    """One batch of one stage, uint8."""
    stage, params, _ = trained
    # What is traced is no part of the program's key. A weight of 1 is: it takes half the work,
    # but for a student that takes any weight so.
    traced = {"aug_level": "aug_level"}
    if settings.guidance != 1.0 or stage.embeds_guidance:
        traced["guidance"] = "guidance_weight"
    program = FrozenConfigDict({k: v for k, v in settings.items() if k not in traced})
    values = {name: float(settings[key]) for key, name in traced.items()}
    if not stage.is_base:
        cond = {**cond, "lowres": _as_floats(lowres)}
    x = stage.draw(params, cond, null, keys, program, size, **values)
    pictures, finite = _as_bytes(x, cond["text_emb"].sharding.mesh)
    if not finite:
        raise UserError(
            f"Stage {index} drew NaN, with guidance {settings.guidance:g} and "
            f"{settings.steps} steps; lower the guidance or train the stage anew."
        )
    return pictures


@functools.partial(jax.jit, static_argnums=1)
def _as_bytes(x: jax.Array, mesh: Mesh) -> tuple[jax.Array, jax.Array]:
    """`images.to_uint8` where the pictures are, and whether every number is finite, for all."""
    rounded = jnp.rint(jnp.clip((x + 1.0) * 127.5, 0.0, 255.0)).astype(jnp.uint8)
    finite = jax.lax.with_sharding_constraint(jnp.isfinite(x).all(), replicated(mesh))
    return jax.lax.with_sharding_constraint(rounded, batch_sharding(mesh)), finite


@jax.jit
def _as_floats(pictures: jax.Array) -> jax.Array:
    """`images.to_float` where the pictures are, from a table: the same bits on any device."""
    return jnp.asarray(to_float(np.arange(256)))[pictures]


@jax.jit
def picture_keys(seed: jax.Array, indices: jax.Array, stage: jax.Array) -> jax.Array:
    """One key a picture, [B]: fold_in(fold_in(key(seed), index), stage).

    Args:
      seed, stage: uint32, scalars.
      indices: uint32 [B], the pictures' numbers, see `Request.first_index`.
    """
    key = jax.random.key(seed)
    return jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(key, i), stage))(indices)

"""T5's published weights, into a module's parameters on a mesh, and out again.

Both go tensor by tensor, so that the host holds one tensor (on a mesh, this process's shards of
one) and never the model.
"""

import functools
import hashlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from cascade.errors import UserError
from cascade.files import write_whole
from cascade.interop.folders import Weights, rows, write_weights
from cascade.networks.t5 import PUBLISHED, RULES, T5, published
from cascade.parallel.rules import shardings
from cascade.shards import named

EMBEDDING = "encoder.embed_tokens.weight"  # the embedding's other name; files have one or both
DECODER = ("decoder.", "lm_head.")  # what whole T5s have besides


class T5Tensors:
    """An encoder's tensors under their published names, in the dtypes that the module has.

    Attributes:
      specs: published name → shape and dtype, every tensor the module needs.

    Raises:
      UserError: the weights lack a tensor, one has another shape, or the encoder has more than the
        module, such as more layers.
    """

    def __init__(self, t5: T5, weights: Weights):
        self._weights = weights
        self.specs = published_specs(t5)
        for name in weights.names():
            if name not in self.specs and name != EMBEDDING and not name.startswith(DECODER):
                raise UserError(
                    f"The text encoder's weights have the tensor {name!r}, which its config.json"
                    " knows nothing of; take both from one source."
                )
        for name, spec in self.specs.items():
            shape, dtype = weights.shape(self._source(name)), weights.dtype(self._source(name))
            if shape != spec.shape or dtype.kind == "i":
                raise UserError(
                    f"The text encoder's weight {name!r} is {dtype.name} of the shape {shape} where"
                    f" its config.json means numbers of the shape {spec.shape}; take both from one"
                    " source."
                )

    def _source(self, name: str) -> str:
        """The name that the files have for a tensor."""
        other = name == PUBLISHED["embedding"] and name not in self._weights.names()
        return EMBEDDING if other else name

    def read(self, name: str, part: tuple[slice, ...] = ()) -> np.ndarray:
        """A tensor or a part of it, rounded to the module's dtype piece by piece."""
        spec, source = self.specs[name], self._source(name)
        if self._weights.dtype(source) == spec.dtype:
            return self._weights.read(source, part)
        bounds = [s.indices(n)[:2] for s, n in zip(part, spec.shape, strict=False)]
        bounds = bounds or [(0, n) for n in spec.shape]
        value = np.empty([stop - start for start, stop in bounds], spec.dtype)
        for piece in rows(value.shape, self._weights.dtype(source).itemsize):
            inside = tuple(
                slice(low + s.start, low + s.stop)
                for s, (low, _) in zip(piece, bounds, strict=True)
            )
            value[piece] = self._weights.read(source, inside)
        return value

    def digest(self) -> str:
        """sha256 of all names, shapes, dtypes and values, however they are split into files.

        Raises:
          UserError: a value isn't finite.
        """
        digest = hashlib.sha256()
        for name, spec in tqdm(self.specs.items(), "Hashing the text encoder", delay=2):
            digest.update(f"{name} {spec.shape} {spec.dtype.name}\n".encode())
            for part in rows(spec.shape, spec.dtype.itemsize):
                values = np.ascontiguousarray(self.read(name, part))
                if not np.isfinite(values).all():
                    raise _not_finite(name)
                digest.update(values.view(np.uint8).data)
        return digest.hexdigest()


def abstract_params(t5: T5) -> dict:
    """Shapes and dtypes of the module's parameters, without computing any."""
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    mask = jax.ShapeDtypeStruct((1, 1), jnp.bool)
    return jax.eval_shape(t5.init, jax.random.key(0), ids, mask)["params"]


def published_specs(t5: T5) -> dict[str, jax.ShapeDtypeStruct]:
    """Published name → shape and dtype of every tensor that the module needs."""
    return {
        name: jax.ShapeDtypeStruct(spec.shape[1:] if _stacked(path) else spec.shape, spec.dtype)
        for path, spec in named(abstract_params(t5))
        for name in _names(path, spec)
    }


def _stacked(path: str) -> bool:
    return "{}" in PUBLISHED[path]


def _names(path: str, spec) -> list[str]:
    """The tensors that make a parameter: one a layer, or a single one."""
    return [PUBLISHED[path].format(i) for i in range(spec.shape[0] if _stacked(path) else 1)]


def read_params(t5: T5, tensors: T5Tensors, mesh: Mesh) -> dict:
    """The module's parameters, laid over the mesh as `RULES` say.

    A layer's tensor goes to the devices that hold its part of the stack, which is updated in
    place.

    Raises:
      UserError: a tensor holds NaN or infinity.
    """
    abstract = abstract_params(t5)
    laid = shardings(abstract, mesh, RULES)
    total = len(tensors.specs)
    with tqdm(total=total, desc="Loading the text encoder", unit="tensor", delay=2) as progress:
        leaves = [
            _read_leaf(tensors, path, spec, sharding, progress)
            for (path, spec), sharding in zip(named(abstract), jax.tree.leaves(laid), strict=True)
        ]
    return jax.tree.unflatten(jax.tree.structure(abstract), leaves)


def _read_leaf(tensors: T5Tensors, path: str, spec, sharding: NamedSharding, progress) -> jax.Array:
    """One parameter, its layers' tensors stacked on the devices."""

    def read(name: str, sharding: NamedSharding) -> jax.Array:
        held = {}  # devices that get the same part share one on the host

        def part(index: tuple[slice, ...]) -> np.ndarray:
            if str(index) not in held:
                held[str(index)] = tensors.read(name, index)
            return held[str(index)]

        array = jax.make_array_from_callback(tensors.specs[name].shape, sharding, part)
        if not _finite(array, NamedSharding(sharding.mesh, P())):
            raise _not_finite(name)
        progress.update()
        return array

    names = _names(path, spec)
    if not _stacked(path):
        return read(names[0], sharding)
    one = NamedSharding(sharding.mesh, P(*sharding.spec[1:]))
    stack = _zeros(spec.shape, spec.dtype, sharding)
    for i, name in enumerate(names):
        # Waiting keeps the host from reading ahead of the devices.
        stack = _put(stack, read(name, one), i, sharding).block_until_ready()
    return stack


def _not_finite(name: str) -> UserError:
    return UserError(f"The text encoder's weight {name!r} holds NaN or infinity; fetch it again.")


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _zeros(shape, dtype, sharding):
    return jax.lax.with_sharding_constraint(jnp.zeros(shape, dtype), sharding)


@functools.partial(jax.jit, static_argnums=3, donate_argnums=0)
def _put(stack, layer, i, sharding):
    stack = jax.lax.dynamic_update_index_in_dim(stack, layer, i, 0)
    return jax.lax.with_sharding_constraint(stack, sharding)


@functools.partial(jax.jit, static_argnums=1)
def _finite(array, sharding):
    return jax.lax.with_sharding_constraint(jnp.isfinite(array).all(), sharding)


def write_t5(folder: Path, t5: T5, tensors: T5Tensors) -> list[str]:
    """Writes config.json and the weights, in the module's dtypes, and returns the files' names."""
    write_whole(folder / "config.json", json.dumps(published(t5), indent=1))
    return ["config.json", *write_weights(folder, "model", tensors.specs, tensors.read)]

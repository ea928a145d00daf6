"""How a network's insides lie on a mesh, at the borders of its blocks.

XLA works out for itself where everything lies, but of several ways it may choose one that sends
many times the bytes: it splits activations by channel where weights are split so, and reduces
gradients whole before it splits them. A `Layout`, given to a network, says it at each block:
activations stay split by picture, and a block's weights are gathered whole, as what they are
multiplied as, just before they are used, their gradients reduced and scattered just after
(Rajbhandari et al. 2020, ZeRO stage 3).
"""

import dataclasses
import functools

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cascade.parallel.mesh import batch_sharding
from cascade.parallel.rules import Rules, mesh_axes, spec_of


@dataclasses.dataclass(frozen=True)
class Layout:
    """What a network is told of the mesh; hashable, so that it can be a module's attribute.

    Attributes:
      mesh: the mesh.
      rules: those by which its parameters are laid out, a tuple.
    """

    mesh: Mesh
    rules: Rules = ()

    @classmethod
    def of(cls, mesh: Mesh, rules: Rules = ()) -> "Layout | None":
        """A mesh's layout; None for a single device, where there is nothing to say."""
        return None if mesh.size == 1 else cls(mesh, tuple(rules))

    def by_picture(self, x: jax.Array) -> jax.Array:
        """An array [B, …], split by its first axis alone."""
        return jax.lax.with_sharding_constraint(x, batch_sharding(self.mesh))

    def gathered(self, params, path: str, dtype, stacked: int = 0):
        """The parameters of one block, whole along `fsdp`; those split over `tensor` stay so.

        Args:
          params: the block's.
          path: of the block in the network's, by which the rules know it below "params/".
          dtype: what those that are split are multiplied as, and gathered as.
          stacked: where this is one of several blocks, stacked along a first axis, how many.
        """

        def gather(leaf_path, leaf):
            name = f"params/{path}/{jax.tree_util.keystr(leaf_path, simple=True, separator='/')}"
            shape = (stacked, *leaf.shape) if stacked else leaf.shape
            spec = spec_of(name, shape, self.mesh, self.rules)
            split = P(*spec[1:]) if stacked else spec
            if "fsdp" not in jax.tree.leaves(tuple(split)):
                return leaf
            return gathered(leaf.astype(dtype), self.mesh, split)

        return jax.tree_util.tree_map_with_path(gather, params)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gathered(weights: jax.Array, mesh: Mesh, split: P) -> jax.Array:
    """Weights laid out as `split`, made whole along `fsdp`; their gradient is laid out as `split`.

    The gradient of a mere constraint would be whole, an all-reduce, before it is split.
    """
    whole = P(*(tuple(axis for axis in mesh_axes(e) if axis != "fsdp") for e in split))
    return jax.lax.with_sharding_constraint(weights, NamedSharding(mesh, whole))


def _forward(weights, mesh, split):
    return gathered(weights, mesh, split), None


def _backward(mesh, split, _, gradient):
    return (jax.lax.with_sharding_constraint(gradient, NamedSharding(mesh, split)),)


gathered.defvjp(_forward, _backward)

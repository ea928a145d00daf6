"""What a network costs: parameters and floating-point operations, counted without running it.

Operations are those of matrix products and convolutions, two a multiply-add, with the taps that
fall on padding: the work an accelerator's matrix units are given. XLA's own count leaves the
padding out, and the elementwise rest is memory traffic rather than arithmetic.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr

REST = "ends"


class LevelCost(NamedTuple):
    """One row of `describe`: a level on one way, "middle", or "ends" (all outside the levels).

    Attributes:
      level: top-level name in the parameters, "down_0".
      height, width: pixels the level's blocks work on, padding included.
      channels: of its blocks.
      parameters: how many numbers it holds.
      flops: operations of a forward pass over the batch it was described with.
    """

    level: str
    height: int
    width: int
    channels: int
    parameters: int
    flops: float


def count(fn: Callable, *args: Any, groups: Collection[str] = ()) -> Counter[str]:
    """Counts the operations of `fn(*args)`, also where it differentiates: a whole training step.

    Args:
      fn: traced, not run.
      *args: arrays or `jax.ShapeDtypeStruct`s.
      groups: module names to count apart; operations outside them count as "ends". A module
        inside two of them counts to the outer one.

    Returns:
      group -> operations; `.total()` sums them. Scans count times their length, the dearest
      branch of a `cond` counts, and fused attention kernels (cuDNN's) aren't seen: count with
      `attention_implementation="xla"`.

    Raises:
      ValueError: a matrix product sits in a loop whose length isn't known beforehand.
    """
    return _count(jax.make_jaxpr(fn)(*args).jaxpr, frozenset(groups), REST)


def describe(network: Any, *args: Any) -> list[LevelCost]:
    """Counts parameters and forward operations of a `UNet` level by level.

    Args:
      network: a `UNet`.
      *args: what it is called with, (z_t, logsnr, cond), as arrays or `jax.ShapeDtypeStruct`s.
    """
    plain = network.clone(attention_implementation="xla")
    variables = jax.eval_shape(plain.init, jax.random.key(0), *args)
    _, height, width, _ = args[0].shape
    levels = network.levels(height, width)
    flops = count(plain.apply, variables, *args, groups=levels)
    sizes = Counter()
    for name, tree in variables["params"].items():
        leaves = jax.tree.leaves(tree)
        sizes[name if name in levels else REST] += sum(math.prod(leaf.shape) for leaf in leaves)
    ends = (*network.padded(height, width), network.channels * network.channel_mults[0])
    levels = {REST: ends} | levels
    return [LevelCost(name, *shape, sizes[name], flops[name]) for name, shape in levels.items()]


def _count(jaxpr: Jaxpr, groups: frozenset[str], group: str) -> Counter[str]:
    """Counts one jaxpr whose caller is in `group`."""
    total = Counter()
    for eqn in jaxpr.eqns:
        where = group
        if group == REST:
            words = re.split(r"\W+", str(eqn.source_info.name_stack))
            where = next((word for word in words if word in groups), REST)
        kind = eqn.primitive.name
        if kind == "dot_general":
            total[where] += _dot_general(eqn)
        elif kind == "conv_general_dilated":
            total[where] += _convolution(eqn)
        else:
            inner = [_count(each, groups, where) for each in _nested(eqn.params)]
            if kind == "while" and any(each.total() for each in inner):
                raise ValueError("A loop of unknown length can't be counted; use lax.scan.")
            if kind == "cond":
                inner = [max(inner, key=Counter.total)]
            times = eqn.params["length"] if kind == "scan" else 1
            for each in inner:
                total.update({name: times * flops for name, flops in each.items()})
    return total


def _nested(params: dict[str, Any]) -> list[Jaxpr]:
    """The jaxprs among an equation's parameters."""
    found = []
    for value in params.values():
        for each in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(each, (ClosedJaxpr, Jaxpr)):
                found.append(getattr(each, "jaxpr", each))
    return found


def _dot_general(eqn: Any) -> float:
    """2 · (size of the result) · (length of each sum)."""
    (contracted, _), _ = eqn.params["dimension_numbers"]
    lhs = eqn.invars[0].aval
    return 2.0 * eqn.outvars[0].aval.size * math.prod(lhs.shape[d] for d in contracted)


def _convolution(eqn: Any) -> float:
    """2 · (size of the result) · (taps and input channels that each output channel sums)."""
    kernel = eqn.invars[1].aval
    features = kernel.shape[eqn.params["dimension_numbers"].rhs_spec[0]]
    return 2.0 * eqn.outvars[0].aval.size * kernel.size / features

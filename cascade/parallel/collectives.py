"""What chips send one another in one run of a compiled program, by kind."""

import math
import re
from collections.abc import Callable
from typing import NamedTuple

from cascade.parallel.hlo import Executed, Instruction, Module, continues, walk

# Bytes each chip sends, of an operand of b bytes in a group of n chips, at the least (a ring's):
# Patarasuk and Yuan 2009.
SENT: dict[str, Callable[[float, int], float]] = {
    "all-gather": lambda b, n: b * (n - 1),
    "all-reduce": lambda b, n: 2 * b * (n - 1) / n,
    "reduce-scatter": lambda b, n: b * (n - 1) / n,
    "all-to-all": lambda b, n: b * (n - 1) / n,
    "ragged-all-to-all": lambda b, n: b * (n - 1) / n,
    "collective-permute": lambda b, n: b,
    "collective-broadcast": lambda b, n: b,
}
BETWEEN = "between slices"  # kind of what goes over the data centre's network


class Traffic(NamedTuple):
    """Of one kind of collective in one run of the program.

    Attributes:
      bytes: that one chip sends.
      calls: how many are run.
    """

    bytes: float
    calls: int


def collectives(module: Module, devices: int, slices: int = 1) -> dict[str, Traffic]:
    """Kind -> what one chip sends, the most first.

    The TPU compiler writes a reduce-scatter as an all-reduce fused with a slice, and what goes
    between slices as a transfer through the host that its runtime carries out.

    Args:
      devices: how many run the program; the group of a collective that names none.
      slices: over how many of them the network is used.
    """
    found: dict[str, Traffic] = {}
    for executed in walk(module):
        kind = executed.instruction.opcode.removesuffix("-start")
        if kind == "send" and "_xla_megascale_" in executed.instruction.attributes:
            reduces = "ALL_REDUCE" in executed.instruction.attributes
            size = _operand_bytes(executed)
            kind, sent = BETWEEN, SENT["all-reduce"](size, slices) if reduces else size
        elif kind in SENT and not continues(executed.instruction):
            if kind == "all-reduce" and executed.fusion is not None and _scatters(executed):
                kind = "reduce-scatter"
            group = group_size(executed.instruction, devices)
            sent = SENT[kind](_operand_bytes(executed), group)
        else:
            continue
        before = found.get(kind, Traffic(0.0, 0))
        times = executed.times
        found[kind] = Traffic(before.bytes + times * sent, before.calls + times)
    return dict(sorted(found.items(), key=lambda item: -item[1].bytes))


def _operand_bytes(executed: Executed) -> float:
    """Of all operands; a send's second one, a token, has none."""
    lines = executed.computation.instructions
    return sum(a.bytes for name in executed.instruction.operands for a in lines[name].results)


def _scatters(executed: Executed) -> bool:
    """Whether the fusion gives less than the reduction in it does."""
    reduced = sum(array.bytes for array in executed.instruction.results)
    return sum(array.bytes for array in executed.fusion.results) < reduced


def group_size(instruction: Instruction, devices: int) -> int:
    """How many chips take part in each of an instruction's groups.

    Groups are written as lists, `{{0,1},{2,3}}`, as a number and size of groups, `[2,4]<=[8]`, or
    as axes of a mesh, `mesh['a'=2,'b'=4] {'b'}`, where `'b':(2)2` is the part of b that has size 2.
    """
    groups = re.search(
        r"replica_groups=(\{\{([\d,]*)\}|\[\d+,(\d+)\]|mesh\[([^\]]*)\][^{]*\{([^}]*)\})",
        instruction.attributes,
    )
    if groups is None:
        return devices
    if groups[2] is not None:
        return len(groups[2].split(",")) if groups[2] else devices
    if groups[3] is not None:
        return int(groups[3])
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", groups[4])}
    axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", groups[5])
    return math.prod(int(part) if part else sizes[name] for name, part in axes)


def ideal_bytes(sharded: float, whole: float, fsdp: int, data: int) -> float:
    """What one chip must send at least to train so: bfloat16 weights and gradients.

    Parameters split over `fsdp` are gathered twice, for the way forward and back, and their
    gradients are reduced and scattered once, then all-reduced over `data`; gradients of those that
    are whole on every chip are all-reduced over both.

    Args:
      sharded, whole: how many parameters are split, and aren't.
    """
    gather = 2 * SENT["all-gather"](2 * sharded / fsdp, fsdp)
    scatter = SENT["reduce-scatter"](2 * sharded, fsdp)
    between = SENT["all-reduce"](2 * sharded / fsdp, data)
    return gather + scatter + between + SENT["all-reduce"](2 * whole, fsdp * data)

"""Reads the text of a compiled XLA program: what runs, how often, and the memory it moves.

Of the text (`Compiled.as_text()`), only what plans need is understood: computations, instructions,
their shapes, operands and what they call. Loops must count up to a constant, as scans do.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_SHAPE = re.compile(r"([a-z]+\d*\w*)\[([\d,]*)\](\{[^}]*\})?")
_BITS = re.compile(r"[a-z]+(\d+)")
# Names for other instructions' results, and what moves nothing by itself.
_FREE = frozenset(
    {
        "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
        "call", "after-all", "partition-id", "replica-id", "iota", "opt-barrier", "async-start",
        "add-dependency", "domain",
    }
)  # fmt: skip
_ROUNDS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


class Array(NamedTuple):
    """One array: bytes without padding, and whether it lies in fast memory on the chip (VMEM)."""

    bytes: float
    on_chip: bool


class Instruction(NamedTuple):
    """One line of a program.

    Attributes:
      name: unique in its computation.
      opcode: "fusion", "all-gather-start".
      results: the arrays it gives, tuples flattened.
      operands: names of the instructions it takes.
      attributes: the rest of the line, from the operands on.
    """

    name: str
    opcode: str
    results: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str

    def called(self, key: str) -> str | None:
        """The computation that an attribute names: `calls=%fused_computation.3`."""
        match = re.search(rf"\b{key}=%?([\w.\-]+)", self.attributes)
        return match[1] if match else None


class Computation(NamedTuple):
    """Instructions by name, in order; `root` is the last one's name, its result."""

    instructions: dict[str, Instruction]
    root: str


class Module(NamedTuple):
    """A program: its computations by name, and which is run."""

    computations: dict[str, Computation]
    entry: str


class Executed(NamedTuple):
    """An instruction, the computation it stands in, how often it runs, and in which fusion."""

    instruction: Instruction
    computation: Computation
    times: int
    fusion: Instruction | None


def arrays(text: str) -> tuple[Array, ...]:
    """The arrays of a shape: `bf16[8,128]{1,0:T(8,128)S(1)}`, or a tuple of such.

    Layouts may nest parentheses, never braces. Sub-byte types count their bits.
    """
    found = []
    for dtype, dims, layout in _SHAPE.findall(text):
        bits = 8 if dtype == "pred" else int(_BITS.match(dtype)[1]) if _BITS.match(dtype) else 0
        size = math.prod(int(d) for d in dims.split(",") if d)
        found.append(Array(size * bits / 8, "S(1)" in layout))
    return tuple(found)


def parse(text: str) -> Module:
    """Reads a whole program.

    Raises:
      ValueError: there is no entry computation in it.
    """
    computations, entry, name, lines, root = {}, None, None, {}, None
    for line in text.splitlines():
        if name is None:
            header = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line)
            if header and not line.startswith((" ", "HloModule")):
                name, lines, root = header[2], {}, None
                entry = name if header[1] else entry
        elif line.startswith("}"):
            computations[name], name = Computation(lines, root), None
        elif " = " in line:
            instruction = _instruction(line)
            lines[instruction.name] = instruction
            root = instruction.name if line.lstrip().startswith("ROOT") or root is None else root
    if entry is None:
        raise ValueError("This is no text of an XLA program: it has no ENTRY computation.")
    return Module(computations, entry)


def _instruction(line: str) -> Instruction:
    """`[ROOT] %name = shape opcode(operands), attributes`."""
    name, rest = line.strip().removeprefix("ROOT ").split(" = ", 1)
    end = _closing(rest) if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    closing = opening + _closing(rest[opening:])
    operands = re.findall(r"%([\w.\-]+)", rest[opening:closing])
    return Instruction(
        name.lstrip("%"), rest[:opening], arrays(shape), tuple(operands), rest[opening + 1 :]
    )


def _closing(text: str) -> int:
    """Just after the parenthesis that closes the one `text` begins with."""
    depth = 0
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.end()
    raise ValueError(f"unbalanced parentheses in {text[:80]!r}")


def walk(module: Module) -> Iterator[Executed]:
    """All that runs, with how often: a loop's body as often as it goes round.

    Of a conditional every branch counts once.
    """

    def visit(name, times, fusion):
        computation = module.computations[name]
        for instruction in computation.instructions.values():
            yield Executed(instruction, computation, times, fusion)
            if instruction.opcode == "while":
                body = instruction.called("body")
                yield from visit(body, times * trips(instruction, module), fusion)
            elif instruction.opcode == "fusion":
                yield from visit(instruction.called("calls"), times, instruction)
            elif instruction.opcode in ("call", "async-start"):
                inner = instruction.called("to_apply") or instruction.called("calls")
                yield from visit(inner, times, fusion)
            elif instruction.opcode == "conditional":
                branches = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
                keys = ("true_computation", "false_computation")
                names = re.findall(r"%?([\w.\-]+)", branches[1]) if branches else None
                for inner in names or [instruction.called(key) for key in keys]:
                    yield from visit(inner, times, fusion)

    return visit(module.entry, 1, None)


def trips(loop: Instruction, module: Module) -> int:
    """How often a loop goes round: XLA's own word, or the constant its counter is compared with.

    Raises:
      ValueError: neither is there, as in a loop that waits for a value.
    """
    said = _ROUNDS.search(loop.attributes)
    if said:
        return int(said[1])
    condition = module.computations[loop.called("condition")]
    limits = [
        int(match[1])
        for line in condition.instructions.values()
        if line.opcode == "constant" and (match := re.match(r"(\d+)\)", line.attributes))
    ]
    if len(limits) != 1:
        raise ValueError(f"the loop {loop.name} has no constant number of rounds")
    return limits[0]


def traffic(module: Module) -> float:
    """Bytes that a chip's memory (HBM) is read and written by one run of the program.

    Each instruction reads its operands and writes its results once; what lies in VMEM is free, of
    an array that a fusion only slices the slice counts, and of one that it updates in place the
    update.
    """
    total = 0.0
    for instruction, computation, times, fusion in walk(module):
        free = instruction.opcode in _FREE or instruction.opcode.endswith("-done")
        if fusion is None and not free:
            total += times * _moved(instruction, computation, module)
    return total


def _moved(instruction: Instruction, computation: Computation, module: Module) -> float:
    """Bytes of HBM that one instruction reads and writes."""
    taken = [computation.instructions[name].results for name in instruction.operands]
    read = [_in_memory(results) for results in taken]
    if instruction.opcode == "fusion":
        inner = module.computations[instruction.called("calls")]
        return _fused(instruction, inner, read)
    if instruction.opcode == "dynamic-slice":
        return 2 * _in_memory(instruction.results)
    if instruction.opcode == "dynamic-update-slice":
        return 2 * read[1]
    if instruction.opcode in ("send", "recv"):  # give (source or target, context, token)
        return _in_memory(instruction.results[:1])
    if instruction.opcode == "copy-start":  # gives (target, source, context)
        return sum(read) + _in_memory(instruction.results[:1])
    if instruction.opcode.endswith("-start"):  # gives (source, target, contexts)
        return sum(read) + _in_memory(instruction.results[1:2])
    return sum(read) + _in_memory(instruction.results)


def _fused(fusion: Instruction, inner: Computation, read: list[float]) -> float:
    """Bytes of HBM that a fusion reads and writes; `read` is the size of each operand there."""
    passed_on = {line.name for line in inner.instructions.values() if continues(line)}
    if passed_on:
        passed_on.add(inner.root)
    users = {name: [] for name in inner.instructions}
    for line in inner.instructions.values():
        if line.name not in passed_on:
            for position, name in enumerate(line.operands):
                users[name].append((position, line))
    total = 0.0
    for line in inner.instructions.values():
        if line.opcode != "parameter":
            continue
        size = read[int(re.match(r"(\d+)", line.attributes)[1])]
        uses = users[line.name]
        ways = {(at, use.opcode) for at, use in uses}
        if ways == {(0, "dynamic-slice")}:
            size = min(size, sum(array.bytes for _, use in uses for array in use.results))
        elif ways == {(0, "dynamic-update-slice")} or (passed_on and not uses):
            size = 0.0
        total += size
    return total + _written(fusion, inner, passed_on)


def _written(fusion: Instruction, inner: Computation, passed_on: set[str]) -> float:
    """Bytes of HBM that a fusion writes, those left out that a collective on its way passes on."""
    root = inner.instructions[inner.root]
    if passed_on:
        made = (inner.instructions[name] for name in root.operands if root.opcode == "tuple")
        return sum(
            _in_memory(line.results)
            for line in made
            if line.opcode != "parameter" and line.name not in passed_on
        )
    if "AsyncCollectiveStart" in root.attributes:  # gives (source, target, flags)
        return _in_memory(fusion.results[1:2])
    written = _in_memory(fusion.results)
    if root.opcode == "dynamic-update-slice" and written:
        return sum(a.bytes for a in inner.instructions[root.operands[1]].results)
    return written


def continues(instruction: Instruction) -> bool:
    """Whether this is a later part of a collective that was begun before.

    The TPU compiler spreads a collective over fusions that do other work meanwhile, and writes it
    into each of them, under one channel; the first one's flag is -1.
    """
    flag = re.search(r'"flag_start":"(-?\d+)"', instruction.attributes)
    return flag is not None and flag[1] != "-1"


def _in_memory(results: tuple[Array, ...]) -> float:
    return sum(array.bytes for array in results if not array.on_chip)

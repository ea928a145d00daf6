"""What the TPU compiler knows of a program before it makes machine code of it.

Where every array lies and what is sent is settled then, in a tenth of the time that the whole
takes for a large network: the rest is spent on each fusion's instructions. The compiler has no way
to be asked for that much, but it leaves each phase's result in a folder if it is told to. So the
results are taken from there, and the process that compiles is ended.
"""

import pathlib
import re
import threading
import time
from typing import NamedTuple

from cascade.errors import UserError

# Written last before machine code is made; what LAYOUT and PROGRAM name is whole by then.
MARK = "after_optimizations_after_buffer_assignment.txt"
LAYOUT = "after_optimizations-buffer-assignment.txt"
PROGRAM = "after_optimizations.txt"


class Memory(NamedTuple):
    """Bytes of one chip's memory, and of its machine code, None where that wasn't made.

    Attributes:
      argument: what the program is given.
      donated: results that take an argument's place.
      result: results that don't.
      temporary: all that lives in between, laid out by the compiler.
      code: machine code.
    """

    argument: int
    donated: int
    result: int
    temporary: int
    code: int | None = None


def flags(folder: str) -> str:
    """What XLA_FLAGS must say before jax is imported, for `compile_until_code`."""
    return f"--xla_dump_to={folder} --xla_dump_hlo_as_text"


def compile_until_code(lowered, folder: str) -> tuple[Memory, str]:
    """Compiles until memory is laid out, in a process that was started with `flags(folder)`.

    The compiler goes on in a thread of its own: end the process once nothing else is wanted of it.

    Args:
      lowered: a `jax.stages.Lowered` for TPUs, the first that this process compiles for them.

    Returns:
      A chip's memory, and the program as HLO text.

    Raises:
      jax.errors.JaxRuntimeError: the compiler's refusal.
      UserError: this libtpu leaves other files than the ones this was written for.
    """
    failed: list[Exception] = []

    def compile_all():
        try:
            lowered.compile()
        except Exception as error:  # handed on to the caller's thread
            failed.append(error)

    compiling = threading.Thread(target=compile_all, daemon=True)
    compiling.start()
    while True:
        at_work = compiling.is_alive()  # asked before looking, so that nothing is missed
        if failed:
            raise failed[0]
        marks = list(pathlib.Path(folder).glob(f"*{MARK}"))
        if marks:
            stem = str(marks[0]).removesuffix(MARK)
            layout, program = (pathlib.Path(stem + name) for name in (LAYOUT, PROGRAM))
            return read_layout(layout.read_text("utf-8")), program.read_text("utf-8")
        if not at_work:
            raise UserError(
                "This libtpu doesn't say where it lays out memory; plan with --machine-code, which "
                "takes longer."
            )
        time.sleep(0.1)


def read_layout(text: str) -> Memory:
    """Sums the allocations of a buffer assignment, as XLA writes it.

    An allocation's line tells its size, its "color" where it isn't in the chip's main memory, and
    what it is for: a parameter, "maybe-live-out" (a result), "preallocated-temp".
    """
    sums = dict.fromkeys(("argument", "donated", "result", "temporary"), 0)
    for line in re.findall(r"^allocation \d+: (.*):$", text, re.MULTILINE):
        parts = line.split("|")  # around a shape, where one is told
        before, after = parts[0], parts[-1]
        size = int(re.match(r"size (\d+)", before)[1])
        if ", color " in before:
            continue
        parameter, result = ", parameter " in before, ", maybe-live-out" in after
        sums["argument"] += size * parameter
        sums["donated"] += size * (parameter and result)
        sums["result"] += size * (result and not parameter)
        sums["temporary"] += size * (", preallocated-temp" in after)
    return Memory(**sums)

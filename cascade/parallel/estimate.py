"""From what a compiled step takes to what it would cost: lower bounds, speed, days; as text.

All of these are estimates. A bound is the time that one resource needs if it never waits; a step
takes at least the longest, and in practice more.
"""

from typing import NamedTuple

from cascade.parallel.collectives import BETWEEN
from cascade.parallel.plan import Measured
from cascade.parallel.topology import KINDS, Chip

DAY = 86_400
# Bytes that machine code is assumed to take where none was made: the 2B base stage's on v5p took
# 0.57e9, the others' less.
MACHINE_CODE = 0.6e9


class Estimate(NamedTuple):
    """What a step would cost, or one batch drawn.

    Attributes:
      bounds: resource -> seconds it needs at the least; empty where the chip isn't known.
      seconds: the longest bound, with arithmetic at the assumed utilisation rather than at peak;
        None where there are no bounds.
      images_per_second: at that speed.
      fits: whether its peak fits the chip's memory, with MACHINE_CODE where none was made; None
        where either isn't known.
      capacity: bytes of a chip's memory; None where it isn't known.
    """

    bounds: dict[str, float]
    seconds: float | None
    images_per_second: float | None
    fits: bool | None
    capacity: float | None

    @property
    def binds(self) -> str:
        """The resource with the longest bound."""
        return max(self.bounds, key=self.bounds.get)


def estimate(measured: Measured, batch: int, utilisation: float) -> Estimate:
    """Sets what was measured against what the chip can do.

    Args:
      utilisation: model FLOPs done over peak FLOPs, 0 to 1, that is assumed of the step.
    """
    chip = KINDS.get(measured.device_kind)
    capacity = measured.device_bytes or (chip.hbm_bytes if chip else None)
    if measured.sent is None:
        return Estimate({}, None, None, False, capacity)
    needed = measured.peak_bytes + (MACHINE_CODE if measured.code_bytes is None else 0.0)
    fits = None if capacity is None else needed <= capacity
    if chip is None:
        return Estimate({}, None, None, fits, capacity)
    bounds = _bounds(measured, chip)
    useful = measured.model_flops / measured.devices / chip.flops / utilisation
    seconds = max(useful, *bounds.values())
    return Estimate(bounds, seconds, batch / seconds, fits, capacity)


def _bounds(measured: Measured, chip: Chip) -> dict[str, float]:
    """Seconds that each resource needs at the least."""
    sent = {kind: size for kind, (size, _) in measured.sent.items()}
    between = sent.pop(BETWEEN, 0.0)
    bounds = {
        "arithmetic": measured.flops / measured.devices / chip.flops,
        "memory": measured.traffic_bytes / chip.hbm_bandwidth,
        "interconnect": sum(sent.values()) / chip.link_bandwidth,
    }
    if between and chip.network_bandwidth:
        bounds["network"] = between / chip.network_bandwidth
    return bounds


def report(
    measured: Measured,
    *,
    what: str,
    where: str,
    batch: int,
    steps: int | None,
    utilisation: float,
) -> str:
    """The plan as text.

    Args:
      what, where: of the title: "training of base64_2b.py", "v5p-512".
      batch: pictures a step.
      steps: of the whole training; None for a sampler, which has none.
    """
    found = estimate(measured, batch, utilisation)
    unit = "batch" if steps is None else "step"
    mesh = ", ".join(f"{axis}={size}" for axis, size in measured.mesh.items())
    lines = [
        f"{what} on {where}: {measured.devices} × {measured.device_kind}, mesh {mesh}, "
        f"batch {batch}",
        "Estimates from the compiled program; nothing was run.",
        "",
        _row("parameters", f"{measured.parameters:,}"),
        _row(f"FLOPs a {unit}", _flops_text(measured)),
        *_memory_rows(measured, found),
    ]
    if measured.sent is not None:
        lines += _sent_rows(measured, steps is not None)
        lines += _time_rows(found, unit, steps, utilisation)
    lines += [
        _row("compiling", f"{measured.compile_seconds:.0f} s and "
             f"{measured.host_bytes / 1e9:.1f} GB of this machine's memory"),
    ]  # fmt: skip
    return "\n".join(lines)


def _flops_text(measured: Measured) -> str:
    text = _flops(measured.model_flops)
    if measured.flops > 1.01 * measured.model_flops:
        text += f"; {_flops(measured.flops)} with what is computed twice"
    return text


def _memory_rows(measured: Measured, found: Estimate) -> list[str]:
    """Peak, verdict, and the peak's parts."""
    verdict = {True: "fits", False: "does not fit", None: "its memory isn't known"}[found.fits]
    of = f" of {_size(found.capacity)}" if found.capacity else ""
    rows = [_row("memory a chip", f"{_size(measured.peak_bytes)}{of}: {verdict}")]
    if measured.sent is None:
        return [*rows, _row("", "the compiler refused it, so no more is known")]
    parts = ("argument", "temporary", "result", "code")
    sizes = {part: getattr(measured, f"{part}_bytes") for part in parts}
    text = ", ".join(f"{part} {_size(size)}" for part, size in sizes.items() if size is not None)
    rows.append(_row("", f"{text}; {_size(measured.donated_bytes)} donated"))
    if measured.code_bytes is None:
        rows.append(_row("", f"and machine code, {_size(MACHINE_CODE)} assumed of it"))
    return rows


def _sent_rows(measured: Measured, training: bool) -> list[str]:
    """What a chip sends, by kind; for training, against the least that its mesh needs."""
    rows = [
        _row(f"  {kind}", f"{_size(size)} in {calls:,} calls")
        for kind, (size, calls) in measured.sent.items()
    ]
    total = sum(size for size, _ in measured.sent.values())
    text = _size(total)
    if training and measured.ideal_bytes:
        text += f", {total / measured.ideal_bytes:.2f} × the least ({_size(measured.ideal_bytes)})"
    return [_row("sent by a chip", text), *rows]


def _time_rows(found: Estimate, unit: str, steps: int | None, utilisation: float) -> list[str]:
    """Bounds, and speed at the assumed utilisation."""
    if not found.bounds:
        return [_row("time", "no bounds: what this chip can do isn't known")]
    rows = [
        _row(f"{name} bound", f"{1e3 * seconds:,.1f} ms" + (", binds" * (name == found.binds)))
        for name, seconds in found.bounds.items()
    ]
    text = f"{1e3 * found.seconds:,.1f} ms a {unit}, {found.images_per_second:,.1f} images a second"
    if steps is not None:
        text += f", {steps * found.seconds / DAY:,.1f} days for {steps:,} steps"
    return [*rows, _row(f"at {utilisation:.0%} use", f"{text} (assumed)")]


def _row(name: str, value: str) -> str:
    return f"{name:<22}{value}"


def _size(size: float) -> str:
    """Bytes in decimal units."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if size >= factor:
            return f"{size / factor:,.2f} {unit}"
    return f"{size / 1e3:,.1f} kB"


def _flops(count: float) -> str:
    for unit, factor in (("PFLOP", 1e15), ("TFLOP", 1e12)):
        if count >= factor:
            return f"{count / factor:,.2f} {unit}"
    return f"{count / 1e9:,.2f} GFLOP"

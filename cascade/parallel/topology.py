"""TPU topologies by the names they are rented under, and what their chips can do."""

import math
import re
from typing import NamedTuple

from cascade.errors import UserError

LOCAL = "local"  # the devices that are here


class Chip(NamedTuple):
    """What a chip can do at best, as its maker publishes it.

    Attributes:
      flops: bfloat16 operations a second, two a multiply-add.
      hbm_bytes: memory.
      hbm_bandwidth: bytes a second.
      link_bandwidth: bytes a second that one chip sends over all its links to others in its slice
        at once.
      network_bandwidth: bytes a second that one chip sends to other slices; None: not published.
    """

    flops: float
    hbm_bytes: float
    hbm_bandwidth: float
    link_bandwidth: float
    network_bandwidth: float | None


# Google's cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}, "System architecture". "Bidirectional ICI
# bandwidth" is halved here: a chip sends at half of it. The network's is a pod's, or a chip's
# where one is given: v5e 6.4 Tbit/s and v6e 25.6 Tbit/s a pod of 256, v5p 50 Gbit/s a chip.
CHIPS = {
    "v4": Chip(275e12, 32 * 2**30, 1228e9, 300e9, None),
    "v5e": Chip(197e12, 16 * 2**30, 819e9, 200e9, 3.125e9),
    "v5p": Chip(459e12, 95 * 2**30, 2765e9, 600e9, 6.25e9),
    "v6e": Chip(918e12, 32 * 2**30, 1640e9, 400e9, 12.5e9),
}

# `jax.Device.device_kind` -> chip. NVIDIA's are the SXM boards' of its A100, H100 and H200 data
# sheets: dense bfloat16, NVLink halved to one direction.
KINDS = {
    "TPU v4": CHIPS["v4"],
    "TPU v5 lite": CHIPS["v5e"],
    "TPU v5": CHIPS["v5p"],
    "TPU v6 lite": CHIPS["v6e"],
    "NVIDIA A100-SXM4-80GB": Chip(312e12, 80e9, 2039e9, 300e9, None),
    "NVIDIA H100 80GB HBM3": Chip(989e12, 80e9, 3350e9, 450e9, None),
    "NVIDIA H200": Chip(989e12, 141e9, 4800e9, 450e9, None),
}

# Slices that can be rented: chips -> how they are wired. From the same pages.
_PLANES = {
    chips: shape
    for shape in ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
    for chips in (math.prod(shape),)
}
_CUBES = {
    chips: shape
    for shape in (
        (2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8), (4, 8, 8), (8, 8, 8),
        (8, 8, 16), (8, 16, 16), (16, 16, 16),
    )
    for chips in (math.prod(shape),)
}  # fmt: skip
SHAPES = {"v4": _CUBES, "v5e": _PLANES, "v5p": _CUBES | {6144: (16, 16, 24)}, "v6e": _PLANES}
CORES = {"v4": 2, "v5e": 1, "v5p": 2, "v6e": 1}  # what the number in a name counts, a chip


class Topology(NamedTuple):
    """TPU slices of one size.

    Attributes:
      generation: a key of `CHIPS`.
      shape: chips of one slice along each axis of its torus.
      slices: how many, joined by the data centre's network.
    """

    generation: str
    shape: tuple[int, ...]
    slices: int

    @property
    def chips(self) -> int:
        """In all slices; each is one jax device."""
        return math.prod(self.shape) * self.slices

    @property
    def name(self) -> str:
        """As it is rented: "v5p-512", "2xv5e-256"."""
        size = f"{self.generation}-{math.prod(self.shape) * CORES[self.generation]}"
        return size if self.slices == 1 else f"{self.slices}x{size}"

    @property
    def wiring(self) -> str:
        """As libtpu names a slice: "v5p:4x8x8"."""
        return f"{self.generation}:{'x'.join(map(str, self.shape))}"


def parse(name: str, slices: int = 1, *, rented: bool = False) -> Topology:
    """Reads "v5p-512", or "2xv5p-512" for two slices of it.

    The number counts TensorCores for v4 and v5p, two a chip, and chips for v5e and v6e, as in the
    names of Google's accelerator types.

    Args:
      slices: how many, where the name doesn't say.
      rented: nothing but what is rented will do, so that an error doesn't offer `LOCAL`.

    Raises:
      UserError: no such generation or size.
    """
    plain = name.strip().lower().replace("v5litepod-", "v5e-")  # Google's own word for it
    match = re.fullmatch(r"(?:(\d{1,4})x)?(v\d[ep]?)-(\d{1,6})", plain)
    if not match or match[2] not in CHIPS:
        here = "" if rented else f", or {LOCAL!r} for the devices that are here"
        raise UserError(
            f"Unknown topology {name!r}; give a generation and a size such as v5p-512 or 2xv5e-256 "
            f"(generations {', '.join(CHIPS)}){here}."
        )
    if match[1] and slices != 1:
        raise UserError(
            f"Topology {name!r} names its number of slices, and so does --slices; leave one out."
        )
    count = int(match[1]) if match[1] else slices
    if count < 1:
        raise UserError(f"Topology {name!r} has {count} slices; give at least 1.")
    generation, size = match[2], int(match[3])
    cores, shapes = CORES[generation], SHAPES[generation]
    if size % cores or size // cores not in shapes:
        sizes = ", ".join(str(cores * chips) for chips in shapes)
        raise UserError(f"Topology {name!r} has no such size; {generation} comes in {sizes}.")
    return Topology(generation, shapes[size // cores], count)

"""What Google calls the TPUs of `cascade.parallel.topology` when they are rented.

As a program, for tpu_vm.sh: `python3 tpu_names.py 2xv5e-256` prints the accelerator type, the
runtime version and the number of slices. It needs nothing but Python 3.10.
"""

import math
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from cascade.errors import UserError
from cascade.parallel.topology import Topology, parse

# Accelerator types are named as our topologies are, but for v5e: cloud.google.com/tpu/docs/v5e.
ACCELERATORS = {"v5e": "v5litepod"}
# docs.cloud.google.com/tpu/docs/runtimes, "PyTorch and JAX".
RUNTIMES = {
    "v4": "tpu-ubuntu2204-base",
    "v5e": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}
# The label cloud.google.com/gke-tpu-accelerator: docs.cloud.google.com/kubernetes-engine/docs/
# concepts/plan-tpus.
NODE_LABELS = {
    "v4": "tpu-v4-podslice",
    "v5e": "tpu-v5-lite-podslice",
    "v5p": "tpu-v5p-slice",
    "v6e": "tpu-v6e-slice",
}
CHIPS_PER_HOST = 4  # of all machine types but those of one chip and, for one host alone, of eight


def accelerator_type(topology: Topology) -> str:
    """One slice, as gcloud's --accelerator-type names it: "v5litepod-256"."""
    _, size = topology._replace(slices=1).name.split("-")
    return f"{ACCELERATORS.get(topology.generation, topology.generation)}-{size}"


def node_topology(topology: Topology) -> str:
    """One slice, as the label cloud.google.com/gke-tpu-topology names it: "16x16"."""
    return "x".join(map(str, topology.shape))


def hosts(topology: Topology, chips_per_host: int | None = None) -> tuple[int, int]:
    """(hosts of one slice, chips of a host).

    Args:
      chips_per_host: of the machine type; None: four, or the slice's one.

    Raises:
      UserError: the chips of a slice don't divide over such hosts.
    """
    chips = math.prod(topology.shape)
    each = chips_per_host or min(chips, CHIPS_PER_HOST)
    if chips % each:
        raise UserError(
            f"The {chips} chips of a slice of {topology.name} don't divide over hosts of {each}; "
            "give --chips-per-host of the node pool's machine type."
        )
    return chips // each, each


if __name__ == "__main__":
    try:
        wished = parse(sys.argv[1], rented=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(accelerator_type(wished), RUNTIMES[wished.generation], wished.slices)

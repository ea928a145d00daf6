"""The device mesh: three named axes that a config gives sizes to."""

import collections
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from cascade.errors import UserError

AXES = ("data", "fsdp", "tensor")


def make_mesh(*, data: int, fsdp: int, tensor: int, devices=None) -> Mesh:
    """Arranges devices as [data, fsdp, tensor]; of several TPU slices, `data` counts them first.

    Args:
      data, fsdp, tensor: axis sizes; one of them may be -1, "whatever is left". Batches are split
        over `data` and `fsdp`, parameters over `fsdp` and `tensor`.
      devices: the devices to use; all of them by default.

    Raises:
      UserError: the sizes don't multiply to the number of devices, or slices don't divide `data`.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [data, fsdp, tensor]
    wished = _checked_sizes(dict(zip(AXES, sizes, strict=True)))
    if -1 in sizes:
        known = math.prod(size for size in sizes if size > 0)
        sizes[sizes.index(-1)] = max(len(devices) // known, 1)
    if math.prod(sizes) != len(devices):
        raise UserError(
            f"Mesh {wished} needs {math.prod(sizes)} devices but there are {len(devices)}; "
            "choose mesh sizes that multiply to that number, or make one -1: what is left."
        )
    # The Explicit default of jax.make_mesh fails on a sharded convolution kernel.
    kinds = (AxisType.Auto,) * 3
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        # An axis may be part of a side of a TPU's torus: 8 chips of 16.
        arranged = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
        return Mesh(arranged, AXES, axis_types=kinds)
    if sizes[0] % slices:
        raise UserError(
            f"Mesh {wished} splits batches {sizes[0]} ways over `data`, but there are {slices} "
            f"slices, between which only batches are split; make data a multiple of {slices}."
        )
    inside = (sizes[0] // slices, *sizes[1:])
    arranged = mesh_utils.create_hybrid_device_mesh(
        inside, (slices, 1, 1), devices, allow_split_physical_axes=True
    )
    return Mesh(arranged, AXES, axis_types=kinds)


def all_devices() -> Mesh:
    """A mesh that splits batches over all devices; a lone CPU's share its cores, so of it one."""
    devices = jax.devices()
    if devices[0].platform == "cpu" and jax.process_count() == 1:
        devices = devices[:1]
    return make_mesh(data=len(devices), fsdp=1, tensor=1, devices=devices)


def parse_mesh(text: str) -> dict[str, int]:
    """Reads "data=4,fsdp=64"; an axis that isn't named has size 1, and -1 is what is left.

    Raises:
      UserError: it isn't such a list, or a size can't be.
    """
    sizes = dict.fromkeys(AXES, 1)
    try:
        pairs = [part.split("=") for part in text.split(",")]
        named = {axis.strip(): int(size) for axis, size in pairs}
    except ValueError:
        named = {}
    if not named or len(named) < len(text.split(",")) or not set(named) <= set(AXES):
        raise UserError(
            f"Can't read the mesh {text!r}; name axes once each, of {', '.join(AXES)}, like "
            "data=4,fsdp=64."
        )
    _checked_sizes(sizes | named)
    return sizes | named


def _checked_sizes(sizes: dict[str, int]) -> str:
    """The sizes as text, for messages.

    Raises:
      UserError: one is zero or below -1, or several are -1.
    """
    wished = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
    if list(sizes.values()).count(-1) > 1 or any(size == 0 or size < -1 for size in sizes.values()):
        raise UserError(
            f"Mesh {wished}: sizes are 1 or more, but for one of -1, which is what is left."
        )
    return wished


def compiler_options(mesh: Mesh) -> dict[str, str]:
    """What XLA is told beyond its defaults to compile for a mesh's devices.

    Of a TPU's, that weights are gathered, not passed around in pieces while they are multiplied:
    for convolutions it sends twice the bytes so (`python bench/fsdp.py`).
    """
    if mesh.devices.flat[0].platform != "tpu":
        return {}
    return {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}


def check_batch(batch_size: int, microbatches: int, mesh: Mesh):
    """Raises a UserError unless each slice of a global batch divides over the mesh's devices."""
    shares = batch_shares(mesh)
    if batch_size % (microbatches * shares):
        raise UserError(
            f"config.train.batch_size={batch_size} can't be split into {microbatches} microbatches "
            f"over {shares} devices (mesh data × fsdp); choose a multiple of "
            f"{microbatches * shares}."
        )


def batch_shares(mesh: Mesh) -> int:
    """Over how many devices a batch is split: data × fsdp."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def process_share(mesh: Mesh) -> tuple[int, int]:
    """Which part of each batch this process's devices hold: the i-th of n blocks, as (i, n).

    Processes among whose devices only parameters are split (`tensor`) hold, and load, the same.

    Raises:
      UserError: some of two processes' rows are the same and some aren't.
    """
    held = collections.defaultdict(set)
    shares = batch_shares(mesh)
    for device, (rows,) in batch_sharding(mesh).devices_indices_map((shares,)).items():
        held[device.process_index].add(rows.start or 0)
    blocks = sorted({tuple(sorted(rows)) for rows in held.values()})
    if sum(map(len, blocks)) != shares or len(set(map(len, blocks))) > 1:
        raise UserError(
            f"A batch can't be shared by {len(held)} processes over the mesh {dict(mesh.shape)}: "
            "some would need part of another's; make data × fsdp a multiple of the number of "
            "processes, or the other way round."
        )
    return blocks.index(tuple(sorted(held[jax.process_index()]))), len(blocks)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Splits an array's first axis over `data` and `fsdp`."""
    return NamedSharding(mesh, P(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, P())


def put_batch(batch: dict, mesh: Mesh) -> dict:
    """Makes global arrays [B, ...] from each process's own numpy part of the batch."""
    sharding = batch_sharding(mesh)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}


def split_rows(array: np.ndarray, mesh: Mesh) -> jax.Array:
    """A global array [B, ...] from a numpy one that every process holds whole."""
    return put(array, batch_sharding(mesh))


def whole_on_host(array: jax.Array) -> np.ndarray:
    """All of a global array as numpy, on every process; they call this together."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)


def put(array, sharding: Sharding) -> jax.Array:
    """An array where `sharding` says; of a NumPy one, which all hold, each process fills its part.

    What is on devices already is only moved.
    """
    if isinstance(array, jax.Array):
        return jax.device_put(array, sharding)
    return jax.make_array_from_callback(np.shape(array), sharding, np.asarray(array).__getitem__)


def first_failing(failed: bool) -> int | None:
    """The first process that says it failed, if any does; all call this together."""
    if jax.process_count() == 1:
        return 0 if failed else None
    said = multihost_utils.process_allgather(np.array(failed))
    return int(said.argmax()) if said.any() else None


def on_all_processes(action: Callable[[], Any], mesh: Mesh | None) -> Any:
    """Runs on every process, and returns on each once it is done on all.

    Args:
      action: reads a file, say; it may fail on one process and not on another, and so must not
        wait for the others itself.
      mesh: all of its processes call this together; None is this process alone.

    Raises:
      UserError: it failed on another process; where it failed, that process's own error.
    """
    result = failure = None
    try:
        result = action()
    except Exception as error:  # whatever it is, the others mustn't wait for ever
        failure = error
    if mesh is not None and mesh.is_multi_process:
        process = first_failing(failure is not None)
        if failure is None and process is not None:
            failure = UserError(f"Process {process} failed; its own message says how to go on.")
    if failure is not None:
        raise failure
    return result


def on_first_process(action: Callable[[], None], mesh: Mesh | None):
    """Runs on process 0 what is for one process to do, and returns on all once it is done.

    Args:
      action: writes a file that all share, say.
      mesh: as for `on_all_processes`.

    Raises:
      UserError: it failed on process 0, which raises its own error.
    """
    mine = mesh is None or jax.process_index() == 0
    on_all_processes(action if mine else lambda: None, mesh)

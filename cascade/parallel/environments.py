"""Which process of how many this is, as schedulers tell it through the environment.

Reads what `jax.distributed` would read, by itself: jax ends the program with a stack trace where it
waits in vain, and waits where one process is alone. Imports nothing that is slow.
"""

import os
import pathlib
import re
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import NamedTuple

from cascade.errors import UserError

PORT = 8482  # where nothing else says; jax's own on Cloud TPU
EPHEMERAL = 2**12  # a port for each of so many jobs, at the end of the range, as jax does
METADATA = "metadata.google.internal"


class Place(NamedTuple):
    """One process among others; None is what nothing told.

    Fields:
      coordinator: HOST:PORT of process 0.
      processes, process: how many, and which one, from 0.
      devices: the host's GPUs that are this process's, or None for all.
      told_by: what told so, for messages.
    """

    coordinator: str | None
    processes: int | None
    process: int | None
    devices: list[int] | None = None
    told_by: str = "the options"


def place(
    coordinator: str | None,
    processes: int | None,
    process: int | None,
    environment: Mapping[str, str] = os.environ,
) -> Place | None:
    """This process's place, from options, their environment variables, or a scheduler's.

    Options come first, then CASCADE_COORDINATOR, CASCADE_PROCESSES and CASCADE_PROCESS, then
    Slurm, Open MPI, Cloud TPU and Kubernetes, which fill what is missing.

    Returns:
      None where the process is alone.

    Raises:
      UserError: they contradict each other, or some are missing.
    """
    coordinator = coordinator or environment.get("CASCADE_COORDINATOR")
    if processes is None:
        processes = _number(environment, "CASCADE_PROCESSES")
    if process is None:
        process = _number(environment, "CASCADE_PROCESS")
    said = (coordinator, processes, process)
    told = None
    if None in said:
        told = slurm(environment) or open_mpi(environment) or cloud_tpu(environment)
        told = told or kubernetes(environment)
    if told is None:
        told = Place(None, None, None)
    chosen = Place(
        coordinator or told.coordinator,
        told.processes if processes is None else processes,
        told.process if process is None else process,
        told.devices,
        told.told_by,
    )
    if chosen.processes == 1 and chosen.process in (None, 0):
        return None
    indexed = coordinator is None and processes is None and told.processes is None
    if said == (None, None, None) and indexed:
        return None  # nothing is told, or only the index in a Kubernetes Job: each runs alone
    return _checked(chosen)


def slurm(environment: Mapping[str, str]) -> Place | None:
    """Inside `srun`. A batch script or a login shell of the allocation is alone.

    The shell that salloc opens is a step too, and has the allocation's SLURM_NTASKS, but its own
    SLURM_STEP_NUM_TASKS is 1. One task on a node has all of its GPUs, several one each.
    """
    names = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID")
    if not all(name in environment for name in names):
        return None
    tasks = _number(environment, "SLURM_STEP_NUM_TASKS") or _number(environment, "SLURM_NTASKS")
    nodes = _number(environment, "SLURM_STEP_NUM_NODES") or _number(environment, "SLURM_NNODES")
    host = first_host(environment["SLURM_STEP_NODELIST"])
    # With a GPU bound to each task, it sees no other.
    own = nodes not in (None, tasks) and "SLURM_GPUS_PER_TASK" not in environment
    local = _number(environment, "SLURM_LOCALID")
    return Place(
        f"{host}:{_port_of(_number(environment, 'SLURM_JOB_ID'))}",
        tasks,
        _number(environment, "SLURM_PROCID"),
        [local] if own and local is not None else None,
        "Slurm",
    )


def first_host(nodes: str) -> str:
    """The first host of a Slurm node list: node[001-004,9],other -> node001."""
    found = re.match(r"([^,\[]+)(?:\[([^\],-]+)[^\]]*\]([^,\[]*))?", nodes)
    if found is None:
        raise UserError(
            f"SLURM_STEP_NODELIST is {nodes!r}, which begins with no host; give --coordinator."
        )
    return "".join(part or "" for part in found.groups())


def open_mpi(environment: Mapping[str, str]) -> Place | None:
    """Started by mpirun. Open MPI 4 tells where that runs; 5 doesn't."""
    count = _number(environment, "OMPI_COMM_WORLD_SIZE")
    if count is None:
        return None
    uri = environment.get("OMPI_MCA_orte_hnp_uri", "")
    found = re.match(r"(\d+)\.\d+;tcp6?://\[?([^,\]/]+?)(?:[,\]]|:\d+$)", uri)
    coordinator = None
    if found:
        host = f"[{found[2]}]" if ":" in found[2] else found[2]
        coordinator = f"{host}:{_port_of(int(found[1]) // EPHEMERAL)}"
    several = (_number(environment, "OMPI_COMM_WORLD_LOCAL_SIZE") or 1) > 1
    local = _number(environment, "OMPI_COMM_WORLD_LOCAL_RANK")
    return Place(
        coordinator,
        count,
        _number(environment, "OMPI_COMM_WORLD_RANK"),
        [local] if several and local is not None else None,
        "Open MPI",
    )


def kubernetes(environment: Mapping[str, str]) -> Place | None:
    """In an indexed Job's pod, which process this is: that is all that its environment holds.

    A JobSet's or Job's manifest states CASCADE_COORDINATOR and CASCADE_PROCESSES, alike for all.
    """
    index = _number(environment, "JOB_COMPLETION_INDEX")
    return None if index is None else Place(None, None, index, told_by="Kubernetes")


def cloud_tpu(environment: Mapping[str, str]) -> Place | None:
    """On a Cloud TPU VM (its metadata server tells) or in a GKE pod (its environment does).

    Of several slices, each has as many hosts, and the first slice's come first.
    """
    if not has_tpu(environment):
        return None
    hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES")
    worker, slices = environment.get("TPU_WORKER_ID", "0"), environment
    if hosts is None:
        if "TPU_SKIP_MDS_QUERY" in environment:
            return None
        answers = [
            _metadata(environment, name)
            for name in ("worker-network-endpoints", "agent-worker-number", "tpu-env")
        ]
        if None in answers[:2]:
            return None
        hosts, worker = answers[:2]
        hosts = ",".join(part.split(":")[-1] for part in hosts.split(","))  # of name:id:ip, or ip
        pairs = re.findall(r"^\s*(\w+)\s*:\s*'?([^'\n]*)'?\s*$", answers[2] or "", re.MULTILINE)
        slices = {**dict(pairs), **environment}
    hosts = [host.split(":")[0] for host in hosts.split(",")]
    count = int(slices.get("MEGASCALE_NUM_SLICES") or 1)
    index = int(slices.get("MEGASCALE_SLICE_ID") or 0)
    first = (slices.get("MEGASCALE_COORDINATOR_ADDRESS") or hosts[0]).split(":")[0]
    return Place(
        f"{first}:{PORT}",
        len(hosts) * count,
        int(worker) + index * len(hosts),
        told_by="Cloud TPU",
    )


def has_tpu(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this machine has TPU chips, or the environment says that it stands for one."""
    nodes = any(any(pathlib.Path("/dev").glob(name)) for name in ("accel*", "vfio/[0-9]*"))
    return nodes or "TPU_WORKER_ID" in environment or "GCE_METADATA_HOST" in environment


def _metadata(environment: Mapping[str, str], name: str) -> str | None:
    """An attribute of this Google Cloud machine, or None where there is no such thing."""
    host = environment.get("GCE_METADATA_HOST", METADATA)
    url = f"http://{host}/computeMetadata/v1/instance/attributes/{name}"
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.read().decode()
    except (urllib.error.URLError, OSError):
        return None


def _port_of(job: int) -> int:
    return job % EPHEMERAL + 2**16 - EPHEMERAL


def _number(environment: Mapping[str, str], name: str) -> int | None:
    text = environment.get(name)
    if text is None:
        return None
    try:
        return int(text)
    except ValueError:
        raise UserError(f"{name} is {text!r} in the environment; it should be a number.") from None


def _checked(chosen: Place) -> Place:
    """Raises a UserError where something is missing or doesn't fit."""
    options = {
        "--coordinator HOST:PORT": chosen.coordinator,
        "--processes N": chosen.processes,
        "--process I": chosen.process,
    }
    missing = [option for option, value in options.items() if value is None]
    if missing:
        there = [option.split()[0] for option in options if option not in missing]
        raise UserError(
            f"{' and '.join(missing)} {'are' if len(missing) > 1 else 'is'} missing beside "
            f"{' and '.join(there)} (told by {chosen.told_by}); several processes need all three, "
            "as options or as CASCADE_COORDINATOR, CASCADE_PROCESSES and CASCADE_PROCESS."
        )
    if not 0 <= chosen.process < chosen.processes:
        raise UserError(
            f"Process {chosen.process} of {chosen.processes} can't be; --process counts from 0 to "
            f"{chosen.processes - 1}."
            if chosen.processes > 0
            else f"--processes is {chosen.processes}; give how many there are, at least 1."
        )
    host, colon, port = chosen.coordinator.rpartition(":")
    if not (host and colon and port.isdecimal() and 0 < int(port) < 2**16):
        raise UserError(
            f"--coordinator is {chosen.coordinator!r}; it should be HOST:PORT of process 0, with a "
            "free port, like node1:8482."
        )
    return chosen

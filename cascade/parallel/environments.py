"""Which process of how many this is, as schedulers tell it through the environment.

Reads what `jax.distributed` would read, by itself: jax ends the program with a stack trace where it
waits in vain, and waits where one process is alone. Imports nothing that is slow.
"""

import http.client
import logging
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
METADATA = "169.254.169.254"  # metadata.google.internal, without asking who that is
METADATA_WAIT = 3  # seconds; it is on the same machine
OPTIONS = ("--coordinator HOST:PORT", "--processes N", "--process I")
VARIABLES = ("CASCADE_COORDINATOR", "CASCADE_PROCESSES", "CASCADE_PROCESS")


class Place(NamedTuple):
    """One process among others; None is what nothing told.

    Fields:
      coordinator: HOST:PORT of process 0.
      processes, process: how many, and which one, from 0.
      devices: the host's GPUs that are this process's, or None for all.
      told_by: what told the first three, for messages; "" is the options.
    """

    coordinator: str | None
    processes: int | None
    process: int | None
    devices: list[int] | None = None
    told_by: tuple[str, str, str] = ("", "", "")


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
    said = [coordinator or None, processes, process]
    by = ["", "", ""]
    for i, name in enumerate(VARIABLES):
        if said[i] is None:
            said[i] = _number(environment, name) if i else environment.get(name) or None
            by[i] = name
    told = None
    if None in said:
        told = slurm(environment) or open_mpi(environment) or cloud_tpu(environment)
        told = told or kubernetes(environment)
    if told is None:
        told = Place(None, None, None)
    chosen = Place(
        *(theirs if own is None else own for own, theirs in zip(said, told[:3], strict=True)),
        told.devices,
        tuple(told.told_by[i] if said[i] is None else by[i] for i in range(3)),
    )
    if chosen.processes == 1 and chosen.process in (None, 0):
        return None
    if said == [None, None, None] and told.processes is None:
        return None  # nothing is told, or only the index in a Kubernetes Job: each runs alone
    return _checked(chosen)


def slurm(environment: Mapping[str, str]) -> Place | None:
    """Inside `srun`. A batch script or a login shell of the allocation is alone.

    The shell that salloc opens is a step too, and has the allocation's SLURM_NTASKS, but its own
    SLURM_STEP_NUM_TASKS is 1. One task on a node has all of its GPUs, several one each.
    """
    names = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID")
    if not all(environment.get(name) for name in names):
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
        ("Slurm",) * 3,
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
    found = re.match(r"(\d{1,18})\.\d+;tcp6?://\[?([^,\]/]+?)(?:[,\]]|:\d+$)", uri)
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
        ("Open MPI",) * 3,
    )


def kubernetes(environment: Mapping[str, str]) -> Place | None:
    """In an indexed Job's pod, which process this is: that is all that its environment holds.

    A JobSet's or Job's manifest states CASCADE_COORDINATOR and CASCADE_PROCESSES, alike for all.
    """
    index = _number(environment, "JOB_COMPLETION_INDEX")
    return None if index is None else Place(None, None, index, told_by=("Kubernetes",) * 3)


def cloud_tpu(environment: Mapping[str, str]) -> Place | None:
    """On a Cloud TPU VM (its metadata server tells) or in a GKE pod (its environment does).

    Of several slices, each has as many hosts, and the first slice's come first.

    Raises:
      UserError: something that should be a number isn't one.
    """
    if not has_tpu(environment):
        return None
    hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES")
    slices = environment
    if not hosts:
        answers = None if "TPU_SKIP_MDS_QUERY" in environment else _metadata(environment)
        if answers is None:
            return None
        hosts = answers["worker-network-endpoints"]
        hosts = ",".join(part.split(":")[-1] for part in hosts.split(","))  # of name:id:ip, or ip
        text = answers["tpu-env"] or ""
        pairs = re.findall(r"^\s*(\w+)\s*:\s*'?([^'\n]*)'?\s*$", text, re.MULTILINE)
        slices = {**dict(pairs), **environment, "TPU_WORKER_ID": answers["agent-worker-number"]}
    hosts = [host.split(":")[0] for host in hosts.split(",")]
    worker = _number(slices, "TPU_WORKER_ID") or 0
    count = _number(slices, "MEGASCALE_NUM_SLICES")
    count = 1 if count is None else count
    index = _number(slices, "MEGASCALE_SLICE_ID") or 0
    first = (slices.get("MEGASCALE_COORDINATOR_ADDRESS") or hosts[0]).split(":")[0]
    return Place(
        f"{first}:{PORT}",
        len(hosts) * count,
        worker + index * len(hosts),
        told_by=("Cloud TPU",) * 3,
    )


def has_tpu(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this machine has TPU chips, or the environment says that it stands for one."""
    nodes = any(any(pathlib.Path("/dev").glob(name)) for name in ("accel*", "vfio/[0-9]*"))
    return nodes or "TPU_WORKER_ID" in environment or "GCE_METADATA_HOST" in environment


def _metadata(environment: Mapping[str, str]) -> dict[str, str | None] | None:
    """What a Cloud TPU VM's metadata server says of it, or None where this is no such machine.

    Where none answers, this waits once, `METADATA_WAIT`, and says so.
    """
    host = environment.get("GCE_METADATA_HOST") or METADATA
    answers = {}
    # Not through a proxy, which would ask for another machine.
    ask = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
    for name in ("worker-network-endpoints", "agent-worker-number", "tpu-env"):
        url = f"http://{host}/computeMetadata/v1/instance/attributes/{name}"
        try:
            request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
            with ask(request, timeout=METADATA_WAIT) as answer:
                answers[name] = answer.read().decode(errors="replace")
        except urllib.error.HTTPError:  # it is there, and has no such attribute
            answers[name] = None
        except (OSError, ValueError, http.client.HTTPException) as error:
            if isinstance(getattr(error, "reason", error), TimeoutError):
                logging.warning(
                    f"No metadata server answers at {host} within {METADATA_WAIT} s, so this "
                    "process counts as alone; TPU_SKIP_MDS_QUERY=1 in the environment doesn't ask."
                )
            return None
        if answers[name] is None and name != "tpu-env":
            return None
    return answers


def _port_of(job: int) -> int:
    return job % EPHEMERAL + 2**16 - EPHEMERAL


def _number(environment: Mapping[str, str], name: str) -> int | None:
    """A whole number of the environment's; None where it is missing or empty."""
    text = environment.get(name)
    if not text:
        return None
    if not re.fullmatch(r"\s*[+-]?[0-9]{1,18}\s*", text):
        raise UserError(f"{name} is {text[:60]!r} in the environment; it should be a number.")
    return int(text)


def _checked(chosen: Place) -> Place:
    """Raises a UserError where something is missing or doesn't fit."""
    missing = [option for option, value in zip(OPTIONS, chosen, strict=False) if value is None]
    if missing:
        there = [option.split()[0] for option in OPTIONS if option not in missing]
        by = [by for by, value in zip(chosen.told_by, chosen, strict=False) if value is not None]
        raise UserError(
            f"{' and '.join(missing)} {'are' if len(missing) > 1 else 'is'} missing beside "
            f"{' and '.join(there)}{_told(*by)}; several processes need all three, "
            "as options or as CASCADE_COORDINATOR, CASCADE_PROCESSES and CASCADE_PROCESS."
        )
    by_coordinator, by_processes, by_process = chosen.told_by
    if chosen.processes < 1:
        raise UserError(
            f"--processes is {chosen.processes}{_told(by_processes)}; give how many there are, at "
            "least 1."
        )
    if not 0 <= chosen.process < chosen.processes:
        raise UserError(
            f"Process {chosen.process} of {chosen.processes} can't be"
            f"{_told(by_process, by_processes)}; --process counts from 0 to {chosen.processes - 1}."
        )
    host, colon, port = chosen.coordinator.rpartition(":")
    if not (host and colon and re.fullmatch("[0-9]{1,5}", port) and 0 < int(port) < 2**16):
        raise UserError(
            f"--coordinator is {chosen.coordinator!r}{_told(by_coordinator)}; it should be "
            "HOST:PORT of process 0, with a free port, like node1:8482."
        )
    return chosen


def _told(*by: str) -> str:
    """For messages, what told so where that isn't the options alone."""
    names = [name for name in dict.fromkeys(by) if name]
    return f" (told by {' and '.join(names)})" if names else ""

"""`cascade plan`: what a step would take on devices that needn't be here, without running it.

The step is compiled ahead of time in a child process (`cascade.parallel.ahead`), whose answer is
kept in ~/.cache/cascade/plans under a key of the config, the topology and the versions; the folder
may be deleted at any time.
"""

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from ml_collections import ConfigDict
from tqdm import tqdm

from cascade import config as configs
from cascade.errors import UserError
from cascade.files import write_whole
from cascade.parallel.before_code import flags
from cascade.parallel.mesh import parse_mesh
from cascade.parallel.topology import LOCAL, parse

log = logging.getLogger(__name__)

# What libtpu needs to compile where there is no TPU: jax's own platform is the CPU, nobody is asked
# for a TPU's description, and another process may have libtpu loaded too.
TPU_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
PHASES = ("trace", "lower", "compile", "read")  # what the child says it is at
COMPILER = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")  # what users tell compilers by
# This package's files that a step is made of, or read with.
PROGRAM = ("stage.py", "diffusion/*.py", "networks/*.py", "parallel/*.py", "training/*.py")
# Sections of a config that change no program.
BESIDE = ("data", "text_cache", "seed")


class Measured(NamedTuple):
    """What the child found out. Bytes and FLOPs are of one step, or one batch drawn.

    Attributes:
      device_kind, devices: of what it was compiled for.
      device_bytes: memory of a device that is here; None elsewhere, and where it doesn't say.
      mesh: axis -> size.
      parameters: of the stage.
      model_flops: three forward passes' (one evaluation's for each in sampling), all chips.
      flops: what is computed, recomputation included, all chips.
      ideal_bytes: what a chip must send at least to train on this mesh, see
        `cascade.parallel.collectives.ideal_bytes`.
      peak_bytes: a chip's memory. The others are its parts and None where it doesn't fit the chip.
      argument_bytes, temporary_bytes, result_bytes: the peak's parts.
      code_bytes: machine code, a part of the peak too; None where none was made.
      donated_bytes: results that take an argument's place.
      sent: kind of collective -> (bytes a chip sends, calls); None where it doesn't fit.
      traffic_bytes: a chip's memory is read and written; None where it doesn't fit.
      compile_seconds: tracing and lowering included.
      host_bytes: the most that the compiling process held.
    """

    device_kind: str
    devices: int
    device_bytes: int | None
    mesh: dict[str, int]
    parameters: int
    model_flops: float
    flops: float
    ideal_bytes: float
    peak_bytes: float
    compile_seconds: float
    host_bytes: float
    argument_bytes: float | None = None
    temporary_bytes: float | None = None
    result_bytes: float | None = None
    code_bytes: float | None = None
    donated_bytes: float | None = None
    sent: dict[str, list] | None = None
    traffic_bytes: float | None = None


def changed(config: ConfigDict, *, batch: int | None = None, mesh: str | None = None) -> ConfigDict:
    """A copy of a config with another batch size or mesh.

    Args:
      mesh: "data=4,fsdp=64"; an axis that isn't named has size 1.

    Raises:
      UserError: the mesh can't be read, or the config doesn't hold with the changes.
    """
    config = ConfigDict(config.to_dict())
    if batch is not None:
        config.train.batch_size = batch
    if mesh is not None:
        config.mesh = parse_mesh(mesh)
    configs.check(config)
    return config


def measure(
    config: ConfigDict,
    topology: str,
    *,
    sample: bool = False,
    machine_code: bool = False,
    host_limit: float | None = None,
    progress: bool = True,
) -> Measured:
    """Compiles a stage's training step, or its sampler, and reads what it takes.

    Args:
      config: an experiment's; its batch size is the sampler's too.
      topology: as `cascade.parallel.topology.parse`, or "local".
      machine_code: for TPUs too, compile to the end, to know its machine code's size. It takes up
        to ten times as long, and changes nothing else. What is here is always compiled wholly.
      host_limit: bytes of this machine's memory that compiling may take; None is 9 tenths of what
        is free.
      progress: show a bar with the phase it is in.

    Raises:
      UserError: libtpu is missing, the mesh doesn't fit, or the memory's limit was reached.
    """
    name = topology if topology == LOCAL else parse(topology).name
    if name != LOCAL and importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "Planning for a TPU needs its compiler; pip install 'cascade-imagen[libtpu]', or plan "
            "for --topology local."
        )
    request = {"config": configs.to_json(config), "topology": name, "sample": sample}
    request["machine_code"] = machine_code or name == LOCAL
    cached = _cache_file(request)
    with contextlib.suppress(OSError, ValueError, TypeError):
        return Measured(**json.loads(cached.read_text(encoding="utf-8")))
    answer = _ask_child(request, host_limit or 0.9 * _free_memory(), progress)
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        write_whole(cached, json.dumps(answer))
    except OSError as error:
        log.warning("Can't keep a plan in %s (%s); it is made again.", cached.parent, error)
    return Measured(**answer)


def _cache_file(request: dict) -> pathlib.Path:
    """Where a request's answer is kept: by the request, the code of the step, and versions."""
    kept = {k: v for k, v in request["config"].items() if k not in BESIDE}
    folder = pathlib.Path(__file__).parents[1]
    code = hashlib.sha256()
    for part in PROGRAM:
        for path in sorted(folder.glob(part)):
            code.update(path.read_bytes())
    found = {d: _version(d) for d in ("jax", "jaxlib", "libtpu", "flax", "optax")}
    key = [request | {"config": kept}, found, code.hexdigest()]
    key.append([os.environ.get(name) for name in COMPILER])
    if request["topology"] == LOCAL:  # the same word on another machine, or with other devices
        key.append([os.environ.get(name) for name in ("JAX_PLATFORMS", "CUDA_VISIBLE_DEVICES")])
        key.append(os.uname().nodename)
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return pathlib.Path.home() / ".cache" / "cascade" / "plans" / f"{digest}.json"


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _ask_child(request: dict, host_limit: float, progress: bool) -> dict:
    """Runs the child and follows what it says, until it has answered."""
    own = {} if request["topology"] == LOCAL else TPU_ENVIRONMENT
    # What was compiled once would be read from jax's cache, in no time and with no memory.
    environment = {**os.environ, **own, "JAX_ENABLE_COMPILATION_CACHE": "false"}
    with (
        tempfile.TemporaryDirectory() as dump,
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as complaints,
    ):
        request = request | {"dump": None if request["machine_code"] else dump}
        if request["dump"]:
            told = os.environ.get("XLA_FLAGS", "").split()
            kept = [flag for flag in told if not flag.startswith("--xla_dump")]
            environment["XLA_FLAGS"] = " ".join([*kept, flags(dump)])
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", "cascade.parallel.ahead"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=complaints,
            env=environment,
            text=True,
        )
        with _guarded(child, host_limit) as guard:
            child.stdin.write(json.dumps(request) + "\n")
            child.stdin.flush()  # and it stays open: where it ends, so does the child
            answer = _follow(child.stdout, progress)
            child.wait()
        if guard.struck:
            raise UserError(
                f"Compiling took more than {host_limit / 2**30:.1f} GiB of this machine's memory "
                "and was stopped; give more with --host-memory, or plan a smaller stage."
            )
        if "error" in answer:
            raise UserError(answer["error"])
        if "measured" not in answer:
            complaints.seek(0)
            told = [f"without {name}" for name in COMPILER if os.environ.get(name)]
            raise UserError(
                f"Compiling for {request['topology']} failed (exit code {child.returncode}: "
                f"{_last_error(complaints)}); try "
                f"{', or '.join([*told, 'a smaller batch or another mesh'])}."
            )
        return answer["measured"]


def _last_error(lines: Iterable[str]) -> str:
    """The last line that names an error, or the last one at all, at most 300 letters of it."""
    said = [line.strip() for line in lines if line.strip()] or ["it said nothing"]
    errors = [line for line in said if re.match(r"[\w.]+(Error|Exception)\b", line)]
    return (errors or said)[-1][:300].rstrip(".")


def _follow(lines: Iterable[str], progress: bool) -> dict:
    """Shows the child's phases as a bar and returns the last thing it says."""
    said = {}
    with tqdm(total=len(PHASES), unit="phase", disable=not progress, leave=False) as bar:
        for line in lines:
            with contextlib.suppress(ValueError):  # compilers may talk on standard output too
                said = json.loads(line)
                bar.set_description_str(said.get("phase", "done"))
                bar.update()
    return said


class _Guard:
    """Whether the child was stopped for its memory."""

    struck = False


@contextlib.contextmanager
def _guarded(child: subprocess.Popen, limit: float) -> Iterator[_Guard]:
    """Kills the child once it holds more than `limit` bytes, and in any case at the end.

    Memory is read from Linux's /proc, where libtpu runs; elsewhere nothing is limited.
    """
    guard, done = _Guard(), threading.Event()

    def watch():
        while not done.wait(0.2):
            if _resident(child.pid) > limit:
                guard.struck = True
                child.kill()
                return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield guard
    finally:
        done.set()
        watcher.join()
        child.kill()
        child.wait()
        child.stdin.close()
        child.stdout.close()


def _resident(pid: int) -> int:
    """Bytes of memory that a process holds; 0 where there is no /proc, or no such process."""
    try:
        pages = pathlib.Path(f"/proc/{pid}/statm").read_text().split()[1]
    except (OSError, IndexError):
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def _free_memory() -> float:
    """Bytes that this machine can still give; infinite where it doesn't say."""
    try:
        lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return float("inf")
    free = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return float(free[0]) if free else float("inf")

"""Several processes as one: setting `jax.distributed` up, agreeing, and stopping together."""

import contextlib
import hashlib
import itertools
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from cascade.errors import UserError
from cascade.parallel import environments, roll

# Seconds, and the environment variables that change them.
WAIT = ("CASCADE_WAIT_SECONDS", 300)  # for the other processes at the start
SILENCE = ("CASCADE_SILENCE_SECONDS", 60)  # of a machine, until it counts as lost
SHUTDOWN = 60  # for the others at the end
_ASKED = itertools.count(1)  # how often this process asked whether to stop


def connect(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    *,
    saves_when_terminated: bool = False,
):
    """Joins the other processes of this run, if there are any; before jax looks for devices.

    Args:
      coordinator, processes, process: HOST:PORT where process 0 listens, how many there are, and
        which this one is, from 0; what is None comes from the environment, see
        `environments.place`. Where that tells of no others, nothing happens.
      saves_when_terminated: SIGTERM to one is told to all, and answered by `stopping`; else it ends
        the process that it reaches, and thereby the others.

    Raises:
      UserError: contradictory settings, the others aren't there in time, or they don't fit.
    """
    place = environments.place(coordinator, processes, process)
    if place is None or jax.distributed.is_initialized():
        return
    silence = _seconds(*SILENCE)
    address = roll.answer(place, _seconds(*WAIT), silence)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", saves_when_terminated)
    try:
        jax.distributed.initialize(
            address,
            place.processes,
            place.process,
            local_device_ids=place.devices,
            cluster_detection_method="deactivate",
            initialization_timeout=_seconds(*WAIT),
            heartbeat_timeout_seconds=silence,
            shutdown_timeout_seconds=SHUTDOWN,
        )
    except RuntimeError as error:
        raise UserError(
            f"jax can't connect the processes ({str(error).splitlines()[0]}); start all again."
        ) from error
    if place.process > 0:
        logging.getLogger().setLevel(logging.WARNING)
    # Gloo gives the others 30 s to come to the first collective, so it is done while all are here.
    with _nothing_printed():
        multihost_utils.sync_global_devices("connected")


def agree(what: str, config: dict):
    """Returns where all processes have the same settings; they call this together.

    Args:
      what: names them in the message: "config".
      config: JSON-able.

    Raises:
      UserError: on all of them, naming those whose settings differ from process 0's, and on these
        what differs.
    """
    if jax.process_count() == 1:
        return
    text = json.dumps(config, sort_keys=True).encode()
    digest = np.frombuffer(hashlib.sha256(text).digest(), np.uint8)
    digests = np.asarray(multihost_utils.process_allgather(digest))
    other = [index for index, theirs in enumerate(digests) if (theirs != digests[0]).any()]
    if not other:
        return
    size = int(multihost_utils.broadcast_one_to_all(np.array(len(text))))
    sent = np.frombuffer(text.ljust(size)[:size], np.uint8)  # what the others send is dropped
    theirs = bytes(np.asarray(multihost_utils.broadcast_one_to_all(sent)))
    named = ", ".join(map(str, other[:8])) + (", …" if len(other) > 8 else "")
    difference = "their own output tells where"
    if jax.process_index() in other:
        path, ours, zeros = first_difference(what, config, json.loads(theirs))
        difference = f"here {path} is {ours!r}, there {zeros!r}"
    raise UserError(
        f"Of {jax.process_count()} processes, {named} got another {what} than process 0 "
        f"({difference}); start all with the same command."
    )


def first_difference(path: str, ours, theirs) -> tuple[str, object, object]:
    """Where two nested dicts first differ, by key, and the values there."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in sorted(ours.keys() | theirs.keys()):
            if ours.get(key) != theirs.get(key):
                return first_difference(f"{path}.{key}", ours.get(key), theirs.get(key))
    return path, ours, theirs


@contextlib.contextmanager
def stopping() -> Iterator[Callable[[int], bool]]:
    """Hands out `asked(step)`: whether to stop after this step, alike on all processes.

    SIGTERM asks. With several processes, each calls `asked` at every step from the same one on; the
    coordination service tells all of the signal and finds a step that none has passed. Alone, the
    signal is caught while this is open.
    """
    if jax.process_count() > 1:
        # Counted on from one `with` to the next: the service waits for a number not yet passed.
        yield lambda step: multihost_utils.reached_preemption_sync_point(next(_ASKED))
        return
    if threading.current_thread() is not threading.main_thread():
        yield lambda step: False  # only the main thread can catch signals
        return
    asked = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield lambda step: asked.is_set()
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


@contextlib.contextmanager
def _nothing_printed():
    """Drops what libraries print where results go, to the standard output: Gloo counts ranks."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def _seconds(name: str, usual: int) -> int:
    text = os.environ.get(name, str(usual))
    if not text.isdecimal() or int(text) == 0:
        raise UserError(f"{name} is {text!r} in the environment; give whole seconds, at least 1.")
    return int(text)

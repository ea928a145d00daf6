"""Processes find one another before jax does, and notice when one is gone.

jax ends a process with a stack trace where the coordinator isn't there in time or another process
has died. So all first call process 0 on a connection of our own; it says when all have come and
fit together, or what is wrong. The connections stay: when a process dies, whatever killed it, its
machine closes its end, process 0 tells the others, and each of them says so and stops.

Messages are JSON, one a line. Imports nothing that is slow.
"""

import atexit
import contextlib
import ctypes
import json
import os
import select
import selectors
import signal
import socket
import sys
import threading
import time
from importlib import metadata

from cascade.errors import UserError

LOST = 75  # exit code where another process was lost: EX_TEMPFAIL, "try again"
GRACE = 3.0  # seconds for a process to say what itself failed of, when another has failed
LONGEST = 2**16  # bytes of a message
AGAIN = "Start all again with the same command, which goes on from what was saved."
RETRY = 0.2  # seconds between calls to a coordinator that isn't there yet

# Held, and never given back, by the thread that ends this process.
ENDING = threading.RLock()
# The roll that this process is on, or None where it is alone.
current: "Roll | None" = None


def answer(place, wait: float, silence: float) -> str:
    """Calls the roll: returns once all processes are there, and watches them from then on.

    Args:
      place: an `environments.Place`.
      wait: seconds to wait for the others.
      silence: seconds after which a machine that doesn't answer is given up.

    Returns:
      HOST:PORT for `jax.distributed`, alike on all.

    Raises:
      UserError: the port is taken, not all have come in time, or they don't fit together.
    """
    global current
    hello = {
        "process": place.process,
        "processes": place.processes,
        "versions": versions(),
    }
    host, _, port = place.coordinator.rpartition(":")
    end = time.monotonic() + wait
    with contextlib.ExitStack() as opened:
        if place.process == 0:
            peers = _receive(opened, int(port), hello, end, wait)
            with socket.socket() as free:
                free.bind(("", 0))
                address = f"{host}:{free.getsockname()[1]}"
            for peer in peers.values():
                _send(peer, {"jax": address})
        else:
            peer, address = _call(opened, host.strip("[]"), int(port), hello, end, wait)
            peers = {0: peer}
        opened.pop_all()
    for peer in peers.values():
        _keep_alive(peer, silence)
    current = Roll(place.process, place.processes, peers)
    return address


def versions() -> dict[str, str]:
    """Of what all processes must have the same."""
    return {name: metadata.version(name) for name in ("cascade-imagen", "jax")}


def _receive(opened, port: int, hello: dict, end: float, wait: float) -> dict[int, socket.socket]:
    """Process 0's side: the connection to each of the others."""
    try:
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        server = socket.create_server(("", port), family=family, dualstack_ipv6=both)
    except OSError as error:
        raise UserError(
            f"Process 0 can't listen on port {port} ({error.strerror}); another run may have it: "
            "give all processes another port in --coordinator."
        ) from error
    peers = {}
    with server:
        while len(peers) < hello["processes"] - 1:
            server.settimeout(max(end - time.monotonic(), 0.001))
            try:
                peer, _ = server.accept()
            except TimeoutError:
                missing = sorted(set(range(1, hello["processes"])) - set(peers))
                named = ", ".join(map(str, missing[:8])) + (", …" if len(missing) > 8 else "")
                problem = (
                    f"Of {hello['processes']} processes, {named} didn't call process 0 within "
                    f"{wait:g} s; see why in their output, and start all again."
                )
                _refuse(peers.values(), problem)
            opened.enter_context(peer)
            peer.settimeout(5)
            theirs = _read(peer)
            if not isinstance(theirs, dict) or not hello.keys() <= theirs.keys():
                peer.close()  # no process of ours: a port scan, a health check
                continue
            problem = _misfit(hello, theirs, peers)
            if problem:
                _refuse([*peers.values(), peer], problem)
            peers[theirs["process"]] = peer
            if len(peers) == hello["processes"] - 1:  # who has gone meanwhile isn't there
                peers = {index: each for index, each in peers.items() if not _closed(each)}
    return peers


def _misfit(ours: dict, theirs: dict, peers: dict[int, socket.socket]) -> str | None:
    """What is wrong with a process that called, or None."""
    index = theirs["process"]
    if theirs["processes"] != ours["processes"]:
        return (
            f"Process {index} was started as one of {theirs['processes']}, process 0 as one of "
            f"{ours['processes']}; give all the same --processes."
        )
    if index in peers and not _closed(peers[index]):
        return f"Two processes were started as process {index}; give each its own --process."
    for name, version in ours["versions"].items():
        if theirs["versions"].get(name) != version:
            return (
                f"Process {index} has {name} {theirs['versions'].get(name)}, process 0 has "
                f"{version}; install the same everywhere."
            )
    return None


def _refuse(peers, problem: str):
    """Tells all that have come what is wrong, and raises it here."""
    for peer in peers:
        _send(peer, {"error": problem})
    raise UserError(problem)


def _call(opened, host: str, port: int, hello: dict, end: float, wait: float):
    """The others' side: the connection to process 0, and where jax's coordinator will be."""
    who = f"Process {hello['process']} of {hello['processes']}"
    while True:
        try:
            peer = socket.create_connection((host, port), timeout=max(end - time.monotonic(), 0.1))
            break
        except OSError as error:
            if time.monotonic() + RETRY > end:
                raise UserError(
                    f"{who} found no process 0 at {host}:{port} within {wait:g} s "
                    f"({error.strerror or error}); start process 0 there, or correct "
                    "--coordinator."
                ) from error
            time.sleep(RETRY)
    opened.enter_context(peer)
    _send(peer, hello)
    peer.settimeout(max(end - time.monotonic(), 0) + GRACE)
    said = _read(peer)
    if isinstance(said, dict) and "error" in said:
        raise UserError(said["error"])
    if not isinstance(said, dict) or "jax" not in said:
        raise UserError(
            f"{who} called {host}:{port}, but process 0 gave no answer; see its output, or correct "
            "--coordinator if another program listens there."
        )
    return peer, said["jax"]


def _send(peer: socket.socket, message: dict):
    with contextlib.suppress(OSError):  # who is gone is noticed elsewhere
        peer.sendall(json.dumps(message).encode() + b"\n")


def _read(peer: socket.socket) -> object:
    """A message, or None where none comes."""
    received = b""
    try:
        while not received.endswith(b"\n"):
            byte = peer.recv(1)  # no further: the next message may have come already
            if not byte or len(received) > LONGEST:
                return None
            received += byte
        return json.loads(received)
    except (OSError, ValueError):
        return None


def _closed(peer: socket.socket) -> bool:
    """Whether the other end was closed; what it has sent before is dropped."""
    try:
        while select.select([peer], [], [], 0)[0]:
            if not peer.recv(LONGEST):
                return True
        return False
    except OSError:
        return True


def _keep_alive(peer: socket.socket, silence: float):
    """Lets the kernel ask now and then whether the machine at the other end is still there."""
    peer.settimeout(None)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    every = max(int(silence / 4), 1)
    for name, value in (("TCP_KEEPIDLE", every), ("TCP_KEEPINTVL", every), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):  # not everywhere
            peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


class Roll:
    """The processes that answered, watched by a thread until this one leaves.

    Args:
      process, processes: this one, of how many.
      peers: process 0's connections to all, or another's to process 0.
    """

    def __init__(self, process: int, processes: int, peers: dict[int, socket.socket]):
        self.process, self.processes, self.peers = process, processes, peers
        self.left = False
        self.news = threading.Event()  # that another process was lost or has failed
        # jax calls abort() where its service is gone or hears nothing of a process any more.
        ctypes.CDLL(None).signal(signal.SIGABRT, ABORTED)
        threading.Thread(target=self._watch, daemon=True).start()
        atexit.register(self.leave)

    def leave(self, code: int = 0):
        """Tells the others that this process ends, and with which exit code; not 0 ends them."""
        if self.left:
            return
        self.left = True
        if hasattr(sys, "last_value"):  # the interpreter ends with a traceback
            code = code or 1
        for peer in self.peers.values():
            _send(peer, {"left": self.process, "code": code})

    def outlive(self):
        """On process 0, waits until the others have said why they stop: jax's service is here."""
        end = time.monotonic() + 2 * GRACE
        while self.process == 0 and time.monotonic() < end:
            if all(_closed(peer) for peer in self.peers.values()):
                return
            time.sleep(0.05)

    def _watch(self):
        """Waits for news of the others."""
        selector = selectors.DefaultSelector()
        for index, peer in self.peers.items():
            selector.register(peer, selectors.EVENT_READ, index)
        while selector.get_map():
            for key, _ in selector.select():
                said = _read(key.fileobj)
                if said is None:
                    selector.unregister(key.fileobj)
                    self._gone(key.data, LOST)
                elif said["code"] == 0:  # it has finished, and may close its end
                    selector.unregister(key.fileobj)
                else:
                    self._gone(said["left"], said["code"])

    def _gone(self, index: int, code: int):
        """Another process was lost or has failed: passes it on, says so and ends this one."""
        if self.left:
            return
        self.news.set()
        for peer in self.peers.values() if self.process == 0 else ():
            _send(peer, {"left": index, "code": code})
        if code == LOST:
            end(f"Process {index} is gone: killed, or its machine or network failed. {AGAIN}", code)
        time.sleep(GRACE)
        if not self.left:
            end(f"Process {index} has failed, and its output tells of what; this one stops.", code)


def end(sentence: str, code: int):
    """Says why and ends this process; one of several tells the others, and waits for nothing."""
    close_bars()
    if current is None:
        print(f"error: {sentence}", file=sys.stderr)
        sys.exit(code)
    ENDING.acquire()  # only once, whoever is first
    whose = f"process {current.process} of {current.processes}"
    print(f"error: {whose}: {sentence}", file=sys.stderr, flush=True)
    current.leave(code)
    current.outlive()
    sys.stdout.flush()
    os._exit(code)  # jax would wait for the others, who wait for this one


def close_bars():
    """Ends progress bars that an error has left open, so that what is said next has its own line.

    An error holds the variables of what it came through, bars among them, and a bar leaves the
    cursor behind it. So does the bar of another thread.
    """
    if "tqdm" in sys.modules:
        for bar in list(sys.modules["tqdm"].tqdm._instances):
            bar.close()


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def ABORTED(number):
    """What abort() calls, which no handler of Python's could outrun."""
    os.write(2, b"\n")
    end(f"jax gave up, for the reason above: another process is gone. {AGAIN}", LOST)


def wait_for_news():
    """After an unforeseen failure: returns only if no other process's end explains it.

    News of that end may come later than the failure.
    """
    if current.news.wait(2 * GRACE):
        threading.Event().wait()  # for the thread that has the news, which ends this process
    ENDING.acquire()


def is_first() -> bool:
    """Whether this process is the one that writes logs and results."""
    return current is None or current.process == 0

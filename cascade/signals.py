"""SIGTERM and Ctrl-C unwind a command: what it holds is cleaned up, then it says so."""

import signal
import sys
import threading
import weakref
from types import FrameType

AGAIN = 0.02  # seconds
IMPORT = "<frozen importlib._bootstrap>"  # the file of its frames


class Unwound(KeyboardInterrupt):
    """What a signal raises where it finds the program."""


class Unwinding:
    """Inside `with`, SIGTERM and Ctrl-C raise `Unwound`; while one unwinds, SIGTERM is ignored.

    What is raised may get lost: in a destructor, in C code that clears errors, or in a library's
    bare `except:`. It is freed then, and the signal is sent again, `AGAIN` s later. Nor is anything
    raised in the middle of an import, which C extensions needn't survive; it is once that ended.

    On other threads than the main one nothing is caught: Python hears of no signals there.

    Attributes:
      asked: the last signal that came, or None.
    """

    def __init__(self):
        self.asked: int | None = None
        self._open = False
        self._raised: weakref.ref | None = None  # what unwinds
        self._before = {}  # signal -> its handler

    def __enter__(self) -> "Unwinding":
        if threading.current_thread() is threading.main_thread():
            self._open = True
            self._imports = _imports(sys._getframe())
            numbers = [signal.SIGALRM, signal.SIGTERM]
            # A shell starts what runs in the background with Ctrl-C ignored, and others catch it.
            if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
                numbers.append(signal.SIGINT)
            for number in numbers:
                self._before[number] = signal.getsignal(number) or signal.SIG_DFL
                signal.signal(number, self._caught)
        return self

    def __exit__(self, *_):
        self._open = False
        self._raised = None  # it may be freed from here on
        if self._before:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _caught(self, number: int, frame: FrameType | None):
        if not self._open:
            return
        if number == signal.SIGALRM:  # again, to whoever catches it now
            signal.raise_signal(self.asked)
            return
        self.asked = number
        if number == signal.SIGTERM and self._raised is not None and self._raised() is not None:
            return
        if _imports(frame) > self._imports:
            _alarm()
            return
        error = Unwound()
        self._raised = weakref.ref(error, _alarm)
        try:
            raise error
        finally:
            del error  # else its own traceback would keep it


def _alarm(_=None):
    signal.setitimer(signal.ITIMER_REAL, AGAIN)


def _imports(frame: FrameType | None) -> int:
    """How deep in imports a frame is."""
    count = 0
    while frame is not None:
        count += frame.f_code.co_filename == IMPORT
        frame = frame.f_back
    return count

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
    bare `except:`. It is freed then, unless somebody keeps it, and the signal is sent again `AGAIN`
    s later. Nor is anything raised in the middle of an import, which C extensions needn't survive;
    it is once that ended. SIGALRM serves for that, from the first signal on.

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
        if threading.current_thread() is not threading.main_thread():
            return self
        self._imports = _imports(sys._getframe())
        self._shown, sys.unraisablehook = sys.unraisablehook, self._lost
        self._catch(signal.SIGTERM)
        # A shell starts what runs in the background with Ctrl-C ignored, and others catch it.
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self._catch(signal.SIGINT)
        self._open = True
        if self.asked is not None:
            signal.raise_signal(self.asked)
        return self

    def __exit__(self, *_):
        self._open = False
        self._raised = None  # it may be freed from here on
        if signal.SIGALRM in self._before:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if sys.unraisablehook == self._lost:  # else another's, which may call it
            sys.unraisablehook = self._shown

    def _catch(self, number: int):
        self._before[number] = signal.getsignal(number) or signal.SIG_DFL
        signal.signal(number, self._caught)

    def _lost(self, unraisable):
        if not isinstance(unraisable.exc_value, Unwound):
            self._shown(unraisable)

    def _caught(self, number: int, frame: FrameType | None):
        unwinds = self._raised is not None and self._raised() is not None
        if number == signal.SIGALRM:
            if self._open and not unwinds:
                signal.raise_signal(self.asked)  # to whoever catches it now
            return
        self.asked = number
        if not self._open or (unwinds and number == signal.SIGTERM):
            return
        if signal.SIGALRM not in self._before:
            self._catch(signal.SIGALRM)
        if _imports(frame) > self._imports:
            _alarm()
            return
        signal.setitimer(signal.ITIMER_REAL, 0)
        error = Unwound()
        self._raised = weakref.ref(error, _alarm)
        try:
            raise error
        finally:
            del error  # else its own traceback would keep it


def interrupt_in(error: BaseException | None) -> KeyboardInterrupt | None:
    """The interrupt that an error is, or was made of: libraries wrap what they don't know."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error


def _alarm(_=None):
    signal.setitimer(signal.ITIMER_REAL, AGAIN)


def _imports(frame: FrameType | None) -> int:
    """How deep in imports a frame is."""
    count = 0
    while frame is not None:
        count += frame.f_code.co_filename == IMPORT
        frame = frame.f_back
    return count

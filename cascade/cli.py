"""`cascade <job>`: a thin dispatcher. Each command parses its options and calls one function.

Commands live in `cascade.commands`, by theme. Imports that are slow (jax and what needs it) happen
inside them, so `--help` is instant.
"""

import contextlib
import logging
import os
import pathlib
import signal
import sys
import threading
import traceback

import click

from cascade.commands import (
    data,
    distillation,
    drawing,
    evaluation,
    exchange,
    plan,
    steps,
    training,
)
from cascade.errors import Stopped, UserError
from cascade.parallel import roll
from cascade.parallel.environments import has_tpu

AGAIN = 0.02  # seconds


class Terminated(KeyboardInterrupt):
    """SIGTERM, which schedulers send: it unwinds as Ctrl-C does, so nothing stays half-written."""


@contextlib.contextmanager
def unwound_when_terminated():
    """Raises `Terminated` where SIGTERM finds the program; another can't stop the cleaning up.

    Python drops what is raised in a destructor or a weak reference's callback, of which jax has
    many. So where that is what SIGTERM or Ctrl-C found, it is sent once more, `AGAIN` s later;
    never twice, nor after the end, where nobody would catch it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread can catch signals
        return
    main_thread = threading.get_ident()
    again = None

    def stop(number, frame):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Terminated

    def dropped(unraisable):
        nonlocal again
        if not isinstance(unraisable.exc_value, KeyboardInterrupt):
            return shown(unraisable)
        terminated = isinstance(unraisable.exc_value, Terminated)
        number = signal.SIGTERM if terminated else signal.SIGINT
        while True:  # what is raised in here is dropped too
            with contextlib.suppress(KeyboardInterrupt):
                if again is not None:
                    again.cancel()
                if terminated:
                    signal.signal(number, stop)
                again = threading.Timer(AGAIN, signal.pthread_kill, (main_thread, number))
                again.start()
                return

    shown, sys.unraisablehook = sys.unraisablehook, dropped
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        with contextlib.suppress(KeyboardInterrupt):
            if again is not None:
                again.cancel()
                again.join()  # it may be sending; that ends in here, or before
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
        if sys.unraisablehook is dropped:  # else another's, which may call ours
            sys.unraisablehook = shown


class OneSentence(click.Command):
    """Says what the user did wrong, click's own complaints included, in one line: exit code 2."""

    def main(self, *args, standalone_mode: bool = True, **kwargs):
        """Runs a command; see `click.Command.main`."""
        try:
            with unwound_when_terminated():
                return super().main(*args, standalone_mode=False, **kwargs)
        except Stopped as stop:
            roll.close_bars()
            if roll.is_first():
                click.echo(stop)
        except UserError as error:
            roll.end(str(error), 2)
        except click.ClickException as error:
            roll.end(" ".join(error.format_message().split()), 2)
        except (click.Abort, KeyboardInterrupt) as error:
            # click hides what it was, but keeps it as the cause; the codes are the shell's own.
            cause = error.__cause__ or error
            terminated = isinstance(cause, Terminated)
            code = 128 + (signal.SIGTERM if terminated else signal.SIGINT)
            roll.end(str(cause) or ("Terminated." if terminated else "Interrupted."), code)
        except Exception:
            if roll.current is None:
                raise
            with contextlib.suppress(KeyboardInterrupt):
                roll.wait_for_news()  # it may come of another's end, which says more
            traceback.print_exc()
            roll.end("It failed, for the reason above.", 1)


class Jobs(OneSentence, click.Group):
    """All of `cascade <job>`."""


@click.group(
    cls=Jobs,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(package_name="cascade-imagen")
def main():
    """Text-to-image cascades in JAX: build data, train, bundle, draw.

    Start with `cascade sample --prompt "a red apple"`, which draws with a small cascade that is in
    the package. `cascade demo` makes one from nothing, in about 15 minutes on two CPU cores.
    """
    # What was compiled once is read the next time; jax looks at this when it is imported.
    compiled = pathlib.Path.home() / ".cache" / "cascade" / "xla"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(compiled))
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    # Orbax narrates every file it writes and traces every failure, which we say in a sentence.
    for chatty in ("absl", "asyncio"):
        logging.getLogger(chatty).setLevel(logging.CRITICAL)
    logging.getLogger("jax").setLevel(logging.WARNING)  # it names every backend it doesn't find
    # libtpu looks for a TPU wherever it's installed, and complains of what it can't find
    # out: where there is none, what it asks for is made up, and nothing comes of it.
    if not has_tpu():
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")


for module in (training, distillation, data, drawing, exchange, plan, evaluation, steps):
    for command in module.COMMANDS:
        main.add_command(command)

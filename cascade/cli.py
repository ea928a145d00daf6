"""`cascade <job>`: a thin dispatcher. Each command parses its options and calls one function.

Commands live in `cascade.commands`, by theme. Imports that are slow (jax and what needs it) happen
inside them, so `--help` is instant.
"""

import contextlib
import logging
import os
import pathlib
import signal
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
from cascade.signals import Unwinding, interrupt_in

ENDS = {signal.SIGINT: "Interrupted.", signal.SIGTERM: "Terminated."}


class OneSentence(click.Command):
    """Says what the user did wrong, click's own complaints included, in one line: exit code 2."""

    def main(self, *args, standalone_mode: bool = True, **kwargs):
        """Runs a command; see `click.Command.main`."""
        signals = Unwinding()
        try:
            with signals:
                return super().main(*args, standalone_mode=False, **kwargs)
        except Stopped as stop:
            roll.close_bars()
            if roll.is_first():
                click.echo(stop)
        except (Exception, KeyboardInterrupt) as error:
            interrupt = interrupt_in(error)
            expected = isinstance(error, UserError | click.ClickException)
            # C code makes another error of it, and keeps no cause.
            made = signals.asked is not None and not expected
            if isinstance(error, click.Abort) or interrupt is not None or made:
                number = signals.asked or signal.SIGINT
                roll.end(str(interrupt or "") or ENDS[number], 128 + number)  # a shell's codes
            elif isinstance(error, UserError):
                roll.end(str(error), 2)
            elif expected:
                roll.end(" ".join(error.format_message().split()), 2)
            elif isinstance(error, MemoryError) or str(error).startswith("RESOURCE_EXHAUSTED"):
                what = str(error).partition("\n")[0]
                roll.end(f"There isn't enough memory; ask for less at once. {what}".rstrip(), 2)
            elif roll.current is None:
                raise
            else:
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

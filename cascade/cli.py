"""`cascade <job>`: a thin dispatcher. Each command parses its options and calls one function.

Commands live in `cascade.commands`, by theme. Imports that are slow (jax and what needs it) happen
inside them, so `--help` is instant.
"""

import logging
import os
import pathlib
import sys

import click

from cascade.commands import data, drawing, exchange, plan, training
from cascade.errors import UserError


class OneSentence(click.Group):
    """Says what the user did wrong, click's own complaints included, in one line: exit code 2."""

    def main(self, *args, standalone_mode: bool = True, **kwargs):
        """Runs a command; see `click.Group.main`."""
        try:
            return super().main(*args, standalone_mode=False, **kwargs)
        except UserError as error:
            click.echo(f"error: {error}", err=True)
            sys.exit(2)
        except click.ClickException as error:
            click.echo(f"error: {' '.join(error.format_message().split())}", err=True)
            sys.exit(2)
        except (click.Abort, KeyboardInterrupt):
            click.echo("error: Interrupted; what was finished is kept.", err=True)
            sys.exit(130)


@click.group(
    cls=OneSentence,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(package_name="cascade-imagen")
def main():
    """Text-to-image cascades in JAX: build data, train, bundle, draw.

    Start with `cascade demo`: it does all of these, small, in about 15 minutes on two CPU cores.
    """
    # What was compiled once is read the next time; jax looks at this when it is imported.
    compiled = pathlib.Path.home() / ".cache" / "cascade" / "xla"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(compiled))
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    # Orbax narrates every file it writes and traces every failure, which we say in a sentence.
    for chatty in ("absl", "asyncio"):
        logging.getLogger(chatty).setLevel(logging.CRITICAL)
    logging.getLogger("jax").setLevel(logging.WARNING)  # it names every backend it doesn't find


for module in (training, data, drawing, exchange, plan):
    for command in module.COMMANDS:
        main.add_command(command)

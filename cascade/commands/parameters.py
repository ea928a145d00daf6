"""Types of options that several commands share."""

import click


class Numbers(click.ParamType):
    """Comma-separated numbers, one a stage: `50,30`; one number serves every stage."""

    def __init__(self, kind: type):
        self.kind = kind
        self.name = "N[,N...]"

    def convert(self, value, param, ctx):
        """Text -> tuple of numbers, or a single number where there is no comma."""
        try:
            numbers = tuple(self.kind(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} isn't a list of {self.kind.__name__}s such as 50,30.", param, ctx)
        return numbers if len(numbers) > 1 else numbers[0]


class Name(click.ParamType):
    """A file's or folder's name. "" is none: as a path it would be the current folder."""

    name = "TEXT"

    def convert(self, value, param, ctx):
        """The text as it is."""
        if value == "":
            self.fail("it is empty; give a name.", param, ctx)
        return value


class Ways(click.ParamType):
    """Comma-separated ways to draw, each one value, or one a stage between slashes: `64/30,8/4`."""

    name = "WAY[,WAY...]"

    def __init__(self, kind: type):
        self.kind = kind

    def convert(self, value, param, ctx):
        """Text -> list of values, and of tuples of values where there are slashes."""
        try:
            ways = [tuple(map(self.kind, way.split("/"))) for way in str(value).split(",")]
        except ValueError:
            self.fail(f"{value!r} isn't a list of {self.kind.__name__}s such as 8,50.", param, ctx)
        return [way if len(way) > 1 else way[0] for way in dict.fromkeys(ways)]


def process_options(command):
    """The options of a command that several processes may run together, one per machine or so."""
    for option in reversed(
        [
            click.option(
                "--coordinator",
                metavar="HOST:PORT",
                help="Where process 0 listens, if several processes run this together. [default: "
                "CASCADE_COORDINATOR, or from Slurm, Open MPI or Cloud TPU, or alone]",
            ),
            click.option(
                "--processes", type=int, help="How many there are. [default: CASCADE_PROCESSES]"
            ),
            click.option(
                "--process", type=int, help="Which one this is, from 0. [default: CASCADE_PROCESS]"
            ),
        ]
    ):
        command = option(command)
    return command

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

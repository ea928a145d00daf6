"""A prompt that lies between two others, for pictures that turn one thing into another."""

import dataclasses
import numbers

import numpy as np

from cascade.errors import UserError
from cascade.text.interface import checked_text

# A text's states [L, D] float32 and its mask [L], whose True entries come first.
Condition = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Between:
    """What lies a `fraction` of the way from one text to another, in the encoder's states.

        state_i = (1 - fraction) first_i + fraction second_i

    Where one text is shorter, its last state stands for the tokens that it hasn't. At 0 it is the
    first text and at 1 the second, to the bit. Drawn with one seed, the pictures at growing
    fractions change step by step.

    Raises:
      UserError: a text without words, or a fraction outside [0, 1].
    """

    first: str
    second: str
    fraction: float

    def __post_init__(self):
        for text in (self.first, self.second):
            if not checked_text(text).strip():
                raise UserError("Nothing lies between a text and no text; give two with words.")
        if not (isinstance(self.fraction, numbers.Real) and 0 <= self.fraction <= 1):
            raise UserError(f"The fraction is {self.fraction!r}; give a number from 0 to 1.")

    def blend(self, first: Condition, second: Condition) -> Condition:
        """The condition between the two texts' own: states [L, D], zero outside the mask [L]."""
        if self.fraction in (0, 1):
            return second if self.fraction else first
        either = first[1] | second[1]
        emb_0, emb_1 = (np.where(m[:, None], e, e[m.sum() - 1]) for e, m in (first, second))
        blended = (1 - self.fraction) * emb_0 + self.fraction * emb_1
        return np.where(either[:, None], blended, 0.0).astype(np.float32), either

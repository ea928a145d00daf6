"""The text encoders that a config can name."""

from cascade.text.bert import minilm
from cascade.text.interface import TextEncoder, Tokens
from cascade.text.t5 import t5

__all__ = ["ENCODERS", "TextEncoder", "Tokens", "minilm", "t5"]

ENCODERS = {"minilm": minilm, "t5": t5}

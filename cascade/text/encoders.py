"""The text encoders that a config can name."""

from cascade.text.bert import minilm
from cascade.text.interface import TextEncoder, Tokens

__all__ = ["ENCODERS", "TextEncoder", "Tokens", "minilm"]

ENCODERS = {"minilm": minilm}

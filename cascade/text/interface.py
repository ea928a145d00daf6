"""What a frozen text encoder is: tokenize, embed, encode, and a condition that means no text."""

import abc
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from cascade.errors import UserError
from cascade.parallel.mesh import batch_shares, split_rows, whole_on_host

log = logging.getLogger(__name__)

ROWS = 16  # prompts embedded at once on a device; fixed: only lengths make shapes to compile


class Tokens(NamedTuple):
    """A batch of tokenized prompts.

    Fields:
      ids: [B, L] int32, padded at the right to the encoder's `max_length`.
      mask: [B, L] bool, True at tokens.
      truncated: [B] bool, True where the end of the prompt did not fit.
    """

    ids: np.ndarray
    mask: np.ndarray
    truncated: np.ndarray


class TextEncoder(abc.ABC):
    """A frozen language model: prompts in, one state per token out.

    An encoder is cheap to make and to pickle: weights are loaded when something is embedded.

    Attributes:
      name: its key in `ENCODERS`.
      width: D, the size of a state.
      max_length: L, tokens read of a prompt.
    """

    name: str
    width: int
    max_length: int

    @property
    @abc.abstractmethod
    def fingerprint(self) -> str:
        """sha256 of all that decides an embedding: weights, tokenizer, settings."""

    @abc.abstractmethod
    def tokenize(self, prompts: Sequence[str]) -> Tokens:
        """Token ids and mask, [B, L] each.

        Raises:
          UserError: a prompt is not a string, or holds lone surrogates.
        """

    @abc.abstractmethod
    def embed(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
        """States [B, l, D] float32 of tokens [B, l], any l ≤ L; zero outside `text_mask(mask)`."""

    def place(self, mesh: Mesh):  # noqa: B027  (an encoder small enough has nothing to do)
        """Lays the weights over a mesh's `fsdp` and `tensor` axes; call it before embedding.

        `embed` then also takes global arrays whose batch is split over the mesh, and gives such
        back. An encoder that doesn't override this has a copy of its weights on every device. A
        pickled copy forgets its place.
        """

    def text_mask(self, mask: np.ndarray | jax.Array) -> np.ndarray | jax.Array:
        """The `text_mask` of a condition, [B, l] bool, from the tokens' mask [B, l].

        They are the same, but for an encoder that hands on its states of padding too: its is True
        everywhere in a row that has a token. A prompt's True entries always come first.
        """
        return mask

    @abc.abstractmethod
    def save_tokenizer(self, folder: Path) -> list[str]:
        """Writes the tokenizer's files into an existing folder and returns their names."""

    def save_weights(self, folder: Path) -> list[str]:
        """Writes into a folder what the factory's `weights` can name later, and returns its names.

        An encoder that comes with the package, and so doesn't override this, writes nothing.
        """
        return []

    @abc.abstractmethod
    def null(self) -> tuple[np.ndarray, np.ndarray]:
        """The condition that stands for no text: (emb [L, D] float32, mask [L] bool).

        It is what `encode([""])` gives.
        """

    def encode(self, prompts: Sequence[str], what: str = "prompt") -> tuple[np.ndarray, np.ndarray]:
        """Embeds prompts and says, by a logged warning, which were cut or empty.

        A prompt's states don't depend on the prompts beside it.

        Args:
          prompts: texts.
          what: what a warning calls one of them.

        Returns:
          text_emb [B, L, D] float32 and text_mask [B, L] bool, outside of which it is zero.

        Raises:
          UserError: as `tokenize`; or the prompts are one bare string.
        """
        if isinstance(prompts, str):
            raise UserError(
                f"The prompts are one string, {shortened(prompts)}; give a list of them."
            )
        tokens = self.tokenize(prompts)
        for i, prompt in enumerate(prompts):
            if tokens.truncated[i]:
                log.warning(
                    "The %s %s is longer than the %d tokens that %s reads; its end is cut off.",
                    what,
                    shortened(prompt),
                    self.max_length,
                    self.name,
                )
            elif not tokens.mask[i].any():
                log.warning(
                    "The %s %s holds no text; it is unconditional.",
                    what,
                    shortened(prompt),
                )
        text_emb = np.zeros((*tokens.ids.shape, self.width), np.float32)
        for rows, states in self.embed_in_batches(tokens):
            text_emb[rows, : states.shape[1]] = states
        return text_emb, self.text_mask(tokens.mask)

    def embed_in_batches(
        self, tokens: Tokens, mesh: Mesh | None = None
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Embeds many prompts, those of like length together, in few distinct shapes.

        Every batch is `ROWS` prompts padded to one of a few lengths (`padded_lengths`), chosen by
        the prompt alone: few shapes to compile, and one result per prompt, whatever its mates.

        Args:
          tokens: of B prompts.
          mesh: where the encoder was placed; each of the mesh's shares of a batch is then `ROWS`
            prompts, and all processes call this together, with the same prompts.

        Yields:
          (rows [n] int, states [n, l, D] float32): which prompts, and their states.
        """
        together = ROWS * (batch_shares(mesh) if mesh else 1)
        lengths = padded_lengths(self.text_mask(tokens.mask).sum(axis=1), self.max_length)
        for length in np.unique(lengths):
            alike = np.flatnonzero(lengths == length)
            for start in range(0, len(alike), together):
                rows = alike[start : start + together]
                fill = ((0, together - len(rows)), (0, 0))
                ids = np.pad(tokens.ids[rows, :length], fill)
                mask = np.pad(tokens.mask[rows, :length], fill)
                if mesh:
                    ids, mask = split_rows(ids, mesh), split_rows(mask, mesh)
                yield rows, whole_on_host(self.embed(ids, mask))[: len(rows)]


def padded_lengths(counts: np.ndarray, max_length: int) -> np.ndarray:
    """The length each prompt is padded to: the least of 8, 12, 16, 24, 32, … and L that fits."""
    lengths = sorted({min(base << n, max_length) for base in (8, 12) for n in range(16)})
    return np.array(lengths)[np.searchsorted(lengths, counts)]


def checked_text(prompt: str, what: str = "prompt") -> str:
    """Returns the prompt if every tokenizer can read it; `what` is its name in an error.

    Raises:
      UserError: it is not a string, or holds lone surrogates, which no UTF-8 text can.
    """
    if not isinstance(prompt, str):
        raise UserError(f"A {what} is {prompt!r} ({type(prompt).__name__}); give a string.")
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"The {what} {shortened(prompt)} holds a lone surrogate (half a character) at position"
            f" {error.start}; give valid Unicode text."
        ) from None
    return prompt


def shortened(text: str, limit: int = 60) -> str:
    """The text quoted for a message: printable, and at most `limit` characters of it."""
    return repr(text) if len(text) <= limit else repr(text[:limit]) + "…"

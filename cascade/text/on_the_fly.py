"""Captions encoded as they are needed: the loader hands on tokens, the mesh makes states of them.

    captions ─► Tokenized ─► text_ids, token_mask [B, L] ─► put on the mesh
             ─► encoded ─► text_emb [B, L, D], text_mask [B, L]

Every batch has the same shapes, so the encoder compiles once; nothing waits for the host, so the
next batch is encoded while the last step runs out.
"""

import logging
from collections.abc import Sequence

import jax
import numpy as np

from cascade.text.interface import TextEncoder, shortened

log = logging.getLogger(__name__)


class Tokenized:
    """The loader's part: what it puts into a batch instead of embeddings."""

    def __init__(self, encoder: TextEncoder):
        self._encoder, self._told = encoder, False

    def __call__(self, captions: Sequence[str]) -> dict[str, np.ndarray]:
        """The captions' text_ids [B, L] int32 and token_mask [B, L] bool, True at tokens.

        The first caption that is cut is named in a warning.

        Raises:
          UserError: a caption is no valid text.
        """
        tokens = self._encoder.tokenize(captions)
        if tokens.truncated.any() and not self._told:
            self._told = True
            log.warning(
                "The caption %s is longer than the %d tokens that %s reads; its end is cut off, and"
                " so is that of every other as long.",
                shortened(captions[int(tokens.truncated.argmax())]),
                self._encoder.max_length,
                self._encoder.name,
            )
        return {"text_ids": tokens.ids, "token_mask": tokens.mask}


def encoded(encoder: TextEncoder, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """A batch of global arrays with a text's condition in place of its tokens, if it has those.

    Args:
      encoder: placed on the batch's mesh.
      batch: may hold embeddings already; it is then what is returned.
    """
    if "text_ids" not in batch:
        return batch
    rest = dict(batch)
    ids, mask = rest.pop("text_ids"), rest.pop("token_mask")
    emb = jax.device_put(encoder.embed(ids, mask), ids.sharding)  # a split one may leave D split
    return {**rest, "text_emb": emb, "text_mask": encoder.text_mask(mask)}

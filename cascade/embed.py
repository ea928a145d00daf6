"""`cascade embed`: a data set's captions through the text encoder, ahead of training."""

import shlex
import time
from typing import NamedTuple

import jax
from tqdm import tqdm

from cascade import registry
from cascade.data.loader import make_source
from cascade.data.sources import captions_of
from cascade.errors import UserError
from cascade.files import check_writable
from cascade.parallel.mesh import make_mesh
from cascade.text.cache import Added, EmbeddingCache
from cascade.text.encoders import ENCODERS


class Embedded(NamedTuple):
    """What a cache holds, and how it came to.

    Fields:
      folder, dtype: what `config.text_cache` must be to train from it.
      captions, tokens, bytes: of all that is in it, of this data set and of others.
      added: what was embedded this time.
      seconds: what reading, verifying and embedding took.
    """

    folder: str
    dtype: str
    captions: int
    tokens: int
    bytes: int
    added: Added
    seconds: float

    def __str__(self) -> str:
        """For people: what is there, and how to use it."""
        added = "nothing was missing"
        if self.added.captions:
            added = (
                f"{self.added.captions:,} of them new, with a relative error of"
                f" {self.added.error:.2g} against float32"
            )
        return (
            f"{self.captions:,} captions, {self.tokens:,} tokens, {self.bytes / 2**20:,.1f} MiB as"
            f" {self.dtype} ({added}), in {self.seconds:,.0f} s.\n"
            f"Train from it with: --config.text_cache.folder={shlex.quote(self.folder)}"
            f" --config.text_cache.dtype={self.dtype}"
        )


def embed(
    config, out: str | None = None, *, dtype: str | None = None, progress: bool = True
) -> Embedded:
    """Fills a cache with the states of all captions of a config's data, training and held-out.

    Captions that are there are verified; those that are missing or damaged are embedded on the mesh
    `config.mesh`. A run that is killed goes on where it was, but for the segment it was at.

    Args:
      config: an experiment's config, already checked by `cascade.config.load`.
      out: the cache's folder; None is `config.text_cache.folder`.
      dtype: a key of `cascade.text.segment.DTYPES`; None is `config.text_cache.dtype`.
      progress: shows bars with the rate and the time left.

    Raises:
      UserError: no folder is given; the data, the mesh or the encoder doesn't fit; the folder holds
        what another encoder made, or can't be written.
    """
    if out == "":
        raise UserError("The cache's folder has an empty name; say where to write it.")
    folder = config.text_cache.folder if out is None else out
    dtype = dtype or config.text_cache.dtype
    if not folder:
        raise UserError(
            "config.text_cache.folder is '', which encodes captions as they are needed; give --out"
            " DIR to keep them."
        )
    check_writable(folder, "cache")
    progress = progress and jax.process_index() == 0
    began = time.perf_counter()
    mesh = make_mesh(**config.mesh)
    encoder = registry.build("text encoder", ENCODERS, config.text)
    cache = EmbeddingCache(folder, encoder, dtype)
    # Training reads the empty caption too: it is the condition that stands for no text.
    captions = {"": None}
    for train in (True, False):
        source = make_source(config.data, train=train)
        reading = tqdm(
            captions_of(source), "Reading captions", unit="caption", disable=not progress
        )
        captions.update(dict.fromkeys(reading))
    cache.verify(mesh, progress=progress)
    added = cache.ensure(captions, mesh, progress=progress)
    seconds = time.perf_counter() - began
    return Embedded(folder, dtype, len(cache), cache.tokens, cache.bytes, added, seconds)

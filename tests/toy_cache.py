"""An embedding cache of a toy encoder, cheap enough to fill and damage hundreds of times."""

import os
import signal
from hashlib import sha256

import jax.numpy as jnp
import numpy as np

from cascade.text.cache import EmbeddingCache
from cascade.text.interface import TextEncoder, Tokens

CAPTIONS = [f"caption {i} " + "word " * (i % 5) for i in range(30)]


class Toy(TextEncoder):
    """One token a word, whose states are drawn from a generator seeded by the word.

    It and its copies count the prompts that they tokenize, and kill their own process at the
    `dies_at`-th.
    """

    def __init__(self, max_length=6, dies_at=None, scale=1.0, keep_padding=False):
        self.name, self.width, self.max_length = "toy", 3, max_length
        self.dies_at, self.scale, self.keep_padding = dies_at, scale, keep_padding
        self.batches = []

    @property
    def tokenized(self):
        return sum(self.batches)

    @property
    def fingerprint(self):
        return sha256(f"toy {self.max_length}".encode()).hexdigest()

    def text_mask(self, mask):
        return mask | self.keep_padding

    def tokenize(self, prompts):
        self.batches.append(len(prompts))
        if self.dies_at is not None and self.tokenized >= self.dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        shape = (len(prompts), self.max_length)
        tokens = Tokens(np.zeros(shape, np.int32), np.zeros(shape, bool), np.zeros(shape[0], bool))
        for i, prompt in enumerate(prompts):
            words = prompt.split()
            tokens.truncated[i] = len(words) > self.max_length
            for j, word in enumerate(words[: self.max_length]):
                tokens.ids[i, j] = int.from_bytes(sha256(word.encode()).digest()[:3])
                tokens.mask[i, j] = True
        return tokens

    def embed(self, ids, mask):
        drawn = [[np.random.default_rng(i).normal(size=self.width) for i in row] for row in ids]
        return np.where(self.text_mask(mask)[..., None], np.float32(drawn) * self.scale, 0)

    def save_tokenizer(self, folder):
        raise AssertionError("the cache has no business with the tokenizer's files")

    def null(self):
        return np.zeros((self.max_length, self.width), np.float32), np.zeros(self.max_length, bool)


def opened(folder, encoder=None, dtype="float16"):
    return EmbeddingCache(folder, encoder or Toy(), dtype)


def segments(folder, encoder=None, dtype="float16"):
    """The files of an encoder's cache; the usual Toy's by default."""
    own = f"{(encoder or Toy()).fingerprint[:16]}-{dtype}"
    return sorted((folder / own).glob("captions-*.safetensors"))


def as_stored(states, dtype):
    """What a dtype makes of states [..., D], written again from its definition."""
    if dtype != "int8":
        return np.float32(states.astype(jnp.dtype(dtype)))
    scales = np.abs(states).max(axis=-1, keepdims=True) / np.float32(127)
    return np.float32(np.rint(states / np.where(scales, scales, 1))) * scales


def assert_holds(cache, captions, encoder, dtype="float16"):
    emb, mask = encoder.encode(captions)
    found = cache.lookup(captions)
    np.testing.assert_array_equal(found["text_emb"], as_stored(emb, dtype))
    np.testing.assert_array_equal(found["text_mask"], mask)
    assert found["text_emb"].dtype == np.float32 and found["text_mask"].dtype == bool

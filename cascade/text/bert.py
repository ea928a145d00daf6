"""A frozen BERT as text encoder; all-MiniLM-L6-v2 comes with the package."""

import functools
import hashlib
import json
import shutil
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from safetensors import SafetensorError
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from cascade.errors import UserError
from cascade.networks.bert import from_published, params_from_tensors
from cascade.parallel.mesh import replicated
from cascade.text.interface import TextEncoder, Tokens, checked_text

VENDORED = Path(__file__).parent / "minilm"
FILES = ("config.json", "tokenizer.json", "model.safetensors")
SPECIAL = 2  # [CLS] and [SEP], around every prompt


class BertEncoder(TextEncoder):
    """Per-token states of a BERT, from a folder in the layout that BERTs are published in.

    Raises:
      UserError: the folder lacks a file, or `max_length` is beyond what the model can read.
    """

    def __init__(self, name: str, folder: Path, max_length: int):
        for file in FILES:
            if not (folder / file).is_file():
                raise UserError(
                    f"No {file} in {str(folder)!r}; a text encoder's folder holds"
                    f" {', '.join(FILES)}."
                )
        try:
            description = json.loads((folder / "config.json").read_text("utf-8"))
        except ValueError as error:
            raise UserError(
                f"{str(folder / 'config.json')!r} is not JSON ({error}); fetch it again."
            ) from None
        self._folder = folder
        self._bert = from_published(description)
        if not SPECIAL < max_length <= self._bert.positions:
            raise UserError(
                f"The text encoder's max_length is {max_length}; {name} takes"
                f" {SPECIAL + 1} to {self._bert.positions}."
            )
        self.name = name
        self.width = self._bert.width
        self.max_length = max_length

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the name, `max_length`, and the three files."""
        digest = hashlib.sha256(f"{self.name} {self.max_length}".encode())
        for file in FILES:
            with open(self._folder / file, "rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        return digest.hexdigest()

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        path = str(self._folder / "tokenizer.json")
        try:
            tokenizer = Tokenizer.from_file(path)
        except Exception as error:  # the library raises nothing more specific
            raise UserError(
                f"{path!r} is not a tokenizer that can be read ({error}); fetch it again."
            ) from None
        # The file carries settings of its own: 128 tokens, cut and padded. We do both ourselves.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        # A "[PAD]" that a user types is text, not padding.
        tokenizer.encode_special_tokens = True
        return tokenizer

    def tokenize(self, prompts: Sequence[str]) -> Tokens:
        """[CLS] words [SEP], cut to `max_length` before [SEP]; a prompt without text has no token.

        See `TextEncoder.tokenize`.
        """
        shape = (len(prompts), self.max_length)
        tokens = Tokens(np.zeros(shape, np.int32), np.zeros(shape, bool), np.zeros(shape[0], bool))
        for i, prompt in enumerate(prompts):
            ids = self._tokenizer.encode(checked_text(prompt)).ids
            if len(ids) == SPECIAL:
                continue
            tokens.truncated[i] = len(ids) > self.max_length
            kept = ids[: min(len(ids), self.max_length) - 1] + ids[-1:]
            tokens.ids[i, : len(kept)] = kept
            tokens.mask[i, : len(kept)] = True
        return tokens

    def _read_params(self) -> dict:
        """The parameters as numpy arrays."""
        path = self._folder / "model.safetensors"
        try:
            tensors = load_file(path)
        except SafetensorError as error:
            raise UserError(
                f"The text encoder's weights {str(path)!r} are damaged ({error}); fetch them again."
            ) from None
        return params_from_tensors(self._bert, tensors)

    @cached_property
    def _params(self) -> dict:
        return jax.device_put(self._read_params())

    def place(self, mesh: Mesh):
        """Puts a copy of the weights on every device of the mesh; see `TextEncoder.place`."""
        copies = functools.partial(jax.make_array_from_process_local_data, replicated(mesh))
        self._params = jax.tree.map(copies, self._read_params())

    @cached_property
    def _apply(self):
        return jax.jit(self._bert.apply)

    def embed(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
        """States of the last layer; see `TextEncoder.embed`."""
        return self._apply({"params": self._params}, ids, mask)

    def save_tokenizer(self, folder: Path) -> list[str]:
        """Copies tokenizer.json; see `TextEncoder.save_tokenizer`."""
        shutil.copyfile(self._folder / "tokenizer.json", Path(folder) / "tokenizer.json")
        return ["tokenizer.json"]

    def null(self) -> tuple[np.ndarray, np.ndarray]:
        """Zeroed embeddings and a cleared mask, as in Imagen (Saharia et al. 2022)."""
        return np.zeros((self.max_length, self.width), np.float32), np.zeros(self.max_length, bool)

    def __getstate__(self):
        """Everything but what is loaded on demand: a copy in a worker process loads its own."""
        lazy = ("_tokenizer", "_params", "_apply")
        return {key: value for key, value in vars(self).items() if key not in lazy}


def minilm(max_length: int, weights: str) -> BertEncoder:
    """all-MiniLM-L6-v2: 22.7M parameters, 6 layers, D = 384, at most 512 tokens.

    Source: huggingface.co/sentence-transformers/all-MiniLM-L6-v2, Apache-2.0.

    Args:
      max_length: L, tokens read of a prompt, [CLS] and [SEP] included.
      weights: a folder with config.json, tokenizer.json and model.safetensors; "" is the one that
        comes with this package.
    """
    return BertEncoder("minilm", Path(weights) if weights else VENDORED, max_length)

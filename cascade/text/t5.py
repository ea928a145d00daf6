"""A frozen T5 v1.1 or Flan-T5 as text encoder, of any published size, from a folder or the hub."""

import hashlib
import json
import shutil
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from sentencepiece import SentencePieceProcessor

from cascade.digests import remembered
from cascade.errors import UserError
from cascade.interop.folders import inside, open_weights, read_json
from cascade.interop.hub import resolve
from cascade.interop.t5 import T5Tensors, read_params, write_t5
from cascade.networks.t5 import RULES, from_published, published
from cascade.parallel.layout import Layout
from cascade.parallel.mesh import make_mesh
from cascade.shards import DTYPES
from cascade.text.interface import TextEncoder, Tokens, checked_text

VOCABULARY = "spiece.model"
PAD, END, UNKNOWN = 0, 1, 2  # the ids of T5's own vocabulary
PARTS = ("text_encoder", "tokenizer")  # of a folder that diffusers wrote
NULLS = ("zeros", "empty_prompt")
PLACED = ("_placed", "_params", "_apply")
LAZY = ("_tensors", "_pieces", *PLACED)  # loaded on demand


class T5Encoder(TextEncoder):
    """Per-token states of a T5 encoder.

    Making one reads config.json; the vocabulary is read when something is tokenized, the weights
    when something is embedded, each tensor straight to its place on the devices.
    """

    name = "t5"

    def __init__(
        self,
        model: Path,
        vocabulary: Path,
        *,
        max_length: int,
        null: str,
        keep_padding: bool,
        lower_case: bool,
        dtype: str,
    ):
        """Describes an encoder; `t5` says what the keywords mean.

        Args:
          model: the folder of config.json and the weights.
          vocabulary: the folder of spiece.model.

        Raises:
          UserError: config.json is missing or describes what isn't built, or spiece.model is
            missing.
        """
        if not (vocabulary / VOCABULARY).is_file():
            raise UserError(
                f"{str(vocabulary)!r} has no {VOCABULARY}, which current transformers leaves out"
                " when it saves a tokenizer; copy it there from where the model was published."
            )
        self._model, self._vocabulary = model, inside(vocabulary, VOCABULARY)
        self._t5 = from_published(read_json(model, "config.json"), dtype, unroll=False)
        self._null, self._keep_padding, self._dtype = null, keep_padding, dtype
        self._lower_case = lower_case
        self._mesh = None
        self.width = self._t5.width
        self.max_length = max_length

    @cached_property
    def _tensors(self) -> T5Tensors:
        return T5Tensors(self._t5, open_weights(self._model))

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of settings, architecture, vocabulary, and the weights as they are used.

        How the weights are split into files changes nothing, nor does a wider dtype than is used.
        Their digest is remembered (`cascade.digests`), since it reads all of them.
        """
        reads = [self.max_length, self._null, self._keep_padding, self._lower_case]
        settings = [self.name, *reads, self._dtype, published(self._t5)]
        digest = hashlib.sha256(json.dumps(settings).encode())
        digest.update(hashlib.sha256(self._vocabulary.read_bytes()).digest())
        files = open_weights(self._model).files
        weights = remembered(f"T5 {self._dtype}", files, lambda: self._tensors.digest())
        digest.update(weights.encode())
        return digest.hexdigest()

    @cached_property
    def _pieces(self) -> SentencePieceProcessor:
        try:
            pieces = SentencePieceProcessor(model_file=str(self._vocabulary))
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"{str(self._vocabulary)!r} is not a SentencePiece model that can be read"
                f" ({error}); fetch it again."
            ) from None
        special = (pieces.pad_id(), pieces.eos_id(), pieces.unk_id())
        if special != (PAD, END, UNKNOWN) or len(pieces) > self._t5.vocab_size:
            raise UserError(
                f"{str(self._vocabulary)!r} is not T5's vocabulary: it has {len(pieces)} pieces"
                f" and the ids {special} for padding, end and unknown, where {(PAD, END, UNKNOWN)}"
                f" and at most {self._t5.vocab_size} are needed; take it from the model's folder."
            )
        return pieces

    def tokenize(self, prompts: Sequence[str]) -> Tokens:
        """Pieces and </s>, cut to `max_length` before </s>; see `TextEncoder.tokenize`.

        A prompt without text has no token where the null condition is zeros, and </s> alone where
        it is the empty prompt's states: either way it is the null condition. What a user types
        is text: "</s>" and "<pad>" are spelled out, and never become the tokens of that name.
        """
        shape = (len(prompts), self.max_length)
        tokens = Tokens(np.zeros(shape, np.int32), np.zeros(shape, bool), np.zeros(shape[0], bool))
        for i, prompt in enumerate(prompts):
            text = checked_text(prompt)
            ids = self._pieces.encode(text.lower().strip() if self._lower_case else text)
            if not ids and self._null == "zeros":
                continue
            tokens.truncated[i] = len(ids) >= self.max_length
            kept = [*ids[: self.max_length - 1], END]
            tokens.ids[i, : len(kept)] = kept
            tokens.mask[i, : len(kept)] = True
        return tokens

    def place(self, mesh: Mesh):
        """See `TextEncoder.place`; what next embeds reads the weights, unless they lie there."""
        if mesh != self._mesh:
            for key in PLACED:
                vars(self).pop(key, None)
            self._mesh = mesh

    @cached_property
    def _placed(self) -> Mesh:
        """Where the weights are: on a mesh, or on this process's first device."""
        here = jax.local_devices()[:1]
        return self._mesh or make_mesh(data=1, fsdp=1, tensor=1, devices=here)

    @cached_property
    def _params(self) -> dict:
        return read_params(self._t5, self._tensors, self._placed)

    @cached_property
    def _apply(self):
        unroll = self._placed.devices.flat[0].platform == "cpu"
        t5 = self._t5.clone(unroll=unroll, layout=Layout.of(self._placed, RULES))

        def apply(params, ids, mask):
            states = t5.apply({"params": params}, ids, mask)
            return jnp.where(self.text_mask(mask)[..., None], states, 0)

        return jax.jit(apply)

    def embed(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
        """States of the last layer after its norm; see `TextEncoder.embed`."""
        return self._apply(self._params, ids, mask)

    def text_mask(self, mask: np.ndarray | jax.Array) -> np.ndarray | jax.Array:
        """The tokens, or with `keep_padding` all of a row that has one."""
        return mask | mask.any(-1, keepdims=True) if self._keep_padding else mask

    def save_tokenizer(self, folder: Path) -> list[str]:
        """Copies spiece.model; see `TextEncoder.save_tokenizer`."""
        shutil.copyfile(self._vocabulary, Path(folder) / VOCABULARY)
        return [VOCABULARY]

    def save_weights(self, folder: Path) -> list[str]:
        """Writes config.json, the weights as they are used, and the vocabulary."""
        files = write_t5(Path(folder), self._t5, self._tensors)
        return [*files, *self.save_tokenizer(folder)]

    def null(self) -> tuple[np.ndarray, np.ndarray]:
        """Zeros and a cleared mask (Imagen), or the states of "" (DeepFloyd IF)."""
        if self._null == "zeros":
            shape = (self.max_length, self.width)
            return np.zeros(shape, np.float32), np.zeros(self.max_length, bool)
        return self._empty_prompt

    @cached_property
    def _empty_prompt(self) -> tuple[np.ndarray, np.ndarray]:
        emb, mask = self.encode([""])
        return emb[0], mask[0]

    def __getstate__(self):
        """Everything but what is loaded on demand: a copy in a worker process loads its own."""
        kept = {key: value for key, value in vars(self).items() if key not in LAZY}
        return kept | {"_mesh": None}


def t5(
    *,
    max_length: int,
    weights: str,
    null: str,
    keep_padding: bool,
    lower_case: bool,
    dtype: str,
) -> T5Encoder:
    """A T5 v1.1 or Flan-T5 encoder: 35M (small) to 4.8B (XXL) parameters, D = 512 … 4096.

    Tokens are sentencepiece's, as of transformers' T5Tokenizer before version 5, but for one rule:
    "</s>" and other control tokens' names in a prompt are text.

    Source: Raffel et al. 2020; huggingface.co/google/t5-v1_1-xxl, flan-t5-xxl, Apache-2.0.

    Args:
      max_length: L, tokens read of a prompt, </s> included.
      weights: a folder, or a hub id ("google/flan-t5-xl", or "…@revision"), of config.json,
        safetensors and spiece.model; or one with the folders text_encoder/ and tokenizer/, as
        diffusers writes.
      null: what stands for no text: "zeros", with a cleared mask (Imagen), or "empty_prompt", the
        states of "" (DeepFloyd IF).
      keep_padding: hand on the states at padding and an all-True mask (DeepFloyd IF: stages attend
        to all positions); else padding is zeroed and masked.
      lower_case: put prompts in lower case first, which T5 itself tells apart (DeepFloyd IF).
      dtype: of weights and of what they multiply: "float32" or "bfloat16".

    Raises:
      UserError: a value that isn't one of these, or `T5Encoder`'s and `resolve`'s.
    """
    for key, value, known in (("null", null, NULLS), ("dtype", dtype, tuple(DTYPES))):
        if value not in known:
            raise UserError(
                f"The text encoder's {key} is {value!r}; give {' or '.join(map(repr, known))}."
            )
    if not 2 <= max_length <= 4096:
        raise UserError(f"The text encoder's max_length is {max_length}; t5 takes 2 to 4096.")
    if not weights:
        raise UserError(
            "The text encoder's weights are '', and no T5 comes with this package; give a folder or"
            " a hub id as `weights`, or to `cascade.load` and `cascade sample` as text_weights."
        )
    folder = resolve(weights, PARTS)
    parts = [folder / part for part in PARTS]
    model, vocabulary = parts if all(part.is_dir() for part in parts) else (folder, folder)
    return T5Encoder(
        model,
        vocabulary,
        max_length=max_length,
        null=null,
        keep_padding=keep_padding,
        lower_case=lower_case,
        dtype=dtype,
    )

"""Pictures as vectors: networks whose features distances are measured on, over a mesh.

A network is trained to name what photographs show; pictures alike to it have features alike. Which
network it was is part of every number's name: `FID-EffLite0` and `FID-Inception` have nothing to do
with one another.
"""

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from safetensors import SafetensorError
from safetensors.numpy import load_file
from tqdm import tqdm

from cascade.errors import UserError
from cascade.evaluation.download import fetch
from cascade.evaluation.torch_weights import is_torch_file, read_state_dict
from cascade.networks import convolutions, efficientnet_lite, inception
from cascade.parallel.mesh import (
    batch_sharding,
    batch_shares,
    on_all_processes,
    on_first_process,
    put,
    replicated,
    split_rows,
    whole_on_host,
)

VENDORED = Path(__file__).parent / "efficientnet_lite0" / "model.safetensors"
# ImageNet's, of RGB in [0, 1].
MEAN = np.array([0.485, 0.456, 0.406], np.float32)
DEVIATION = np.array([0.229, 0.224, 0.225], np.float32)
RESIZES = ("antialiased", "bilinear")
ROWS = 16  # pictures that go through a network at once, on each device


class Extractor:
    """A network on a mesh: uint8 pictures in, features out; or what else is kept of each picture.

    Attributes:
      name: what metrics on these features are called by: "EffLite0".
      fingerprint: digest of weights and preprocessing.
    """

    def __init__(
        self,
        name: str,
        network: Callable,
        prepare: Callable[[jax.Array], jax.Array],
        params: convolutions.Params,
        fingerprint: str,
        mesh: Mesh,
    ):
        """Puts the weights, whole, on every device of the mesh.

        Args:
          network: see `cascade.networks.convolutions`.
          prepare: uint8 [B, H, W, 3] -> what the network takes.
        """
        self.name, self.fingerprint, self._mesh = name, fingerprint, mesh
        place = replicated(mesh)
        self._params = jax.tree.map(lambda leaf: put(leaf, place), params)

        def features(params, pictures):
            return convolutions.run(network, params, prepare(pictures))

        self._features = jax.jit(features, out_shardings=batch_sharding(mesh))

    def __call__(self, pictures: np.ndarray | jax.Array) -> jax.Array:
        """What the network makes of uint8 [B, H, W, 3], split over the mesh: [B, ...].

        Features are [B, D] float32, thumbnails (`cascade.evaluation.composition`) uint8 pictures.

        Each picture's follow from it alone, to within rounding. B divides over the mesh's `data`
        and `fsdp`. Pictures that are on the mesh's devices already stay where they are; a NumPy
        array is one that every process holds whole.
        """
        if isinstance(pictures, np.ndarray):
            pictures = split_rows(pictures, self._mesh)
        return self._features(self._params, pictures)

    def all_of(self, pictures: np.ndarray, what: str = "") -> np.ndarray:
        """Of uint8 [N, H, W, 3], any number, in batches: [N, ...] on this host.

        Args:
          what: names a progress bar; "" shows none.
        """
        rows, found = ROWS * batch_shares(self._mesh), []
        for start in tqdm(range(0, len(pictures), rows), what, disable=not what):
            batch = pictures[start : start + rows]
            # The last one is filled up, so that it's no shape of its own.
            filled = batch[np.minimum(np.arange(rows), len(batch) - 1)]
            found.append(whole_on_host(self(filled))[: len(batch)])
        return np.concatenate(found)


def resize(x: jax.Array, side: int, kind: str) -> jax.Array:
    """[B, H, W, C] of [0, 1] -> [B, side, side, C], between pixel centres, in float32.

    Args:
      kind: "antialiased": Keys' cubic (a = -0.5), widened where it shrinks, and clipped to [0, 1]:
        Pillow's BICUBIC on float pixels, as Parmar et al. 2022 (clean-fid) recommend. "bilinear":
        linear and not antialiased, as pytorch-fid does.
    """
    down, across = (_weights(size, side, kind) for size in x.shape[1:3])
    x = jnp.einsum("bhwc,ih,jw->bijc", x, down, across, precision=jax.lax.Precision.HIGHEST)
    return x if kind == "bilinear" else jnp.clip(x, 0.0, 1.0)


def _weights(size: int, new: int, kind: str) -> np.ndarray:
    """What each new pixel takes of each old one, [new, size]; rows sum to 1."""
    centres = (np.arange(new) + 0.5) * (size / new) - 0.5
    spread = max(size / new, 1.0) if kind == "antialiased" else 1.0
    d = np.abs(centres[:, None] - np.arange(size)) / spread
    if kind == "bilinear":
        weights = np.maximum(1.0 - d, 0.0)
    else:  # Keys 1981, equation 4 with a = -0.5
        inner, outer = 1.5 * d**3 - 2.5 * d**2 + 1.0, -0.5 * d**3 + 2.5 * d**2 - 4.0 * d + 2.0
        weights = np.where(d <= 1.0, inner, np.where(d < 2.0, outer, 0.0))
    return np.float32(weights / weights.sum(1, keepdims=True))


def efficientnet_lite0(mesh: Mesh) -> Extractor:
    """EfficientNet-Lite0's 1280 pooled features; its weights come with this package.

    x = (resize(pixels / 255, 224², antialiased) − mean) / deviation, by ImageNet's constants.
    """

    def prepare(pictures):
        x = resize(pictures.astype(jnp.float32) / 255.0, efficientnet_lite.SIDE, "antialiased")
        return (x - MEAN) / DEVIATION

    network, side, eps = efficientnet_lite.lite0, efficientnet_lite.SIDE, efficientnet_lite.EPS

    def folded():
        tensors, digest = _read(VENDORED)
        return convolutions.fold("EfficientNet-Lite0", network, side, eps, tensors), digest

    params, digest = on_all_processes(folded, mesh)
    return Extractor("EffLite0", network, prepare, params, digest, mesh)


def fid_inception(file: str | Path, mesh: Mesh, kind: str = "antialiased") -> Extractor:
    """The 2048 features that FID is defined on, by weights that the user has.

    x = 2·resize(pixels / 255, 299²) − 1. With kind "bilinear" and the standard weights that is what
    pytorch-fid computes, and the metrics are called "…-Inception-bilinear"; "antialiased" resizes
    as clean-fid does, and they are called "…-Inception".

    Args:
      file: `pt_inception-2015-12-05-6726825d.pth`, which is read without unpickling, or a
        safetensors file of its tensors by their names; or "download", see
        `cascade.evaluation.download`.
      kind: see `resize`.

    Raises:
      UserError: no such file or kind, another format, or not this network's tensors; or it can't be
        fetched.
    """
    if kind not in RESIZES:
        raise UserError(f"Unknown resize {kind!r}; choose from {', '.join(RESIZES)}.")

    def prepare(pictures):
        x = resize(pictures.astype(jnp.float32) / 255.0, inception.SIDE, kind)
        return 2.0 * x - 1.0

    network, side = inception.fid_inception, inception.SIDE

    def folded():
        tensors, digest = _read(fetch() if file == "download" else Path(file).expanduser())
        return convolutions.fold("the FID Inception", network, side, inception.EPS, tensors), digest

    if file == "download":  # by one process, where they share a home; the others find it there
        on_first_process(fetch, mesh)
    params, digest = on_all_processes(folded, mesh)
    name = "Inception" if kind == "antialiased" else f"Inception-{kind}"
    return Extractor(name, network, prepare, params, f"{digest} {kind}", mesh)


@functools.lru_cache(maxsize=1)
def _read(path: Path) -> tuple[dict[str, np.ndarray], str]:
    """The tensors of a safetensors file or of one of PyTorch's, and its sha256."""
    try:
        with open(path, "rb") as stream:
            pickled = is_torch_file(stream.read(4))
            stream.seek(0)
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return read_state_dict(path) if pickled else load_file(path), digest
    except OSError as error:
        raise UserError(
            f"Can't read the weights {str(path)!r} ({error.strerror or error}); give a safetensors "
            "file or one of PyTorch's."
        ) from error
    except (SafetensorError, TypeError, AttributeError, KeyError) as error:
        raise UserError(
            f"{str(path)!r} holds weights neither as safetensors nor as torch.save writes them; "
            "give the file as it was published."
        ) from error

"""Draws pictures with an exported cascade. Needs jax, numpy and safetensors, and nothing of ours.

    cascade export --to stablehlo --bundle my-bundle --out exported --prompt "a red apple"
    python examples/call_stablehlo.py exported --num 2 --seed 0 --out pictures

It draws what `cascade sample` draws with the same prompt and seed.
"""

import argparse
import hashlib
import json
import struct
import zlib
from pathlib import Path

import jax
import numpy as np
from jax import export
from safetensors.numpy import load


def checked(folder: Path, entry: dict) -> bytes:
    """The bytes of a file that the manifest lists, if they are what was written."""
    data = (folder / entry["name"]).read_bytes()
    if hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise SystemExit(f"{entry['name']} is damaged; get the export again.")
    return data


def weights_of(folder: Path, stage: dict) -> dict[str, np.ndarray]:
    """A stage's tensors by name: just what its programs take first."""
    tensors = {}
    for entry in stage["weights"]:
        data = checked(folder, entry)
        if entry["name"].endswith(".safetensors"):  # the other is the index of several
            tensors |= load(data)
    return tensors


def keys(seed: int, first: int, count: int, stage: int) -> np.ndarray:
    """uint32 [count, 2]. Any numbers will do; these are the ones that `cascade sample` takes."""
    pictures = [jax.random.fold_in(jax.random.key(seed), first + i) for i in range(count)]
    return np.stack([jax.random.key_data(jax.random.fold_in(key, stage)) for key in pictures])


def write_png(path: Path, picture: np.ndarray):
    """Writes uint8 [H, W, 3]."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    height, width, _ = picture.shape
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = b"".join(b"\0" + row.tobytes() for row in picture)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def main():
    """Draws one of the exported prompts, stage after stage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="what cascade export --to stablehlo wrote")
    parser.add_argument("--prompt", type=int, default=0, help="which of the exported prompts")
    parser.add_argument("--num", type=int, default=1, help="pictures, drawn together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("pictures"))
    options = parser.parse_args()

    manifest = json.loads((options.folder / "stablehlo.json").read_text())
    text = load(checked(options.folder, manifest["text"]))
    if manifest["stages"][0]["stage"] != 0 or options.prompt not in range(len(manifest["prompts"])):
        raise SystemExit("Export the base stage too, and as many prompts (--prompt) as are needed.")

    def repeated(row: np.ndarray) -> np.ndarray:
        return np.repeat(row[None], options.num, axis=0)

    cond = {key: repeated(text[key][options.prompt]) for key in ("text_emb", "text_mask")}
    null_cond = {f"text_{key}": repeated(text[f"null_{key}"]) for key in ("emb", "mask")}
    for stage in manifest["stages"]:
        program = export.deserialize(
            bytearray(checked(options.folder, stage["programs"]["sample"]["jax_export"]))
        )
        settings = stage["settings"]
        arguments = [
            weights_of(options.folder, stage),
            cond,
            null_cond,
            keys(options.seed, 0, options.num, stage["stage"]),
            np.float32(settings["guidance"]),
        ]
        if "lowres" in cond:
            arguments.append(np.float32(settings["aug_level"]))
        x = np.asarray(jax.jit(program.call)(*arguments)["x"])
        pictures = np.rint(127.5 * (x + 1)).astype(np.uint8)
        # The next stage enlarges what a file would hold.
        cond = {**cond, "lowres": pictures.astype(np.float32) / 127.5 - 1}

    options.out.mkdir(parents=True, exist_ok=True)
    for i, picture in enumerate(pictures):
        path = options.out / f"{options.seed}-{i}.png"
        write_png(path, picture)
        print(path)


if __name__ == "__main__":
    main()

"""Host memory that loading a T5 encoder takes beyond the parameters themselves.

    python bench/t5_memory.py --size xl                        # 4.9 GB of float32 files
    python bench/t5_memory.py --size xl --devices 4            # laid over four (fake) devices
    python bench/t5_memory.py --size xxl --stored bfloat16     # 9.5 GB of files, 10 GB of memory

Writes a synthetic checkpoint of a published size, sharded with an index as the hub has them, and
loads it as the text encoder does. While it loads, the process's anonymous memory (RssAnon of
/proc/self/status: mapped files aren't counted, since the system takes them back at will) is looked
at every millisecond. On a CPU the devices' memory is the host's, so the parameters are in that
figure; the line "beyond the parameters" is the peak less what the process had before and less the
parameters' own bytes. On an accelerator the parameters are elsewhere and nothing is taken off.
Results go to bench/results/.
"""

import importlib.metadata
import json
import multiprocessing
import os
import platform
import tempfile
import threading
import time
from pathlib import Path

import click

SIZES = {  # width, MLP, layers, heads, as T5 v1.1 and Flan-T5 were published
    "small": (512, 1024, 8, 6),
    "base": (768, 2048, 12, 12),
    "large": (1024, 2816, 24, 16),
    "xl": (2048, 5120, 24, 32),
    "xxl": (4096, 10240, 24, 64),
}
SHARD_BYTES = 2_000_000_000


def anonymous_bytes() -> int:
    """RssAnon of this process, Linux alone."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise click.ClickException("This system doesn't tell a process's anonymous memory.")


class Peak(threading.Thread):
    """Watches this process's anonymous memory until it is told to stop."""

    def __init__(self):
        super().__init__(daemon=True)
        self.bytes, self._stopped = 0, threading.Event()

    def run(self):
        while not self._stopped.is_set():
            self.bytes = max(self.bytes, anonymous_bytes())
            time.sleep(0.001)

    def stop(self) -> int:
        """The most that was seen."""
        self._stopped.set()
        self.join()
        return max(self.bytes, anonymous_bytes())


def write_checkpoint(folder: Path, size: str, stored: str):
    """Random weights of a size under their published names, piece by piece."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from cascade.interop.folders import PIECE_BYTES, write_weights
    from cascade.interop.t5 import published_specs

    specs = {
        name: jax.ShapeDtypeStruct(spec.shape, jnp.dtype(stored))
        for name, spec in published_specs(module(size, "float32")).items()
    }
    block = np.random.default_rng(0).normal(size=PIECE_BYTES).astype(stored)

    def read(name, part):
        shape = [s.stop - s.start for s in part]
        return block[: np.prod(shape)].reshape(shape)

    write_weights(folder, "model", specs, read, SHARD_BYTES)


def module(size: str, dtype: str):
    """The network of a published size."""
    from cascade.networks.t5 import from_published

    width, mlp, layers, heads = SIZES[size]
    description = {
        "model_type": "t5",
        "feed_forward_proj": "gated-gelu",
        "vocab_size": 32128,
        "d_model": width,
        "d_kv": 64,
        "d_ff": mlp,
        "num_layers": layers,
        "num_heads": heads,
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
        "layer_norm_epsilon": 1e-6,
    }
    return from_published(description, dtype, unroll=False)


def measure(folder: Path, size: str, dtype: str) -> dict[str, int]:
    """Loads the checkpoint over all devices, half of them along `tensor`, and says what it took."""
    import jax

    from cascade.interop.folders import open_weights
    from cascade.interop.t5 import T5Tensors, read_params
    from cascade.parallel.mesh import make_mesh

    t5 = module(size, dtype)
    mesh = make_mesh(data=1, fsdp=-1, tensor=2 if len(jax.devices()) > 1 else 1)
    weights = open_weights(folder)
    tensors = T5Tensors(t5, weights)
    jax.block_until_ready(jax.numpy.zeros(()) + 1)  # the backend is up
    before = anonymous_bytes()
    watch = Peak()
    watch.start()
    params = jax.block_until_ready(read_params(t5, tensors, mesh))
    peak = watch.stop()
    parameters = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    here = parameters if jax.default_backend() == "cpu" else 0
    specs = tensors.specs.values()
    return {
        "files": sum(path.stat().st_size for path in weights.files),
        "parameters": parameters,
        "largest tensor": max(spec.size * spec.dtype.itemsize for spec in specs),
        "anonymous before": before,
        "anonymous peak": peak,
        "beyond the parameters": peak - before - here,
    }


@click.command(help=__doc__.replace("\n\n", "\n\n\b\n", 1))
@click.option("--size", default="xl", show_default=True, type=click.Choice(list(SIZES)))
@click.option("--stored", default="float32", type=click.Choice(["float32", "bfloat16"]))
@click.option("--dtype", default="bfloat16", type=click.Choice(["float32", "bfloat16"]))
@click.option("--devices", default=1, show_default=True, help="Fake devices, on a CPU.")
@click.option(
    "--folder", type=click.Path(path_type=Path), help="For the files, deleted at the end."
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path(__file__).parent / "results",
    help="Folder for the JSON and the table.  [default: bench/results]",
)
def main(size: str, stored: str, dtype: str, devices: int, folder: Path | None, out: Path) -> None:
    """Writes the files, measures, and writes both kinds of report."""
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    import jax

    with tempfile.TemporaryDirectory(dir=folder) as place:
        click.echo("writing the files …")
        # In a process of its own, which leaves no freed memory here for loading to use.
        writer = multiprocessing.get_context("spawn").Process(
            target=write_checkpoint, args=(Path(place), size, stored)
        )
        writer.start()
        writer.join()
        click.echo("loading them …")
        found = measure(Path(place), size, dtype)
    options = f"--size {size} --stored {stored} --dtype {dtype} --devices {devices}"
    versions = {name: importlib.metadata.version(name) for name in ("jax", "safetensors")}
    where = f"{jax.default_backend()}, {platform.machine()}"
    report = {"command": f"python bench/t5_memory.py {options}", "where": where, **versions}
    rows = [f"| {name} | {number / 1e6:,.0f} |" for name, number in found.items()]
    head = ", ".join(f"{key} {value}" for key, value in versions.items())
    text = "\n".join(
        [f"`{report['command']}` on {where}; {head}", "", "| bytes | MB |", "|---|---|", *rows, ""]
    )
    stem = f"t5_memory-{jax.default_backend()}-{size}-{stored}-{dtype}-{devices}"
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{stem}.json").write_text(json.dumps(report | found, indent=1) + "\n")
    (out / f"{stem}.md").write_text(text)
    click.echo(text)


if __name__ == "__main__":
    main()

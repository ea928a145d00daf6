"""Pictures a second of one fixed U-Net, training and sampling, and of imagen-pytorch's beside it.

    python bench/unet.py                       # batch 4, float32; minutes on two CPU cores
    python bench/unet.py --batch 128 --dtype bfloat16      # on an accelerator
    python bench/unet.py --batch 64 --peak 312             # a device whose peak isn't in the table

The network: 64×64, dim 64, mults 1,2,3,4, two blocks, self- and text-attention on the lower three
levels, spelled as Imagen's base (BigGAN blocks, attention after every block). A training picture
is one forward and backward pass and an Adam update; a sampling picture is one forward pass, of
which a sampler takes one or two a step. imagen-pytorch's U-Net of the same dims has
`cond_dim=256`, which makes its parameters as many. Both see the same batch and text. Each has a
process of its own, so that its threads don't fight the other's; the two take turns, one waiting
while the other works, and each figure is the median of `--repeats`. Results go to bench/results/.
"""

import importlib.metadata
import importlib.util
import json
import multiprocessing
import multiprocessing.connection
import os
import platform
import statistics
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from unittest.mock import MagicMock

import click
import jax
import jax.numpy as jnp
import optax

from cascade.networks import UNet
from cascade.networks.cost import count
from cascade.training.metrics import PEAK_FLOPS

TEXT_LENGTH, TEXT_WIDTH, SIZE = 32, 384, 64
LOWER_THREE = (False, True, True, True)
JOBS = ("training", "sampling")
REST = 0.5  # seconds for the threads of the one to fall asleep before the other is timed


def fixed_network(dtype: str) -> UNet:
    """The network that this benchmark is about."""
    return UNet(
        out_channels=3,
        super_resolution=False,
        patch=1,
        channels=64,
        channel_mults=(1, 2, 3, 4),
        num_blocks=(2, 2, 2, 2),
        strides=(1, 2, 2, 2),
        resampling="block",
        skips="block",
        entry_skips=True,
        skip_scale=1.0,
        residual_scale=1.0,
        middle=True,
        middle_attention=(True, True),
        self_attention=LOWER_THREE,
        text_attention=LOWER_THREE,
        attention_per_block=True,
        head_channels=64,
        attention_implementation="auto",
        text_channels=0,
        text_norm="layer",
        pool_heads=6,
        pool_projected=True,
        noise_embedding="logsnr",
        embed_aug=True,
        embed_guidance=False,
        embedding_channels=0,
        embedding_activations=("silu",),
        norm_groups=32,
        activation="silu",
        dropout=0.0,
        dtype=dtype,
        remat="none",
        scan_blocks=False,
    )


def ours(batch: int, dtype: str) -> tuple[dict[str, Callable], dict]:
    """Cascade's jobs (each call does one batch and waits) and what is known of the network."""
    network = fixed_network(dtype)
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (batch, SIZE, SIZE, 3))
    logsnr = jnp.linspace(-5, 5, batch)
    cond = {
        "text_emb": jax.random.normal(keys[1], (batch, TEXT_LENGTH, TEXT_WIDTH)),
        "text_mask": jnp.ones((batch, TEXT_LENGTH), bool),
    }
    params = jax.jit(network.init)(keys[2], x, logsnr, cond)
    optimizer = optax.adam(1e-4)

    def loss(params):
        return jnp.mean(jnp.square(network.apply(params, x, logsnr, cond) - x))

    def step(params, state):
        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    forward = jax.jit(network.apply)
    train_step = jax.jit(step, donate_argnums=(0, 1))
    held = [jax.tree.map(jnp.copy, params), optimizer.init(params)]

    def train():
        held[:] = train_step(*held)
        jax.block_until_ready(held)

    def sample():
        jax.block_until_ready(forward(params, x, logsnr, cond))

    facts = {
        "device": jax.devices()[0].device_kind,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "training flops": count(step, params, optimizer.init(params)).total() / batch,
        "sampling flops": count(network.apply, params, x, logsnr, cond).total() / batch,
    }
    return {"training": train, "sampling": sample}, facts


def import_imagen_pytorch() -> type:
    """Its Unet class, without the picture, T5 and trainer packages that its import asks for."""
    for name in ("torchvision", "torchvision.transforms", "kornia", "kornia.augmentation"):
        sys.modules.setdefault(name, MagicMock())
    package = types.ModuleType("imagen_pytorch")
    spec = importlib.util.find_spec("imagen_pytorch")
    package.__path__ = list(spec.submodule_search_locations)
    t5 = types.ModuleType("imagen_pytorch.t5")
    t5.DEFAULT_T5_NAME, t5.t5_encode_text = "", None
    t5.get_encoded_dim = lambda name: TEXT_WIDTH
    sys.modules.update({"imagen_pytorch": package, "imagen_pytorch.t5": t5})
    return importlib.import_module("imagen_pytorch.imagen_pytorch").Unet


def theirs(batch: int, dtype: str) -> tuple[dict[str, Callable], dict]:
    """imagen-pytorch's jobs and facts, as `ours`."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    network = import_imagen_pytorch()(
        dim=64,
        text_embed_dim=TEXT_WIDTH,
        cond_dim=256,
        dim_mults=(1, 2, 3, 4),
        num_resnet_blocks=2,
        layer_attns=LOWER_THREE,
        layer_cross_attns=LOWER_THREE,
    ).to(device)
    optimizer = torch.optim.Adam(network.parameters(), 1e-4)
    x = torch.randn(batch, 3, SIZE, SIZE, device=device)
    logsnr = torch.linspace(-5, 5, batch, device=device)
    text = {
        "text_embeds": torch.randn(batch, TEXT_LENGTH, TEXT_WIDTH, device=device),
        "text_mask": torch.ones(batch, TEXT_LENGTH, dtype=torch.bool, device=device),
    }

    def forward():
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
            return network(x, logsnr, **text)

    def train():
        optimizer.zero_grad()
        (forward().float() - x).square().mean().backward()
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    def sample():
        with torch.no_grad():
            forward()
        if device == "cuda":
            torch.cuda.synchronize()

    with FlopCounterMode(display=False) as counter:
        sample()
    flops = counter.get_total_flops() / batch
    parameters = sum(p.numel() for p in network.parameters())
    facts = {"parameters": parameters, "training flops": 3 * flops, "sampling flops": flops}
    return {"training": train, "sampling": sample}, facts


SIDES = {"cascade": ours, "imagen-pytorch": theirs}


def serve(side: str, batch: int, dtype: str, pipe: multiprocessing.connection.Connection) -> None:
    """A child's life: builds and warms up its jobs, tells its facts, times what it's asked for."""
    jobs, facts = SIDES[side](batch, dtype)
    for job in JOBS:
        jobs[job]()  # compiles
    pipe.send(facts)
    while job := pipe.recv():
        start = time.perf_counter()
        jobs[job]()
        pipe.send(time.perf_counter() - start)


def measure(sides: list[str], batch: int, dtype: str, repeats: int) -> tuple[dict, dict]:
    """Facts of each side, and median seconds of each (side, job).

    The sides take turns, so that a machine busy with other things slows both.
    """
    # Two processes can't both claim most of a GPU's memory beforehand, as jax does.
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    spawn = multiprocessing.get_context("spawn")
    pipes, facts = {}, {}
    for side in sides:
        pipes[side], theirs_end = spawn.Pipe()
        arguments = (side, batch, dtype, theirs_end)
        spawn.Process(target=serve, args=arguments, daemon=True).start()
        theirs_end.close()
        click.echo(f"{side} compiles and warms up …")
        facts[side] = pipes[side].recv()
    times = {(side, job): [] for job in JOBS for side in sides}
    with click.progressbar(range(repeats), label="measuring") as rounds:
        for _ in rounds:
            for (side, job), taken in times.items():
                time.sleep(REST)
                pipes[side].send(job)
                taken.append(pipes[side].recv())
    for pipe in pipes.values():
        pipe.send(None)
    return facts, {name: statistics.median(taken) for name, taken in times.items()}


def versions() -> dict[str, str]:
    """Versions of what was measured, where installed."""
    installed = {d.name.lower(): d.version for d in importlib.metadata.distributions()}
    names = ("jax", "flax", "optax", "torch", "imagen-pytorch")
    found = {name: installed[name] for name in names if name in installed}
    return {"python": platform.python_version()} | found


def markdown(report: dict) -> str:
    """The report as a table under what it was measured with."""
    lines = [
        f"`{report['command']}` on {report['device']} ({report['cores']} CPU cores, load "
        f"{report['load']:.1f} beforehand), batch {report['batch']}, {report['dtype']}; "
        + ", ".join(f"{name} {version}" for name, version in report["versions"].items()),
        "",
        "| network | parameters (M) | job | GFLOP a picture | pictures/s | TFLOP/s | of peak |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        peak = f"{row['utilisation']:.1%}" if row["utilisation"] else "-"
        lines.append(
            f"| {row['network']} | {row['parameters'] / 1e6:.1f} | {row['job']} "
            f"| {row['flops'] / 1e9:.1f} | {row['pictures_per_second']:.3g} "
            f"| {row['tflops_per_second']:.3g} | {peak} |"
        )
    ratios = [f"{job} {ratio:.2f}" for job, ratio in report["ratios"].items()]
    if ratios:
        lines += ["", "Pictures a second, cascade's over imagen-pytorch's: " + ", ".join(ratios)]
    return "\n".join(lines) + "\n"


@click.command(help=__doc__.replace("\n\n", "\n\n\b\n", 1))
@click.option("--batch", default=4, show_default=True, help="Pictures a step.")
@click.option("--dtype", default="float32", type=click.Choice(["float32", "bfloat16"]))
@click.option("--repeats", default=5, show_default=True, help="Timed calls of each job.")
@click.option("--peak", type=float, help="The device's peak TFLOP/s, where the table lacks it.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path(__file__).parent / "results",
    help="Folder for the JSON and the table.  [default: bench/results]",
)
def main(batch: int, dtype: str, repeats: int, peak: float | None, out: Path) -> None:
    load = os.getloadavg()[0]
    installed = importlib.util.find_spec("imagen_pytorch")
    sides = list(SIDES) if installed else ["cascade"]
    facts, seconds = measure(sides, batch, dtype, repeats)
    device = facts["cascade"]["device"]
    if peak is None and device in PEAK_FLOPS:
        peak = PEAK_FLOPS[device] / 1e12
    rows = []
    for (side, job), taken in seconds.items():
        flops = facts[side][f"{job} flops"]
        tflops = flops * batch / taken / 1e12
        rows.append(
            {
                "network": side,
                "job": job,
                "parameters": facts[side]["parameters"],
                "flops": flops,
                "pictures_per_second": batch / taken,
                "tflops_per_second": tflops,
                "utilisation": tflops / peak if peak else None,
            }
        )
    report = {
        "command": " ".join(["python", "bench/unet.py", *sys.argv[1:]]),
        "device": platform.machine() if device == "cpu" else device,
        "cores": len(os.sched_getaffinity(0)),
        "load": load,
        "batch": batch,
        "dtype": dtype,
        "peak_tflops": peak,
        "versions": versions(),
        "rows": rows,
        "ratios": {
            job: seconds["imagen-pytorch", job] / seconds["cascade", job]
            for job in JOBS
            if "imagen-pytorch" in sides
        },
    }
    out.mkdir(parents=True, exist_ok=True)
    name = f"unet-{report['device']}-{batch}-{dtype}".replace(" ", "-").lower()
    for suffix, text in ((".json", json.dumps(report, indent=2) + "\n"), (".md", markdown(report))):
        temporary = out / f".{name}{suffix}"
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, out / (name + suffix))
    click.echo(markdown(report))


if __name__ == "__main__":
    main()

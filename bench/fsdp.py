"""What constraints do to what chips send: four scanned convolutions, parameters split over all.

    python bench/fsdp.py                              # 16 and 512 chips of v5p, minutes
    python bench/fsdp.py --topologies v5p-32

A training step of four recomputed 3×3 convolutions, 1024 channels, two 32×32 pictures a chip, is
compiled for TPUs that aren't here (`pip install -e '.[libtpu]'`), without constraints, with
activations kept split by picture, and with weights gathered as bfloat16 besides. Printed is what a
chip sends, over the least that this needs (`cascade.parallel.collectives.ideal_bytes`). Results go
to bench/results/.
"""

import os
from pathlib import Path

import click

RESULT = Path(__file__).parent / "results" / "plan-fsdp.md"
CHANNELS, LAYERS, SIDE = 1024, 4, 32
CONSTRAINTS = ("none", "activations", "activations and weights")


@click.command()
@click.option("--topologies", default="v5p-32,v5p-1024", show_default=True)
def main(topologies):
    """Compiles a step for each topology and constraint, and writes the table."""
    from cascade.parallel.plan import TPU_ENVIRONMENT

    os.environ |= TPU_ENVIRONMENT  # before jax is asked for anything
    lines = [
        f"`python bench/fsdp.py --topologies {topologies}`",
        "",
        "| chips | constraints | sent, over the least | kinds, MB |",
        "|---|---|---|---|",
    ]
    for topology in topologies.split(","):
        for constraints in CONSTRAINTS:
            lines.append(row(topology, constraints))
            click.echo(lines[-1])
            RESULT.write_text("\n".join(lines) + "\n", encoding="utf-8")


def row(topology: str, constraints: str) -> str:
    """One line of the table."""
    from cascade.parallel import hlo
    from cascade.parallel.ahead import find_devices
    from cascade.parallel.collectives import collectives, ideal_bytes
    from cascade.parallel.mesh import make_mesh

    devices = find_devices(topology)
    mesh = make_mesh(data=1, fsdp=len(devices), tensor=1, devices=devices)
    found = collectives(hlo.parse(compiled(mesh, constraints)), len(devices))
    total = sum(sent.bytes for sent in found.values())
    least = ideal_bytes(9 * CHANNELS**2 * LAYERS, 0, len(devices), 1)
    kinds = ", ".join(f"{kind} {sent.bytes / 1e6:,.0f}" for kind, sent in found.items())
    return f"| {len(devices)} | {constraints} | {total / least:.2f} | {kinds} |"


def compiled(mesh, constraints: str) -> str:
    """The text of the compiled step."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    whole, rows = NamedSharding(mesh, P()), NamedSharding(mesh, P("fsdp"))
    split = NamedSharding(mesh, P(None, None, None, None, "fsdp"))

    def constrained(array, sharding, wanted):
        return jax.lax.with_sharding_constraint(array, sharding) if wanted else array

    @jax.checkpoint
    def layer(x, kernel):
        kernel = kernel.astype(jnp.bfloat16)
        kernel = constrained(kernel, whole, "weights" in constraints)
        dimensions = ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=dimensions)
        return constrained(jax.nn.silu(x), rows, "activations" in constraints)

    def loss(kernels, x):
        x, _ = jax.lax.scan(lambda x, kernel: (layer(x, kernel), None), x, kernels)
        return jnp.square(x.astype(jnp.float32)).mean()

    def step(kernels, x):
        return kernels - 0.1 * jax.grad(loss)(kernels, x)

    shape = (2 * mesh.size, SIDE, SIDE, CHANNELS)
    kernels = jax.ShapeDtypeStruct((LAYERS, 3, 3, CHANNELS, CHANNELS), jnp.float32, sharding=split)
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=rows)
    run = jax.jit(step, donate_argnums=0, out_shardings=split)
    return run.lower(kernels, x).compile().as_text()


if __name__ == "__main__":
    main()

"""What constraints do to what chips send: four scanned convolutions, their parameters split.

    python bench/fsdp.py                              # 16 to 512 chips of v5p, some ten minutes
    python bench/fsdp.py --meshes v5p-32:16,v5p-128:16

A training step of four recomputed 3×3 convolutions, 1024 channels, two 32×32 pictures a chip, is
compiled for TPUs that aren't here (`pip install -e '.[libtpu]'`): as XLA lays it out by itself,
with activations kept split by picture, with weights gathered as bfloat16 besides, and with
`cascade.parallel.layout` and the compiler's options of training. A mesh is a topology and over how
many of its chips parameters are split; the others have copies. Printed is what a chip sends, over
the least that this mesh needs (`cascade.parallel.collectives.ideal_bytes`). Results go to
bench/results/.
"""

import os
from pathlib import Path

import click

RESULT = Path(__file__).parent / "results" / "plan-fsdp.md"
CHANNELS, LAYERS, SIDE = 1024, 4, 32
CONSTRAINTS = ("none", "activations", "activations and weights", "layout")
MESHES = "v5p-32:16,v5p-32:8,v5p-128:16,v5p-1024:16,v5p-1024:512"


@click.command()
@click.option("--meshes", default=MESHES, show_default=True)
def main(meshes):
    """Compiles a step for each mesh and constraint, and writes the table."""
    from cascade.parallel.plan import TPU_ENVIRONMENT

    os.environ |= TPU_ENVIRONMENT  # before jax is asked for anything
    lines = [
        f"`python bench/fsdp.py --meshes {meshes}`",
        "",
        "| chips | split over | constraints | sent, over the least | MB | kinds, MB |",
        "|---|---|---|---|---|---|",
    ]
    for mesh in meshes.split(","):
        for constraints in CONSTRAINTS:
            lines.append(row(mesh, constraints))
            click.echo(lines[-1])
            RESULT.write_text("\n".join(lines) + "\n", encoding="utf-8")


def row(wanted: str, constraints: str) -> str:
    """One line of the table."""
    from cascade.parallel import hlo
    from cascade.parallel.ahead import find_devices
    from cascade.parallel.collectives import collectives, ideal_bytes
    from cascade.parallel.mesh import make_mesh

    topology, fsdp = wanted.split(":")
    devices = find_devices(topology)
    mesh = make_mesh(data=-1, fsdp=int(fsdp), tensor=1, devices=devices)
    found = collectives(hlo.parse(compiled(mesh, constraints)), len(devices))
    total = sum(sent.bytes for sent in found.values())
    least = ideal_bytes(9 * CHANNELS**2 * LAYERS, 0, int(fsdp), mesh.shape["data"])
    kinds = ", ".join(f"{kind} {sent.bytes / 1e6:,.0f}" for kind, sent in found.items())
    return (
        f"| {len(devices)} | {fsdp} | {constraints} | {total / least:.2f} | {total / 1e6:,.0f} "
        f"| {kinds} |"
    )


def compiled(mesh, constraints: str) -> str:
    """The text of the compiled step."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from cascade.parallel.layout import gathered
    from cascade.parallel.mesh import batch_sharding, compiler_options

    whole, rows = NamedSharding(mesh, P()), batch_sharding(mesh)
    kernel_spec = P(None, None, "fsdp")
    split = NamedSharding(mesh, P(None, *kernel_spec))

    @jax.checkpoint
    def layer(x, kernel):
        kernel = kernel.astype(jnp.bfloat16)
        if constraints == "layout":
            kernel = gathered(kernel, mesh, kernel_spec)
        elif "weights" in constraints:
            kernel = jax.lax.with_sharding_constraint(kernel, whole)
        dimensions = ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=dimensions)
        x = jax.nn.silu(x)
        return x if constraints == "none" else jax.lax.with_sharding_constraint(x, rows)

    def loss(kernels, x):
        x, _ = jax.lax.scan(lambda x, kernel: (layer(x, kernel), None), x, kernels)
        return jnp.square(x.astype(jnp.float32)).mean()

    def step(kernels, x):
        return kernels - 0.1 * jax.grad(loss)(kernels, x)

    shape = (2 * mesh.size, SIDE, SIDE, CHANNELS)
    kernels = jax.ShapeDtypeStruct((LAYERS, 3, 3, CHANNELS, CHANNELS), jnp.float32, sharding=split)
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=rows)
    options = compiler_options(mesh) if constraints == "layout" else {}
    run = jax.jit(step, donate_argnums=0, out_shardings=split, compiler_options=options)
    return run.lower(kernels, x).compile().as_text()


if __name__ == "__main__":
    main()

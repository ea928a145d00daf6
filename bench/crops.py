"""How far a network that was trained on crops is from itself on the whole picture, and its seams.

    python bench/crops.py --workdir runs/crops        # minutes on two idle CPU cores

Two narrow 32 → 128 stages are trained on 64×64 crops of the emoji drawings: "text" attends to text
alone, as Imagen's 256 → 1024 stage does, "pixels" to pixels too, as its 64 → 256 stage does.

One denoising call is then made on whole held-out pictures, and on their four quarters apart. What
parts the two is (a) statistics of group norm, (b) attention between pixels, (c) borders: zeros
around a convolution, and the low resolution's edge. Quarters are therefore called again with the
whole picture's statistics in every norm, and again with its attention besides; (c) is what is left.
All figures are root mean squares over pictures: of the difference over that of x_hat, near the cut
(within 16 pixels) and away from it; and over that of x_hat's own error, which says if it matters.

Then pictures are drawn whole and in tiles (`stage.sampling.tile`), and the energy of the gradient
across the tiles' borders is compared with the same places of the whole drawing. Results go to
bench/results/.
"""

import itertools
import json
import os
import platform
import sys
from pathlib import Path

import click
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from tqdm import tqdm

from cascade import config as configs
from cascade import registry
from cascade.data.prepare import build_emoji
from cascade.diffusion import conditioning, process
from cascade.diffusion.tiling import starts
from cascade.networks.attention import Attention
from cascade.networks.layers import GroupNorm
from cascade.parallel.mesh import make_mesh
from cascade.text.encoders import ENCODERS
from cascade.training.export import read_run
from cascade.training.train import caption_arrays, loader, make_source, train

KINDS = ("text", "pixels")
LOGSNRS = (-6.0, -3.0, 0.0, 3.0, 6.0)
# Quarters as they are, with the whole's statistics in their norms, and with its attention too.
WAYS = ("apart", "with its norms", "and attention")
WHAT = ("near", "away", "of the error")
AUG_LEVEL = 0.1
NEAR = 16  # pixels from the cut
OVERLAPS = (0, 16, 32)
SIDE, CROP = 128, 64


def experiment(kind: str, workdir: Path, steps: int):
    """The demo's super-resolution stage with one skip a level, narrower batches and few steps."""
    config = configs.load("configs/emoji/demo_sr.py")
    for source in (config.data.source, config.data.eval_source):
        source.data_dir = str(workdir / "data")
    config.text_cache.folder = str(workdir / "text_cache")
    config.stage.network.update(skips="level", skip_scale=1.0, residual_scale=2**-0.5)
    config.stage.network.self_attention = (False, False, False, kind == "pixels")
    config.train.batch_size, config.train.steps = 8, steps
    config.train.learning_rate.update(decay_steps=steps, warmup_steps=min(50, steps // 2))
    config.train.eval_every = config.train.sample_every = 0
    configs.check(config)
    return config


def heldout(config) -> dict:
    """Whole held-out pictures, their low resolution and their text."""
    encoder = registry.build("text encoder", ENCODERS, config.text)
    source = make_source(config.data, train=False)
    texts, _ = caption_arrays(config, encoder, make_mesh(data=-1, fsdp=1, tensor=1), [source])
    config.stage.crop_resolution, config.train.batch_size = 0, 16
    return next(iter(loader(config, source, texts, train=False)))


def place(module) -> str:
    """A module's name in `seen`."""
    return "/".join(module.path)


def recording(seen: dict):
    """An interceptor that leaves each norm's moments and each attention's change in `seen`."""

    def intercept(call, args, kwargs, context):
        out = call(*args, **kwargs)
        if context.method_name == "__call__" and isinstance(context.module, GroupNorm):
            seen[place(context.module)] = moments(args[0], context.module.groups)
        if context.method_name == "__call__" and isinstance(context.module, Attention):
            seen[place(context.module)] = out - args[0]
        return out

    return intercept


def moments(x, groups: int):
    """Mean and mean square of each picture's groups, [2, B, groups]."""
    wide = x.astype(jnp.float32)
    both = jnp.stack([wide.mean((1, 2)), jnp.square(wide).mean((1, 2))])
    return both.reshape(2, len(x), groups, -1).mean(-1)


def replaying(seen: dict, attention: bool):
    """An interceptor that gives quarters the whole picture's moments, and maybe attention."""

    def intercept(call, args, kwargs, context):
        module = context.module
        if context.method_name == "__call__" and isinstance(module, GroupNorm):
            # Normalising with the whole's moments is scaling and shifting what ours make.
            mean, square = moments(args[0], module.groups)
            whole_mean, whole_square = jnp.tile(seen[place(module)], (1, 4, 1))
            std, whole_std = (
                jnp.sqrt(jnp.maximum(s - m**2, 0) + 1e-5)
                for m, s in ((mean, square), (whole_mean, whole_square))
            )
            per_channel = args[0].shape[-1] // module.groups
            factor = jnp.repeat(std / whole_std, per_channel, -1)
            shift = jnp.repeat((mean - whole_mean) / whole_std, per_channel, -1)
            return remodulated(module, call, args, factor, shift)
        if attention and context.method_name == "__call__" and isinstance(module, Attention):
            return args[0] + cut(seen[place(module)])
        return call(*args, **kwargs)

    return intercept


def remodulated(module, call, args, factor, shift):
    """A group norm whose normalised values y are replaced by y · factor + shift.

    gamma · (y · factor + shift) + beta is the module's own output under another modulation.
    """
    variables = module.variables["params"]
    gamma, beta = variables["scale"], variables["bias"]
    scale, offset = args[1] if len(args) > 1 else (jnp.zeros_like(factor), jnp.zeros_like(factor))
    # out = (y·gamma + beta)·(1 + s) + o; wanted: ((y·f + h)·gamma + beta)·(1 + scale) + offset.
    s = factor * (1 + scale) - 1
    o = (shift * gamma + beta) * (1 + scale) + offset - beta * (1 + s)
    return call(args[0], (s, o))


def cut(whole):
    """The quarters of [B, H, W, C] as [4B, H/2, W/2, C]."""
    halves = [each for half in jnp.split(whole, 2, 1) for each in jnp.split(half, 2, 2)]
    return jnp.concatenate(halves)


def joined(quarters):
    """The inverse of `cut`."""
    one, two, three, four = jnp.split(quarters, 4)
    top, bottom = jnp.concatenate([one, two], 2), jnp.concatenate([three, four], 2)
    return jnp.concatenate([top, bottom], 1)


def denoised(stage, params, z_t, logsnr, cond, intercept):
    """x_hat of one call, with an interceptor inside the network."""
    with nn.intercept_methods(intercept):
        output = stage.network.apply({"params": params}, z_t, logsnr, cond)
    return process.predictions(output, z_t, logsnr, stage.config.output).x


def differences(stage, params, batch) -> list[dict]:
    """A row for each noise level: errors, and differences of quarters from the whole."""
    x = jnp.asarray(batch["image"])
    text = {key: jnp.asarray(batch[key]) for key in ("text_emb", "text_mask")}
    lowres, aug_logsnr = conditioning.augment_lowres(
        jax.random.key(1), jnp.asarray(batch["lowres"]), stage.aug_schedule, AUG_LEVEL
    )
    eps = jax.random.normal(jax.random.key(2), x.shape)
    from_cut = jnp.abs(jnp.arange(SIDE) + 0.5 - CROP)
    near = jnp.minimum(from_cut[:, None], from_cut)[:, :, None] < NEAR

    @jax.jit
    def at(logsnr):
        level = jnp.full(len(x), logsnr)
        z_t = process.diffuse(x, eps, level)
        seen = {}
        cond = {**text, "lowres": lowres, "aug_logsnr": aug_logsnr}
        whole = denoised(stage, params, z_t, level, cond, recording(seen))

        parts = {k: jnp.concatenate([v] * 4) for k, v in cond.items() if k != "lowres"}
        parts["lowres"] = cut(lowres)

        def quarters(intercept):
            z, levels = cut(z_t), jnp.concatenate([level] * 4)
            return joined(denoised(stage, params, z, levels, parts, intercept))

        intercepts = (
            lambda call, args, kwargs, _: call(*args, **kwargs),
            replaying(seen, attention=False),
            replaying(seen, attention=True),
        )
        apart = {way: quarters(each) for way, each in zip(WAYS, intercepts, strict=True)}

        def rms(value, where=True):
            return jnp.sqrt(jnp.mean(jnp.square(value), where=where))

        row = {"error whole": rms(whole - x), "error apart": rms(apart["apart"] - x)}
        for name, x_hat in apart.items():
            gap = x_hat - whole
            row |= {
                f"{name}, near": rms(gap, near) / rms(whole, near),
                f"{name}, away": rms(gap, ~near) / rms(whole, ~near),
                f"{name}, of the error": rms(gap) / row["error whole"],
            }
        return row

    rows, names = [], ["error whole", "error apart"]
    names += [f"{way}, {what}" for way in WAYS for what in WHAT]
    for logsnr in LOGSNRS:
        measured = jax.tree.map(float, at(logsnr))  # whose keys are sorted
        rows.append({"logsnr": logsnr} | {name: measured[name] for name in names})
    return rows


def seams(stage, params, batch) -> list[dict]:
    """A row for each overlap: gradient energy at tiles' borders; distance from the whole."""
    text = {key: jnp.asarray(batch[key]) for key in ("text_emb", "text_mask")}
    cond = {**text, "lowres": jnp.asarray(batch["lowres"])}
    null = jax.tree.map(jnp.zeros_like, text)
    keys = jax.random.split(jax.random.key(3), len(batch["image"]))

    def draw(**tiles):
        settings = stage.settings(aug_level=AUG_LEVEL, **tiles)
        return np.asarray(stage.draw(params, cond, null, keys, settings, (SIDE, SIDE)))

    def energy(pictures, columns):
        """Mean square step across the given columns, and rows of the same numbers."""
        steps = [np.diff(pictures, axis=axis) for axis in (1, 2)]
        return np.mean([np.square(s.take(columns, axis)).mean() for axis, s in enumerate(steps, 1)])

    whole, rows = draw(), []
    for overlap in OVERLAPS:
        tiled = draw(tile=CROP, tile_overlap=overlap)
        begins = starts(SIDE, CROP, overlap)
        # Step k lies between pixels k and k + 1.
        borders = {at - 1 for begin in begins for at in (begin, begin + CROP) if 0 < at < SIDE}
        tiles = [set(range(begin, begin + CROP - 1)) for begin in begins]
        shared = set().union(*(one & two for one, two in itertools.pairwise(tiles))) - borders
        places = {
            "across borders": borders,
            "in overlaps": shared,
            "elsewhere": set(range(SIDE - 1)) - borders - shared,
        }
        row = {"overlap": overlap}
        for name, steps in places.items():
            at = sorted(steps)
            row[name] = float(energy(tiled, at) / energy(whole, at)) if at else 1.0
        rows.append(row | {"from the whole": float(np.sqrt(np.mean(np.square(tiled - whole))))})
    return rows


def markdown(report: dict) -> str:
    """The report as tables."""
    lines = [f"`{report['command']}`; {report['machine']}. RMS over 16 held-out pictures."]
    for kind, part in report["stages"].items():
        for what, title in (("calls", "one denoising call"), ("seams", "drawn in tiles")):
            rows = part[what]
            lines += ["", f"Attention to {kind}: {title}", ""]
            lines.append("| " + " | ".join(rows[0]) + " |")
            lines.append("|---" * len(rows[0]) + "|")
            for row in rows:
                lines.append("| " + " | ".join(f"{value:.3g}" for value in row.values()) + " |")
    return "\n".join(lines) + "\n"


@click.command(help=__doc__.replace("\n\n", "\n\n\b\n", 1))
@click.option("--workdir", type=click.Path(path_type=Path), default=Path("runs/crops"))
@click.option("--steps", default=500, show_default=True, help="Of training, each stage.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path(__file__).parent / "results",
    help="Folder for the JSON and the tables.  [default: bench/results]",
)
def main(workdir: Path, steps: int, out: Path) -> None:
    build_emoji(workdir / "data", variant="demo")
    stages = {}
    for kind in tqdm(KINDS, unit="stage"):
        config = experiment(kind, workdir, steps)
        train(config, workdir / kind)
        stage, params, _ = read_run(workdir / kind).stage
        batch = heldout(config)
        stages[kind] = {
            "calls": differences(stage, params, batch),
            "seams": seams(stage, params, batch),
        }
    report = {
        "command": " ".join(["python", "bench/crops.py", *sys.argv[1:]]),
        "machine": f"{platform.machine()}, python {platform.python_version()}, jax "
        f"{jax.__version__}",
        "steps": steps,
        "stages": stages,
    }
    out.mkdir(parents=True, exist_ok=True)
    for suffix, text in ((".json", json.dumps(report, indent=2) + "\n"), (".md", markdown(report))):
        temporary = out / f".crops{suffix}"
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, out / ("crops" + suffix))
    click.echo(markdown(report))


if __name__ == "__main__":
    main()

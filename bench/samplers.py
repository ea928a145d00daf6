"""Samplers × spacings × steps on a mixture in the plane, whose denoiser and flow are exact.

    python bench/samplers.py             # some minutes on two CPU cores

Six Gaussians of different spreads and weights make three classes. Nothing is trained: what is
measured is what the sampler costs, not the network. By number of steps, from the same noises,

- error: of the deterministic samplers, the root mean square distance of pictures from where the
  probability flow leads (Heun's method in 2048 steps, float64);
- distance: of all, the sliced Wasserstein distance (W2 over 32 directions) from the mixture, whose
  quantiles along a line are exact. `floor` is that of as many true draws.

`searched` levels are found as `cascade tune-steps` does, on other noises than are measured.

Guidance is for a model that isn't exact: here the denoiser of a mixture whose Gaussians are wider
and whose classes leak. Its pictures are compared with the class's true distribution: distance,
likeness (the class's mean probability given the picture) and spread (standard deviation within a
Gaussian, over the true one). Results go to bench/results/.
"""

import json
import platform
from pathlib import Path

import click
import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from cascade.diffusion import guidance, samplers, schedules, spacings
from cascade.diffusion.guidance import Denoised
from cascade.diffusion.process import along_batch
from cascade.level_search import search_levels

ANGLES = np.arange(6) * np.pi / 3
MEANS = 0.75 * np.stack([np.cos(ANGLES), np.sin(ANGLES)], 1)
SPREADS = np.array([0.04, 0.1, 0.05, 0.12, 0.03, 0.08])
WEIGHTS = np.array([0.25, 0.15, 0.1, 0.2, 0.2, 0.1])
CLASSES = 3  # Gaussians k and k + 3 are class k

SCHEDULE = schedules.cosine(logsnr_min=-20.0, logsnr_max=20.0)
STEPS = (2, 4, 8, 16, 32, 64)
SPACINGS = {
    "uniform": spacings.uniform(),
    "uniform_logsnr": spacings.uniform_logsnr(),
    "karras": spacings.karras(rho=7.0, sigma_min=0.002, sigma_max=80.0),
}
GUIDANCE = {
    "none": ("constant", {}, 1.0),
    "constant 2": ("constant", {}, 2.0),
    "constant 4": ("constant", {}, 4.0),
    "constant 8": ("constant", {}, 8.0),
    "interval (-3, 3) 2": ("interval", {"low": -3.0, "high": 3.0}, 2.0),
    "interval (-3, 3) 4": ("interval", {"low": -3.0, "high": 3.0}, 4.0),
    "interval (-3, 3) 8": ("interval", {"low": -3.0, "high": 3.0}, 8.0),
    "oscillating 8, 1 after 8 steps": ("oscillating", {"steps": 8, "low": 1.0}, 8.0),
    "oscillating 4, 1 after 8 steps": ("oscillating", {"steps": 8, "low": 1.0}, 4.0),
}
WIDER, LEAK = 1.6, 0.15  # how the model that is guided is wrong
LINES = 32


def denoiser(weights, spreads):
    """E[x|z_t] of the mixture, z_t [B, 2]."""

    def denoise(z_t, logsnr):
        alpha, sigma = (along_batch(each, z_t) for each in schedules.alpha_sigma(logsnr))
        variance = jnp.square(alpha * spreads) + jnp.square(sigma)  # [B, K]
        off = z_t[:, None] - alpha[..., None] * MEANS
        square = jnp.square(off).sum(-1)
        part = jax.nn.softmax(jnp.log(weights) - jnp.log(variance) - 0.5 * square / variance, -1)
        gain = alpha * jnp.square(spreads) / variance
        return Denoised(jnp.einsum("bk,bkd->bd", part, MEANS + gain[..., None] * off))

    return denoise


def noise(count: int, seed: int) -> tuple[jax.Array, jax.Array]:
    """z_1 [count, 2] and a key for each."""
    keys = jax.random.split(jax.random.key(seed), count)
    return jax.random.normal(jax.random.key(seed + 1000), (count, 2)), keys


def quantiles(weights, count: int) -> np.ndarray:
    """Of the mixture's projections on LINES directions, [LINES, count], by bisection."""
    angles = (np.arange(LINES) + 0.5) * np.pi / LINES
    at = np.stack([np.cos(angles), np.sin(angles)], 1) @ MEANS.T  # [LINES, K]
    wanted = (np.arange(count) + 0.5) / count

    @jax.jit
    def bisect(low, high):
        def halve(_, ends):
            low, high = ends
            middle = 0.5 * (low + high)
            reached = jax.scipy.special.ndtr((middle[..., None] - at[:, None]) / SPREADS) @ weights
            return jnp.where(reached < wanted, middle, low), jnp.where(
                reached < wanted, high, middle
            )

        return jax.lax.fori_loop(0, 40, halve, (low, high))[0]

    return np.asarray(bisect(jnp.full((LINES, count), -3.0), jnp.full((LINES, count), 3.0)))


def distance(x, right: np.ndarray) -> float:
    """Sliced W2 of points [B, 2] from the distribution with those quantiles."""
    angles = (np.arange(LINES) + 0.5) * np.pi / LINES
    lines = np.stack([np.cos(angles), np.sin(angles)])
    drawn = np.sort(np.asarray(x, np.float64) @ lines, 0).T
    return float(np.sqrt(np.mean(np.square(drawn - right))))


def true_draws(weights, count: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    which = rng.choice(len(WEIGHTS), count, p=weights)
    return MEANS[which] + SPREADS[which, None] * rng.normal(size=(count, 2))


def flow(denoise, z_1, steps: int = 2048):
    """Where the probability flow leads from z_1, in float64."""
    with jax.enable_x64(True):
        z = jnp.asarray(np.asarray(z_1), jnp.float64)
        keys = jax.random.split(jax.random.key(0), len(z))
        levels = spacings.uniform()(SCHEDULE, steps)
        return np.asarray(
            jax.jit(lambda z: samplers.sample(samplers.heun(), denoise, z, levels, keys))(z)
        )


def measured_samplers(count: int, rounds: int) -> list[dict]:
    """A row for each sampler, spacing and number of steps."""
    denoise = denoiser(WEIGHTS, SPREADS)
    (z_1, keys), (z_0, keys_0) = noise(count, 0), noise(1024, 7)
    right, exact, exact_0 = quantiles(WEIGHTS, count), flow(denoise, z_1), flow(denoise, z_0)
    rows = []
    bar = tqdm(total=len(samplers.SAMPLERS) * len(STEPS), unit="pair")
    for name, factory in samplers.SAMPLERS.items():
        sampler, chance = factory(), name in samplers.RANDOM_SAMPLERS

        @jax.jit
        def draw(z, levels, keys, sampler=sampler):
            return samplers.sample(sampler, denoise, z, levels, keys)

        def row(kind, steps, levels, draw=draw, name=name, chance=chance):
            x = np.asarray(draw(z_1, levels, keys), np.float64)
            error = float(np.sqrt(np.mean(np.square(x - exact))))
            rows.append(
                {
                    "sampler": name,
                    "spacing": kind,
                    "steps": steps,
                    "evaluations": 2 * steps - 1 if name == "heun" else steps,
                    "error": None if chance else error,
                    "distance": distance(x, right),
                }
            )

        for steps in STEPS:
            bar.set_description(f"{name}, {steps} steps")
            starts = [each(SCHEDULE, steps) for each in SPACINGS.values()]
            for kind, levels in zip(SPACINGS, starts, strict=True):
                row(kind, steps, levels)
            if not chance:

                def loss(levels, draw=draw):
                    x = draw(z_0, jnp.asarray(levels, jnp.float32), keys_0)
                    return np.sqrt(np.mean(np.square(np.asarray(x) - exact_0)))

                levels, _ = search_levels(loss, starts, rounds)
                row("searched", steps, jnp.asarray(levels, jnp.float32))
                rows[-1]["levels"] = levels.tolist()
            bar.update()
    bar.close()
    return rows


def measured_guidance(count: int, steps: int = 32) -> list[dict]:
    """A row for each way to guide, mean over classes; DPM-Solver++(2M) over uniform times."""
    z_1, keys = noise(count, 3)
    levels = spacings.uniform()(SCHEDULE, steps)
    own = np.arange(len(WEIGHTS)) % CLASSES
    null = denoiser(WEIGHTS, WIDER * SPREADS)
    rows = []
    for kind, (name, keywords, weight) in tqdm(GUIDANCE.items(), unit="way"):
        found = []
        for label in range(CLASSES):
            truth = np.where(own == label, WEIGHTS, 0.0) / WEIGHTS[own == label].sum()
            leaky = denoiser((1 - LEAK) * truth + LEAK * WEIGHTS, WIDER * SPREADS)

            def denoise(z_t, logsnr, cond, leaky=leaky):
                """The null condition's mean where `cond` says so."""
                with_text, without = leaky(z_t, logsnr).x, null(z_t, logsnr).x
                return Denoised(jnp.where(cond["text"][:, None], with_text, without))

            schedule = guidance.GUIDANCE_SCHEDULES[name](**keywords)
            yes = jnp.ones(count, bool)
            guided = guidance.guide(
                denoise, {"text": yes}, {"text": ~yes}, schedule(weight, levels)
            )
            x = jax.jit(
                lambda z, guided=guided: samplers.sample(
                    samplers.dpmpp_2m(), guided, z, levels, keys
                )
            )(z_1)
            found.append(judged(np.asarray(x, np.float64), own == label, truth))
        means = np.mean(found, 0)
        rows.append(
            {"guidance": kind, **dict(zip(("distance", "likeness", "spread"), means, strict=True))}
        )
    return rows


def judged(x: np.ndarray, ours: np.ndarray, truth: np.ndarray) -> tuple[float, float, float]:
    """Distance from a class's true distribution, likeness to the class, and spread over its own."""
    off = x[:, None] - MEANS
    square = np.square(off).sum(-1)
    logits = np.log(WEIGHTS) - 2 * np.log(SPREADS) - 0.5 * square / SPREADS**2
    part = np.exp(logits - logits.max(1, keepdims=True))
    likeness = part[:, ours].sum(1) / part.sum(1)
    nearest = np.argmin(np.where(ours, square, np.inf), 1)
    own = likeness > 0.5
    spread = np.sqrt(np.mean(square[own, nearest[own]] / (2 * SPREADS[nearest[own]] ** 2)))
    return distance(x, quantiles(truth, len(x))), float(likeness.mean()), float(spread)


def table(rows: list[dict], what: str) -> list[str]:
    """Markdown: a line for each sampler and spacing, a column for each number of steps."""
    lines = [
        f"| sampler | spacing | {' | '.join(map(str, STEPS))} |",
        "|---" * (2 + len(STEPS)) + "|",
    ]
    by = {(r["sampler"], r["spacing"], r["steps"]): r[what] for r in rows if r[what] is not None}
    for sampler, spacing in dict.fromkeys((s, k) for s, k, _ in by):
        cells = " | ".join(f"{by[sampler, spacing, steps]:.4f}" for steps in STEPS)
        lines.append(f"| {sampler} | {spacing} | {cells} |")
    return lines


def plot(rows: list[dict], floor: float, path: Path):
    """Error and distance over evaluations, each sampler at its best spacing but the searched."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.5))
    for axis, what in zip(axes, ("error", "distance"), strict=True):
        for number, name in enumerate(samplers.SAMPLERS):
            for searched, style in ((False, "-o"), (True, ":x")):
                mine = [
                    r
                    for r in rows
                    if r["sampler"] == name
                    and r[what] is not None
                    and (r["spacing"] == "searched") == searched
                ]
                best = {r["evaluations"]: r[what] for r in sorted(mine, key=lambda r: -r[what])}
                if best:
                    x, y = zip(*sorted(best.items()), strict=True)
                    label = f"{name}, searched" if searched else name
                    axis.loglog(x, y, style, color=f"C{number}", label=label, markersize=4)
        axis.set_xlabel("evaluations of the denoiser")
    axes[0].set_ylabel("error from the exact flow (rms)")
    axes[1].set_ylabel("sliced Wasserstein distance (W2)")
    axes[1].axhline(floor, color="grey", linewidth=0.8, label="as many true draws")
    axes[1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


@click.command()
@click.option("--count", default=8192, show_default=True, help="Pictures drawn.")
@click.option("--rounds", default=12, show_default=True, help="Of the search of levels.")
@click.option("--out", default="bench/results", show_default=True, type=Path)
def main(count: int, rounds: int, out: Path):
    """Measures, and writes samplers.json, samplers.md and samplers.png."""
    floor = distance(true_draws(WEIGHTS, count, 0), quantiles(WEIGHTS, count))
    rows = measured_samplers(count, rounds)
    guided = measured_guidance(count)
    out.mkdir(parents=True, exist_ok=True)
    command = f"python bench/samplers.py --count {count} --rounds {rounds}"
    about = {
        "command": command,
        "versions": f"python {platform.python_version()}, jax {jax.__version__}",
        "floor": floor,
    }
    results = {**about, "samplers": rows, "guidance": guided}
    (out / "samplers.json").write_text(json.dumps(results, indent=1) + "\n")
    lines = [
        f"`{command}`; {about['versions']}; a mixture of six Gaussians in the plane, its exact "
        f"denoiser, cosine schedule from logsnr -20 to 20, {count} pictures. Columns are steps; "
        "Heun takes two evaluations for each but the last.",
        "",
        "Root mean square error from the exact flow (deterministic samplers):",
        "",
        *table(rows, "error"),
        "",
        f"Sliced Wasserstein distance from the mixture (as many true draws: {floor:.4f}):",
        "",
        *table(rows, "distance"),
        "",
        f"Guidance of a model whose Gaussians are {WIDER} times too wide and whose classes leak "
        f"{LEAK:.0%}; DPM-Solver++(2M), 32 steps:",
        "",
        "| guidance | distance | likeness | spread |",
        "|---|---|---|---|",
        *(
            f"| {r['guidance']} | {r['distance']:.4f} | {r['likeness']:.3f} | {r['spread']:.2f} |"
            for r in guided
        ),
    ]
    (out / "samplers.md").write_text("\n".join(lines) + "\n")
    plot(rows, floor, out / "samplers.png")


if __name__ == "__main__":
    main()

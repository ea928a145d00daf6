"""Distillation 64 → 1 of a small network on a mixture in the plane: what each step count costs.

    python bench/mixture.py             # some two minutes on two CPU cores
    python bench/mixture.py --updates 8000 --name mixture-long

Eight Gaussians on a ring make four classes, each of two that lie opposite. An MLP learns to denoise
them given the class or nothing, and is then distilled by `cascade.diffusion.distillation`:

- progressive: six halvings, 64 → 1, each student from the one before;
- guided: a first student is told w, uniform in 1 … 4, and learns the guided teacher in one
  evaluation; then it is halved alike;
- consistency: multistep, for each number of steps a student of its own, from the teacher;
- backward: both, trained on z_t of the student's own drawing, from 8 steps on.

All are drawn by DDIM over uniform times. Measured is the sliced Wasserstein distance, W1 over 32
directions of 2048 points a class, mean over classes, from 65,536 points of the data; at w = 3 from
what the teacher, guided, draws by DDIM in 256 steps. Results go to bench/results/.
"""

import functools
import itertools
import json
import math
import os
import platform
import sys
import time
from pathlib import Path

import click
import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

# Before jax starts: these matrices are too small for two cores to share.
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")

from cascade.diffusion import distillation, guidance, losses, process, samplers, schedules, spacings

RESULTS = Path(__file__).parent / "results"
SCHEDULE = schedules.cosine(logsnr_min=-20.0, logsnr_max=20.0)
CLASSES, PARTS, RADIUS, SPREAD = 4, 8, 0.75, 0.1
NONE = CLASSES  # the class of a picture that isn't told one
POINTS, DIRECTIONS = 2048, 32  # of the distance, a class
TRUTH = 32 * POINTS
WIDTH, LAYERS, BATCH = 96, 3, 256
STEPS = (64, 32, 16, 8, 4, 2, 1)
BACKWARD_FROM = 8
WEIGHTS, SHOWN_WEIGHT = (1.0, 4.0), 3.0
RATE = 2e-3
ANNEALED = {"teacher_steps_start": 64, "teacher_steps_end": 1280}  # Heek et al. 2024


def data(key, classes):
    """Points [B, 2] of the mixture, of `classes` [B]."""
    half_key, key = jax.random.split(key)
    part = classes + CLASSES * jax.random.bernoulli(half_key, shape=classes.shape)
    angle = 2.0 * math.pi * part / PARTS
    centre = RADIUS * jnp.stack([jnp.cos(angle), jnp.sin(angle)], -1)
    return centre + SPREAD * jax.random.normal(key, centre.shape)


def init(key):
    """An MLP's parameters; what it makes of w starts as zero, so that it starts as its teacher."""
    sizes = (2 + 16 + CLASSES + 1, *[WIDTH] * LAYERS, 2)
    keys = jax.random.split(key, LAYERS + 1)
    layers = [
        (jax.random.normal(k, shape) / math.sqrt(shape[0]), jnp.zeros(shape[1]))
        for k, shape in zip(keys, itertools.pairwise(sizes), strict=True)
    ]
    return {"layers": layers, "weight": jnp.zeros((8, WIDTH))}


def waves(value, scales):
    """Sines and cosines [B, 2 len(scales)] of value [B]."""
    angles = value[:, None] * jnp.asarray(scales)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)


def predict(params, z_t, logsnr, cond):
    """The network: v [B, 2] of z_t [B, 2], logsnr [B], the class and, of a told student, w."""
    h = jnp.concatenate(
        [z_t, waves(logsnr, 0.05 * 2.0 ** np.arange(8)), jax.nn.one_hot(cond["class"], NONE + 1)],
        -1,
    )
    for number, (kernel, bias) in enumerate(params["layers"]):
        h = h @ kernel + bias
        if number == 0 and "guidance_weight" in cond:
            h += waves(cond["guidance_weight"], 0.5 * 2.0 ** np.arange(4)) @ params["weight"]
        if number < LAYERS:
            h = jax.nn.silu(h)
    return h


def conditional(params):
    """`predict` as a conditional denoiser."""
    return guidance.denoiser(functools.partial(predict, params), "v")


def told(params, cond):
    """`predict` as a plain denoiser."""
    return lambda z_t, logsnr: conditional(params)(z_t, logsnr, cond)


def guided(params, cond):
    """The teacher with classifier-free guidance by `cond["guidance_weight"]` [B]."""
    shown = {"class": cond["class"]}
    null = {"class": jnp.full_like(cond["class"], NONE)}
    return guidance.guide(conditional(params), shown, null, cond["guidance_weight"])


def learner(loss):
    """`learn(params, teacher, steps, updates, seed)`, compiled once for students of any steps.

    Adam at RATE falling to zero; `loss(params, key, fraction, teacher, steps)`.
    """
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam())

    @jax.jit
    def learn(params, teacher, steps, updates, seed):
        def update(step, carry):
            params, state = carry
            key, fraction = jax.random.fold_in(jax.random.key(seed), step), step / updates
            gradients = jax.grad(loss)(params, key, fraction, teacher, steps)
            changes, state = optimizer.update(gradients, state)
            rate = RATE * (1.0 - fraction)
            return jax.tree.map(lambda p, change: p - rate * change, params, changes), state

        return jax.lax.fori_loop(0, updates, update, (params, optimizer.init(params)))[0]

    return learn


def batch(key):
    """Points and their classes, a tenth of which the network isn't told."""
    class_key, drop_key, key = jax.random.split(key, 3)
    classes = jax.random.randint(class_key, (BATCH,), 0, CLASSES)
    shown = jnp.where(jax.random.bernoulli(drop_key, 0.1, (BATCH,)), NONE, classes)
    return data(key, classes), {"class": shown}


def teacher_loss(params, key, fraction, teacher, steps):
    """The plain training objective, v-MSE."""
    batch_key, time_key, noise_key = jax.random.split(key, 3)
    x, cond = batch(batch_key)
    t, eps = losses.stratified_times(time_key, BATCH), jax.random.normal(noise_key, x.shape)
    logsnr = SCHEDULE(t)
    z_t = process.diffuse(x, eps, logsnr)
    prediction = process.predictions(predict(params, z_t, logsnr, cond), z_t, logsnr, "v")
    weighting = losses.v_weighting()
    return losses.denoising_loss(prediction, x, eps, t, SCHEDULE, weighting).mean()


def student_loss(objective, taught, weighted=False):
    """What a student is to answer.

    Args:
      taught: `taught(teacher, cond)` is the denoiser that teaches.
      weighted: the student is told a guidance weight.
    """

    def loss(params, key, fraction, teacher, steps):
        batch_key, weight_key, key = jax.random.split(key, 3)
        x, cond = batch(batch_key)
        if weighted:
            low, high = WEIGHTS
            weight = jax.random.uniform(weight_key, (BATCH,), minval=low, maxval=high)
            cond["guidance_weight"] = weight
        frozen = told(jax.lax.stop_gradient(params), cond)
        example = objective(key, x, taught(teacher, cond), frozen, SCHEDULE, steps, fraction)
        output = predict(params, example.z_t, example.logsnr_t, cond)
        prediction = process.predictions(output, example.z_t, example.logsnr_t, "v")
        return distillation.distillation_loss(prediction, example, losses.snr_truncated()).mean()

    return loss


def halvings(teacher, updates, weighted=False, backward=False, first=STEPS[0] // 2):
    """Students by number of steps, each from the one before; the first from `teacher`."""
    objective, students = distillation.progressive(backward=backward), {}
    learn = learner(student_loss(objective, told, weighted))
    for steps in (n for n in STEPS if n <= first):
        teacher = learn(teacher, teacher, steps, last_longer(updates, steps), steps)
        students[steps] = teacher
    return students


def consistent(teacher, updates, backward=False, first=STEPS[0]):
    """Multistep consistency students by number of steps, each from the teacher."""
    objective = distillation.consistency(backward=backward, **ANNEALED)
    learn = learner(student_loss(objective, told))
    students = {
        steps: learn(teacher, teacher, steps, 2 * last_longer(updates, steps), steps)
        for steps in STEPS
        if steps <= first
    }
    return students


def guided_halvings(teacher, updates):
    """Students that are told w: the first answers as the guided teacher, then it is halved."""
    learn = learner(student_loss(distillation.matching(), guided, weighted=True))
    first = learn(teacher, teacher, STEPS[0], 2 * updates, STEPS[0])
    return {STEPS[0]: first} | halvings(first, updates, weighted=True)


def last_longer(updates, steps):
    """Twice as many updates for 2 and 1 steps, as Salimans & Ho 2022 have it."""
    return updates * (2 if steps <= 2 else 1)


@functools.partial(jax.jit, static_argnames=("steps", "how"))
def draw(params, weight, seed, steps, how=told):
    """Points [CLASSES, POINTS, 2]; `how(params, cond)` is the denoiser; weight None isn't told."""
    keys = jax.random.split(jax.random.key(seed), CLASSES * POINTS)
    cond = {"class": jnp.repeat(jnp.arange(CLASSES), POINTS)}
    if weight is not None:
        cond["guidance_weight"] = jnp.full(len(keys), weight)
    z_1 = process.picture_noise(keys, (2,))
    levels = spacings.uniform()(SCHEDULE, steps)
    x = samplers.sample(samplers.ddim(), how(params, cond), z_1, levels, keys)
    return x.reshape(CLASSES, POINTS, 2)


def quantiles(points):
    """What each direction sees of points [CLASSES, k · POINTS, 2], as POINTS sorted values."""
    angles = (np.arange(DIRECTIONS) + 0.5) * math.pi / DIRECTIONS
    seen = np.sort(np.asarray(points) @ np.stack([np.cos(angles), np.sin(angles)]), axis=1)
    return seen.reshape(CLASSES, POINTS, -1, DIRECTIONS).mean(2)


def of_data(seed, points):
    """Points [CLASSES, points, 2] of the data."""
    classes = jnp.repeat(jnp.arange(CLASSES), points)
    return data(jax.random.key(seed), classes).reshape(CLASSES, points, 2)


def measure(teacher, kinds):
    """Distances by column and number of steps; `kinds`: name -> students by steps."""
    truth = quantiles(of_data(1, TRUTH))
    fine = quantiles(draw(teacher, SHOWN_WEIGHT, 2, 256, how=guided))

    def row(students, weight=None, wanted=truth, **how):
        drawn = {n: draw(params, weight, 0, n, **how) for n, params in students.items()}
        return {n: float(np.abs(quantiles(x) - wanted).mean()) for n, x in drawn.items()}

    teachers, at = dict.fromkeys(STEPS, teacher), f"w = {SHOWN_WEIGHT:g}"
    table = {"teacher, DDIM": row(teachers)}
    for name in ("progressive", "progressive backward", "consistency", "consistency backward"):
        table[name] = row(kinds[name])
    table[f"guided teacher, DDIM, {at}"] = row(teachers, SHOWN_WEIGHT, fine, how=guided)
    table[f"guided student, {at}"] = row(kinds["guided"], SHOWN_WEIGHT, fine)
    table["guided student, w = 1"] = row(kinds["guided"], 1.0)
    return table, float(np.abs(quantiles(of_data(3, POINTS)) - truth).mean())


def write(name, command, table, floor, seconds):
    """The table as Markdown and JSON."""
    lines = [
        f"`{command}`",
        "",
        "Sliced Wasserstein distance × 1000 by number of DDIM steps; as many points of "
        f"the data are {1000 * floor:.1f} from it. Rows at w = {SHOWN_WEIGHT:g}: from the guided "
        "teacher at 256 steps, not from the data.",
        "",
        "| | " + " | ".join(str(n) for n in STEPS) + " |",
        "|---|" + "---:|" * len(STEPS),
    ]
    for kind, row in table.items():
        cells = (f"{1000 * row[n]:.1f}" if n in row else "" for n in STEPS)
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    wall, process_time = (sum(part[k] for part in seconds.values()) for k in ("wall", "process"))
    lines += ["", f"{wall:.0f} s, {process_time:.0f} s of processor time; jax {jax.__version__} on"]
    lines[-1] += f" {platform.machine()}."
    (RESULTS / f"{name}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    result = {"command": command, "distances": table, "data": floor, "seconds": seconds}
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return "\n".join(lines)


def plot(name, table, floor, teacher, kinds):
    """Distances over steps, and what is drawn in 1 and 4 steps."""
    figure = Figure(figsize=(13, 5.2), layout="constrained")
    grid = figure.add_gridspec(2, 6)
    axes = figure.add_subplot(grid[:, :3])
    for kind, row in table.items():
        style = "--" if "teacher" in kind else ":" if "guided" in kind else "-"
        axes.loglog(list(row), list(row.values()), style, marker="o", markersize=3, label=kind)
    axes.axhline(floor, color="grey", linewidth=0.8, label="data")
    axes.set(xlabel="steps", ylabel="sliced Wasserstein distance", xticks=STEPS)
    axes.set_xticklabels(STEPS)
    axes.minorticks_off()
    axes.legend(fontsize=7)
    shown = ("progressive", "consistency")
    for row, steps in enumerate((4, 1)):
        pictures = {"teacher": draw(teacher, None, 0, steps)}
        pictures |= {kind: draw(kinds[kind][steps], None, 0, steps) for kind in shown}
        for column, (kind, points) in enumerate(pictures.items(), 3):
            axes = figure.add_subplot(grid[row, column])
            for one in points:
                axes.scatter(*np.asarray(one[:500]).T, s=0.5)
            axes.set(xlim=(-1.3, 1.3), ylim=(-1.3, 1.3), xticks=[], yticks=[], aspect="equal")
            axes.set_title(f"{kind}, {steps} step{'s' * (steps > 1)}", fontsize=8)
    figure.savefig(RESULTS / f"{name}.png", dpi=110)


@click.command()
@click.option("--updates", default=600, show_default=True, help="Of a halving.")
@click.option("--teacher-updates", default=6000, show_default=True)
@click.option("--name", default="mixture", show_default=True, help="Of the results.")
def main(updates, teacher_updates, name):
    """Trains, distils, measures, and writes the table and the plot."""
    command = " ".join(["python bench/mixture.py", *sys.argv[1:]])
    seconds = {}

    def timed(what, function, *arguments, **keywords):
        start = time.perf_counter(), time.process_time()
        result = jax.block_until_ready(function(*arguments, **keywords))
        seconds[what] = {
            "wall": time.perf_counter() - start[0],
            "process": time.process_time() - start[1],
        }
        click.echo(
            f"{what}: {seconds[what]['wall']:.1f} s, {seconds[what]['process']:.1f} s of CPU"
        )
        return result

    fresh = init(jax.random.key(0))
    teacher = timed("teacher", learner(teacher_loss), fresh, None, 0, teacher_updates, 1)
    kinds = {
        "progressive": timed("progressive", halvings, teacher, updates),
        "guided": timed("guided", guided_halvings, teacher, updates),
        "consistency": timed("consistency", consistent, teacher, updates),
    }
    late = {"backward": True, "first": BACKWARD_FROM}
    before = kinds["progressive"][2 * BACKWARD_FROM]
    for kind, function, start in (
        ("progressive backward", halvings, before),
        ("consistency backward", consistent, teacher),
    ):
        kinds[kind] = timed(kind, function, start, updates, **late)
    table, floor = timed("measuring", measure, teacher, kinds)
    click.echo(write(name, command, table, floor, seconds))
    plot(name, table, floor, teacher, kinds)


if __name__ == "__main__":
    main()

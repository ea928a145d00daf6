"""Progressive and guided distillation against closed forms: what one student step stands for."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mixtures import GAUSSIAN, MIXTURE, exact_denoiser

from cascade import registry
from cascade.diffusion import distillation, losses, process, samplers, schedules
from cascade.diffusion.guidance import Denoised, guide

SCHEDULE = schedules.cosine(logsnr_min=-20.0, logsnr_max=20.0)
SECTIONS = {
    "progressive": {"name": "progressive"},
    "consistency": {"name": "consistency", "teacher_steps_start": 8, "teacher_steps_end": 64},
}


def build(name, backward=False, **changed):
    section = {**SECTIONS[name], "backward": backward, **changed}
    return registry.build("objective", distillation.OBJECTIVES, section)


def draws(data, batch, dtype=jnp.float32, seed=0):
    """Clean pictures [batch, 2, 3] of the mixture's values."""
    weights, means, spreads = data
    random = np.random.default_rng(seed)
    part = random.choice(len(weights), (batch, 2, 3), p=weights)
    return jnp.asarray(means[part] + spreads[part] * random.standard_normal(part.shape), dtype)


def examples(objective, teacher, student, steps, x, fraction=0.0, seed=1):
    run = jax.jit(lambda key, x: objective(key, x, teacher, student, SCHEDULE, steps, fraction))
    return run(jax.random.key(seed), x)


def grid_index(logsnr, steps):
    """i of t = i / steps, for logsnr on that grid."""
    return jnp.argmin(jnp.abs(logsnr[:, None] - SCHEDULE(jnp.arange(steps + 1) / steps)), axis=1)


@pytest.mark.parametrize(
    ("data", "steps", "backward"),
    [(MIXTURE, 1, False), (MIXTURE, 5, True), (MIXTURE, 64, False), (GAUSSIAN, 2, True)],
)
def test_progressive_targets_are_the_papers_formula_of_two_exact_steps(data, steps, backward):
    """Salimans & Ho 2022, algorithm 2, as written, in float64."""
    teacher = exact_denoiser(data)

    @jax.jit
    def run(x):
        objective = build("progressive", backward)
        example = objective(jax.random.key(1), x, teacher, teacher, SCHEDULE, steps, 0.0)
        i = grid_index(example.logsnr_t, steps) - 1
        z, levels = example.z_t, [SCHEDULE((i + ahead) / steps) for ahead in (1.0, 0.5, 0.0)]
        for t, s in itertools.pairwise(levels):
            x_hat = teacher(z, t).x
            z = process.diffuse(x_hat, process.predictions(x_hat, z, t, "x").eps, s)
        (alpha_t, sigma_t), (alpha_s, sigma_s) = (
            schedules.alpha_sigma(process.along_batch(level, z)) for level in levels[::2]
        )
        formula = (z - sigma_s / sigma_t * example.z_t) / (alpha_s - sigma_s / sigma_t * alpha_t)
        landed = samplers.ddim_step(example.z_t, example.x, *levels[::2])
        last = process.along_batch(i == 0, z)
        return example, levels[0], jnp.where(last, x_hat, formula), jnp.where(last, z, landed), z

    with jax.enable_x64(True):
        example, logsnr_t, formula, landed, z = run(draws(data, 40, jnp.float64))
        np.testing.assert_allclose(example.logsnr_t, logsnr_t)
        assert len(np.unique(logsnr_t.round(6))) >= 0.3 * min(steps, 40)
        np.testing.assert_allclose(example.x, formula, atol=1e-9)
        np.testing.assert_allclose(landed, z, atol=1e-9)


def folded(teacher, steps):
    """A student that fits every progressive target: one evaluation for two of the teacher's."""

    def student(z, logsnr):
        i = grid_index(logsnr, steps) - 1
        middle = SCHEDULE((i + 0.5) / steps)
        end = jnp.where(i > 0, SCHEDULE(i / steps), jnp.inf)
        first = teacher(z, logsnr).x
        second = teacher(samplers.ddim_step(z, first, logsnr, middle), middle).x
        return Denoised(distillation.joined(first, second, logsnr, middle, end))

    return student


def draw(denoise, z_1, steps):
    levels = SCHEDULE(jnp.linspace(1.0, 0.0, steps + 1))
    keys = jax.random.split(jax.random.key(0), len(z_1))
    return samplers.sample(samplers.ddim(), denoise, z_1, levels, keys)


def test_students_that_fit_draw_the_teachers_pictures_in_half_the_steps_and_half_again():
    teacher = exact_denoiser(MIXTURE)

    @jax.jit
    def run(z_1, x):
        halved = folded(teacher, 2)
        z_t, logsnr_t, target, _ = build("progressive")(
            jax.random.key(1), x, teacher, None, SCHEDULE, 2, 0.0
        )
        students = (teacher, 4), (halved, 2), (folded(halved, 1), 1)
        pictures = [draw(student, z_1, steps) for student, steps in students]
        return pictures, halved(z_t, logsnr_t).x, target

    with jax.enable_x64(True):
        (wanted, *others), answer, target = run(
            jax.random.normal(jax.random.key(3), (16, 2, 3)), draws(MIXTURE, 64, jnp.float64)
        )
        np.testing.assert_allclose(answer, target, atol=1e-9)
        np.testing.assert_allclose(others, [wanted] * 2, atol=1e-9)


def test_a_student_fitted_to_examples_of_a_gaussian_draws_as_its_teacher():
    """Of a Gaussian all is affine: N lines through examples are the student."""
    steps, teacher = 4, exact_denoiser(GAUSSIAN)
    x = draws(GAUSSIAN, 400)
    example = examples(build("progressive"), teacher, None, steps, x)
    z_t, logsnr_t, target, _ = map(np.asarray, example)
    levels, lines = np.unique(logsnr_t), []
    for level in levels:
        at = logsnr_t == level
        lines.append(np.polyfit(z_t[at].ravel(), target[at].ravel(), 1))
    lines = jnp.asarray(lines)

    def student(z, logsnr):
        slope, offset = lines[jnp.argmin(jnp.abs(logsnr[:, None] - levels), axis=1)].T
        return Denoised(process.along_batch(slope, z) * z + process.along_batch(offset, z))

    assert len(levels) == steps
    z_1 = jax.random.normal(jax.random.key(3), (16, 2, 3))
    one, other = jax.jit(lambda z: (draw(student, z, 4), draw(teacher, z, 8)))(z_1)
    np.testing.assert_allclose(one, other, atol=2e-5)


def two_classes():
    """A conditional denoiser of two Gaussians; without a class it is their mixture's."""
    parts = (np.array([-0.6]), np.array([0.5])), (np.array([0.2]), np.array([0.3]))
    first, second = (
        exact_denoiser((np.ones(1), mean, spread)) for mean, spread in zip(*parts, strict=True)
    )
    both = exact_denoiser((np.array([0.5, 0.5]), *(np.concatenate(part) for part in parts)))

    def denoise(z, logsnr, cond):
        kind = process.along_batch(cond["class"], z)
        x = jnp.where(kind == 0, first(z, logsnr).x, second(z, logsnr).x)
        return Denoised(jnp.where(kind < 0, both(z, logsnr).x, x))

    return denoise


@pytest.mark.parametrize("name", ["matching", "progressive"])
def test_a_student_told_the_weight_equals_the_guided_teacher_in_one_evaluation(name):
    """Meng et al. 2023: guided x is affine in w, so two weights tell a student all the others.

    The student knows its targets at w = 1 and 4 alone, and is asked for every weight between and
    beyond: by its first stage it is the guided teacher. Two steps of a guided teacher aren't affine
    in w; there a student must have learned each weight, which the second case shows.
    """
    stage = distillation.matching() if name == "matching" else build(name)
    conds = {"class": jnp.arange(64) % 2}, {"class": jnp.full(64, -1)}

    @jax.jit
    def run(x):
        def targets(weight):
            teacher = guide(two_classes(), *conds, weight)
            return stage(jax.random.key(1), x, teacher, None, SCHEDULE, 4, 0.0)

        (z_t, logsnr_t, low, _), high = targets(1.0), targets(4.0).x
        weights = jnp.linspace(0.5, 8.0, 64)
        share = process.along_batch((weights - 1.0) / 3.0, x)
        student = (1.0 - share) * low + share * high
        guided = guide(two_classes(), *conds, weights)(z_t, logsnr_t).x
        return student, targets(weights).x, guided

    with jax.enable_x64(True):
        student, target, guided = run(draws(MIXTURE, 64, jnp.float64))
        if name == "progressive":
            assert np.abs(student - target).max() > 0.01
        else:
            np.testing.assert_allclose(student, target, atol=1e-12)
            np.testing.assert_allclose(student, guided, atol=1e-12)


def test_the_loss_is_truncated_snr_on_x_and_nothing_at_the_target():
    weighting = losses.snr_truncated()

    @jax.jit
    def run(x):
        example = build("progressive")(
            jax.random.key(1), x, exact_denoiser(MIXTURE), None, SCHEDULE, 8, 0.0
        )
        found = []
        for off in (0.0, 0.1):
            every = process.predictions(example.x + off, *example[:2], "x")
            for kind in process.KINDS:
                prediction = process.predictions(getattr(every, kind), *example[:2], kind)
                found.append(distillation.distillation_loss(prediction, example, weighting))
        return example.logsnr_t, found

    with jax.enable_x64(True):
        logsnr_t, found = run(draws(MIXTURE, 32, jnp.float64))
        assert logsnr_t.min() < 0 < logsnr_t.max()
        np.testing.assert_allclose(found[:3], 0.0, atol=1e-9)
        expected = np.maximum(np.exp(logsnr_t), 1.0) * 0.1**2
        np.testing.assert_allclose(found[3:], [expected] * 3, rtol=1e-6)

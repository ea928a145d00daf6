"""Multistep consistency and backward distillation against exact flows; ends and refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mixtures import GAUSSIAN, MIXTURE, exact_denoiser, exact_solution
from test_distillation import SCHEDULE, SECTIONS, build, draws, grid_index

from cascade.diffusion import distillation, process, samplers, schedules
from cascade.diffusion.guidance import Denoised
from cascade.errors import UserError

FINE = jnp.linspace(0.0, 1.0, 4097)
EVERY = [(name, backward) for name in SECTIONS for backward in (False, True)]


def segment_end(logsnr, steps):
    """logsnr where the segment of logsnr [B] ends; 60 for the last one's clean end."""
    time = jnp.interp(-logsnr, -SCHEDULE(FINE), FINE)
    segment = jnp.maximum(jnp.ceil(time * steps - 1e-4) - 1.0, 0.0)
    return jnp.where(segment > 0, SCHEDULE(segment / steps), 60.0)


def perfect(data, steps):
    """The student whose DDIM step to the end of its segment follows the exact flow."""

    def student(z, logsnr):
        end = segment_end(logsnr, steps)
        t, r = process.along_batch(logsnr, z), process.along_batch(end, z)
        z_r = exact_solution(data, z, t, r)
        (alpha_t, sigma_t), (alpha_r, sigma_r) = schedules.alpha_sigma(t), schedules.alpha_sigma(r)
        ratio = sigma_r / sigma_t
        return Denoised((z_r - ratio * z) / (alpha_r - ratio * alpha_t))

    return student


def some_student(z, logsnr):
    return Denoised(jnp.tanh(z + 0.1 * process.along_batch(logsnr, z)))


def addim(z_t, x_hat, logsnr_t, logsnr_s, spread):
    """Heek et al. 2024, algorithm 3, as written."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = (
        schedules.alpha_sigma(process.along_batch(level, z_t)) for level in (logsnr_t, logsnr_s)
    )
    eps = (z_t - alpha_t * x_hat) / sigma_t
    square = jnp.mean(eps**2, axis=tuple(range(1, z_t.ndim)), keepdims=True)
    w = alpha_s - alpha_t * sigma_s / sigma_t
    lacking = w**2 * process.along_batch(spread, z_t) / square
    return alpha_s * x_hat + jnp.sqrt(sigma_s**2 + lacking) * eps


def fixed_steps(total):
    return {"teacher_steps_start": total, "teacher_steps_end": total}


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("segments", [1, 4])
def test_targets_are_the_papers_algorithm(segments, backward):
    """Heek et al. 2024, algorithm 1, as written, in float64; of one segment a consistency model's.

    The latter is x_hat at s, where the teacher's one step leads (Song et al. 2023, algorithm 2).
    """
    teacher, total = exact_denoiser(MIXTURE), 16
    objective = build("consistency", backward, **fixed_steps(total))

    @jax.jit
    def run(x):
        example = objective(jax.random.key(1), x, teacher, some_student, SCHEDULE, segments, 0.0)
        z_t, logsnr_t, target, weight = example
        index = grid_index(logsnr_t, total) - 1
        segment = index // (total // segments)
        t, s, r = logsnr_t, SCHEDULE(index / total), SCHEDULE(segment / segments)
        x_hat = teacher(z_t, t).x
        spread = 0.1 / (2 + jnp.exp(t)) if backward else 0.75 * jnp.mean((x_hat - x) ** 2, (1, 2))
        z_s = addim(z_t, x_hat, t, s, spread)
        z_r = samplers.ddim_step(z_s, some_student(z_s, s).x, s, r)
        (alpha_t, sigma_t), (alpha_r, sigma_r) = (
            schedules.alpha_sigma(process.along_batch(level, z_t)) for level in (t, r)
        )
        inverse = (z_r - sigma_r / sigma_t * z_t) / (alpha_r - sigma_r / sigma_t * alpha_t)
        last, first = (process.along_batch(v, z_t) for v in (segment == 0, index == 0))
        clean = jnp.where(first, x_hat, some_student(z_s, s).x)
        # Of what x_hat errs, how much z_r does, from t and from the segment's start.
        (alpha_q, sigma_q) = schedules.alpha_sigma(SCHEDULE((segment + 1) / segments))
        moved, most = (
            alpha_r.ravel() - sigma_r.ravel() / sigma * alpha
            for alpha, sigma in ((alpha_t.ravel(), sigma_t.ravel()), (alpha_q, sigma_q))
        )
        weights = weight, jnp.where(segment == 0, 1.0, (moved / most) ** 2)
        return target, jnp.where(last, clean, inverse), index, weights

    with jax.enable_x64(True):
        target, formula, index, weights = run(draws(MIXTURE, 64, jnp.float64))
        np.testing.assert_allclose(target, formula, atol=1e-9)
        np.testing.assert_allclose(*weights, rtol=1e-9)
        assert set(np.asarray(index)) == set(range(total))


@pytest.mark.parametrize(
    ("data", "segments"), [(GAUSSIAN, 2), (MIXTURE, 1)], ids=["gaussian", "mixture"]
)
def test_a_perfect_student_is_the_target_of_many_teacher_steps(data, segments, monkeypatch):
    """A student that follows the flow exactly lands where it is told to, the more so the larger T.

    A teacher's DDIM step errs to second order, so that T of them, on the way from where a student
    is taught nothing to where it draws from, err to first. What aDDIM adds vanishes more slowly,
    near order 1.5, for at the clean end it is as large as the noise that there is.
    """
    student = perfect(data, segments)
    objective = build("consistency", teacher_steps_start=128, teacher_steps_end=256)

    def error(x, fraction):
        z_t, logsnr_t, target, _ = objective(
            jax.random.key(1), x, exact_denoiser(data), student, SCHEDULE, segments, fraction
        )
        end = segment_end(logsnr_t, segments)
        off = target - student(z_t, logsnr_t).x
        return jnp.mean(jnp.abs(samplers.ddim_step(jnp.zeros_like(off), off, logsnr_t, end)))

    with jax.enable_x64(True):
        x = draws(data, 1024, jnp.float64)
        run = jax.jit(error)
        coarse, fine = (float(run(x, fraction)) for fraction in (0.0, 1.0))
        assert np.log2(coarse / fine) > 1.25 and coarse < 1e-3
        monkeypatch.setattr(distillation, "SPREAD_OF_ERROR", 0.0)
        run = jax.jit(lambda *arguments: error(*arguments))
        coarse, fine = (float(run(x, fraction)) for fraction in (0.0, 1.0))
        assert np.log2(coarse / fine) == pytest.approx(2.0, abs=0.05) and coarse < 1e-4


@pytest.mark.parametrize("name", SECTIONS)
def test_where_the_student_is_exact_its_own_pictures_are_as_the_noised_ones(name):
    """Backward's z_t then lies on the exact flow of its noise, whose marginal is q(z_t).

    At a segment's start to the digits; within it the student's step is a chord of the flow.
    """
    teacher = exact_denoiser(MIXTURE)

    @jax.jit
    def run(x):
        found = []
        for steps in (3, 6):
            kept = {} if name == "progressive" else fixed_steps(4 * steps)
            objective = build(name, backward=True, **kept)
            student = perfect(MIXTURE, steps)
            z_t, t, *_ = objective(jax.random.key(1), x, teacher, student, SCHEDULE, steps, 0.0)
            noise = jax.random.normal(jax.random.split(jax.random.key(1))[1], x.shape, x.dtype)
            exact = exact_solution(MIXTURE, noise, SCHEDULE(1.0), process.along_batch(t, x))
            at_start = jnp.abs(t - SCHEDULE(grid_index(t, steps) / steps)) < 1e-6
            found.append((jnp.abs(z_t - exact).mean((1, 2)), at_start))
        return found

    with jax.enable_x64(True):
        found = run(draws(MIXTURE, 256, jnp.float64))
    (coarse, coarse_start), (fine, fine_start) = ([*map(np.asarray, each)] for each in found)
    np.testing.assert_allclose(coarse[coarse_start], 0.0, atol=1e-6)
    np.testing.assert_allclose(fine[fine_start], 0.0, atol=1e-6)
    if name == "consistency":
        within = coarse[~coarse_start].mean(), fine[~fine_start].mean()
        assert within[1] < 0.4 * within[0] < 0.04
    else:
        assert coarse_start.all() and fine_start.all()


def test_backward_z_t_is_what_the_student_draws_through():
    """At a segment's start z_t is DDIM's own, of as many steps as lead there."""
    steps, x = 4, draws(MIXTURE, 16)
    noise = jax.random.normal(jax.random.key(2), x.shape)

    @jax.jit
    def run(noise):
        levels = SCHEDULE(1.0 - jnp.arange(steps + 1) / steps)
        keys = jax.random.split(jax.random.key(0), len(x))
        found = []
        for n in range(steps):
            t = jnp.full(len(x), levels[n])
            z_t = distillation.trajectory(some_student, noise, SCHEDULE, steps, t, steps)
            drawn = samplers.integrate(samplers.ddim(), some_student, noise, levels[: n + 1], keys)
            found.append((z_t, drawn))
        return found

    for z_t, drawn in run(noise):
        np.testing.assert_allclose(z_t, drawn, atol=1e-5)


def test_addim_moves_x_hat_so_that_ddim_goes_where_addim_does():
    x_hat, z_t = draws(MIXTURE, 6), draws(GAUSSIAN, 6, seed=4)
    spread = jnp.linspace(0.0, 0.3, 6)
    logsnr_t, logsnr_s = jnp.linspace(-19.0, 9.0, 6), jnp.linspace(-17.0, 11.0, 6)
    move = jax.jit(samplers.adjusted)
    moved = move(x_hat, z_t, spread, logsnr_t, logsnr_s)
    wanted = jax.jit(addim)(z_t, x_hat, logsnr_t, logsnr_s, spread)
    step = jax.jit(samplers.ddim_step)(z_t, moved, logsnr_t, logsnr_s)
    np.testing.assert_allclose(step, wanted, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(moved[0], x_hat[0])  # nothing left open, nothing to lengthen
    clean = move(x_hat, z_t, spread, logsnr_t, jnp.full(6, jnp.inf))
    np.testing.assert_array_equal(clean, x_hat)


def test_teacher_steps_are_annealed_on_a_logarithmic_scale():
    """And one program serves every fraction and number of steps."""
    traced = []

    @jax.jit
    def run(steps, fraction):
        traced.append(steps)
        objective = build("consistency", teacher_steps_start=4, teacher_steps_end=64)
        key, teacher = jax.random.key(0), exact_denoiser(GAUSSIAN)
        return objective(key, x, teacher, some_student, SCHEDULE, steps, fraction).logsnr_t

    x = draws(GAUSSIAN, 256)
    for steps, fraction, total in ((2, 0.0, 4), (2, 0.5, 16), (4, 1.0, 64), (1, 1.0, 64)):
        logsnr_t = run(steps, fraction)
        times = np.unique(grid_index(logsnr_t, total))
        np.testing.assert_array_equal(times, np.arange(total) + 1)
        np.testing.assert_allclose(np.unique(logsnr_t), SCHEDULE(times[::-1] / total), atol=2e-4)
    assert len(traced) == 1


@pytest.mark.parametrize(("name", "backward"), EVERY)
def test_both_ends_are_finite_in_float32_and_bfloat16(name, backward):
    """Any network, of float32 or bfloat16, from logsnr -20 to 20; the computation is float32."""

    def network(kind, dtype, z, logsnr):
        z, logsnr = z.astype(dtype), logsnr.astype(dtype)
        output = jnp.sin(3 * z) + 0.01 * process.along_batch(logsnr, z)
        return Denoised(process.predictions(output, z, logsnr, kind).x)

    @jax.jit
    def run(x):
        key, objective, found = jax.random.key(0), build(name, backward), []
        for kind, dtype, steps in (
            ("eps", jnp.float32, 1),
            ("x", jnp.bfloat16, 1),
            ("eps", jnp.bfloat16, 256),
            ("v", jnp.bfloat16, 256),
        ):
            either = functools.partial(network, kind, dtype)
            found.append(objective(key, x.astype(dtype), either, either, SCHEDULE, steps, 1.0))
        return found

    for example in run(draws(MIXTURE, 64)):
        for value in example:
            assert value.dtype == jnp.float32 and np.all(np.isfinite(value))


def test_targets_keep_their_digits_at_both_ends():
    """In float32 as in float64, where the paper's quotient of differences of z's has none left."""
    start = np.array([-20.0, -12.0, 0.0, 12.0, 19.5])
    pictures = np.asarray([draws(MIXTURE, 5, seed=n) for n in range(3)])

    def run(dtype):
        t, m, s = (jnp.asarray(start + ahead, dtype) for ahead in (0.0, 0.25, 0.5))
        first, second, z_t = (each.astype(dtype) for each in pictures)
        z_s = samplers.ddim_step(distillation.ddim_step(z_t, first, t, m), second, m, s)
        (alpha_t, sigma_t), (alpha_s, sigma_s) = (
            schedules.alpha_sigma(process.along_batch(level, z_t)) for level in (t, s)
        )
        ratio = sigma_s / sigma_t
        quotient = (z_s - ratio * z_t) / (alpha_s - ratio * alpha_t)
        return np.asarray(distillation.joined(first, second, t, m, s)), np.asarray(quotient)

    single, lossy = run(jnp.float32)
    with jax.enable_x64(True):
        double, quotient = run(jnp.float64)
    np.testing.assert_allclose(double, quotient, atol=1e-9)
    np.testing.assert_allclose(single, double, atol=1e-5)
    assert np.abs(lossy - quotient).max() > 1e-3


@pytest.mark.parametrize(("name", "backward"), EVERY)
def test_nothing_of_a_target_has_a_gradient(name, backward):
    def loss(weight, x, steps):
        def student(z, logsnr):
            return Denoised(weight * z)

        objective, key = build(name, backward), jax.random.key(0)
        example = objective(key, x, student, student, SCHEDULE, steps, 0.5)
        return sum(jnp.sum(value) for value in example)

    assert jax.jit(jax.grad(loss))(0.5, draws(MIXTURE, 4), 3) == 0.0


def test_students_of_no_steps_and_teachers_of_fewer_and_fewer_are_refused():
    for name in SECTIONS:
        with pytest.raises(UserError, match="1 or more"):
            build(name)(jax.random.key(0), draws(MIXTURE, 2), None, None, SCHEDULE, 0, 0.0)
    for start, end in ((0, 64), (64, 32), (-1, -1)):
        with pytest.raises(UserError, match="no fewer at the end"):
            build("consistency", teacher_steps_start=start, teacher_steps_end=end)

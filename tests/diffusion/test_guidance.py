"""Guidance and thresholds: what they equal, what they cost, and by hand on small arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cascade import registry
from cascade.diffusion import guidance, process, schedules
from cascade.diffusion.guidance import Denoised
from cascade.errors import UserError

BATCH = 4
Z_T = jax.random.normal(jax.random.key(0), (BATCH, 4, 4, 3))
LOGSNR = jnp.array([-8.0, -1.0, 1.0, 8.0])
COND = {"text_emb": jnp.arange(1.0, BATCH + 1)[:, None], "text_mask": jnp.ones((BATCH, 1), bool)}
NULL = {"text_emb": jnp.zeros((BATCH, 1)), "text_mask": jnp.zeros((BATCH, 1), bool)}


class Network:
    """A denoiser that depends on all its inputs and notes the batch of each evaluation."""

    def __init__(self, learned_variance=False):
        self.batches = []
        self.learned_variance = learned_variance

    def __call__(self, z_t, logsnr, cond):
        self.batches.append(len(z_t))
        text = jnp.sum(cond["text_emb"] * cond["text_mask"], 1)[:, None, None, None]
        x = jnp.tanh(z_t * jax.nn.sigmoid(logsnr)[:, None, None, None] + 0.3 * text * z_t)
        return Denoised(x, x * 0 + text if self.learned_variance else None)


def run(weight, null=NULL, network=None, logsnr=LOGSNR, **keywords):
    return guidance.guide(network or Network(), COND, null, weight, **keywords)(Z_T, logsnr)


@pytest.mark.parametrize("weight", [1.0, 1])
def test_weight_one_is_no_guidance_and_one_evaluation(weight):
    network = Network()
    guided = run(weight, network=network, rescale=0.7)
    assert network.batches == [BATCH]
    np.testing.assert_array_equal(guided.x, Network()(Z_T, LOGSNR, COND).x)


def test_any_other_weight_is_one_evaluation_on_twice_the_batch():
    for weight in (0.0, 3.0, jnp.ones(BATCH), jnp.array(1.0)):
        network = Network()
        run(weight, network=network)
        assert network.batches == [2 * BATCH]


@pytest.mark.parametrize("weight", [jnp.ones(BATCH), jnp.array(1.0)])
def test_an_array_of_ones_gives_the_very_same_pictures(weight):
    expected = Network()(jnp.tile(Z_T, (2, 1, 1, 1)), jnp.tile(LOGSNR, 2), doubled(COND)).x[:BATCH]
    np.testing.assert_array_equal(run(weight).x, expected)


def doubled(cond):
    return jax.tree.map(lambda a: jnp.concatenate([a, a]), cond)


@pytest.mark.parametrize("weight", [0.0, 1.35, 8.0])
def test_guidance_mixes_eps_as_imagen_does(weight):
    def eps(x):
        return process.predictions(x, Z_T, LOGSNR, "x").eps

    network = Network()
    mixed = weight * eps(network(Z_T, LOGSNR, COND).x) + (1 - weight) * eps(
        network(Z_T, LOGSNR, NULL).x
    )
    np.testing.assert_allclose(eps(run(weight).x), mixed, rtol=1e-4, atol=1e-3)


def test_a_weight_for_each_picture():
    weights = jnp.array([0.0, 1.0, 2.0, 7.5])
    together = run(weights).x
    for i, weight in enumerate([0.0, 1.0, 2.0, 7.5]):
        np.testing.assert_allclose(together[i], run(weight).x[i], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("weight", [0.0, 1.0, 5.0])
def test_zero_text_and_the_null_condition_are_identical(weight):
    """Text zeroed by hand is the null condition, and guiding away from oneself does nothing."""
    zeroed = {"text_emb": COND["text_emb"] * 0, "text_mask": COND["text_mask"] & False}
    guided = guidance.guide(Network(), zeroed, NULL, weight)(Z_T, LOGSNR)
    np.testing.assert_allclose(guided.x, Network()(Z_T, LOGSNR, NULL).x, rtol=1e-5, atol=1e-6)


def test_a_negative_prompt_is_led_away_from():
    negative = {"text_emb": -COND["text_emb"], "text_mask": COND["text_mask"]}
    x_cond, x_neg = (Network()(Z_T, LOGSNR, c).x for c in (COND, negative))
    np.testing.assert_allclose(
        run(3.0, null=negative).x, x_cond + 2.0 * (x_cond - x_neg), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("weight", [4.0, jnp.full(BATCH, 4.0)])
def test_outside_the_interval_only_the_condition_counts(weight):
    plain, everywhere = run(jnp.array(1.0)).x, run(weight).x
    scheduled = guidance.interval(low=-2.0, high=2.0)(weight, None)
    inside = jax.jit(lambda z: run(scheduled, logsnr=z).x)(LOGSNR)
    np.testing.assert_allclose(inside[jnp.array([0, 3])], plain[jnp.array([0, 3])], rtol=1e-6)
    np.testing.assert_allclose(inside[1:3], everywhere[1:3], rtol=1e-5, atol=1e-6)
    assert np.abs(everywhere - plain).max() > 0.1


LEVELS = jnp.array([-8.0, -3.0, -1.0, 0.5, 1.0, 4.0, 8.0, 20.0])  # seven steps


@pytest.mark.parametrize("weight", [5.0, jnp.array(5.0), jnp.full(7, 5.0)])
@pytest.mark.parametrize(
    ("steps", "expected"),
    [(0, "lhlhlhl"), (1, "hlhlhlh"), (3, "hhhlhlh"), (7, "hhhhhhh"), (99, "hhhhhhh")],
)
def test_oscillating_guidance_alternates_after_its_first_steps(weight, steps, expected):
    oscillating = guidance.oscillating(steps=steps, low=1.5)
    weights = jax.jit(lambda at: oscillating(weight, LEVELS)(at))(LEVELS[:-1])
    assert "".join("h" if w == 5.0 else "l" if w == 1.5 else "?" for w in weights) == expected


def test_a_level_that_a_dtype_rounds_still_belongs_to_its_step():
    levels = jnp.linspace(-20.0, 20.0, 33)
    at = guidance.oscillating(steps=4, low=1.0)(3.0, levels)
    np.testing.assert_array_equal(at(levels[:-1].astype(jnp.bfloat16)), at(levels[:-1]))


def test_oscillating_guidance_is_one_weight_a_level_of_the_guided_picture():
    at = guidance.oscillating(steps=1, low=-0.5)(4.0, jnp.array([-8.0, -1.0, 1.0, 8.0, 20.0]))
    by_hand = run(jnp.array([4.0, -0.5, 4.0, -0.5])).x
    np.testing.assert_array_equal(run(at).x, by_hand)


@pytest.mark.parametrize("weight", [1.0, 1])
def test_a_schedule_of_weight_one_is_no_guidance(weight):
    for name, keywords in {
        "constant": {},
        "interval": {"low": -1.0, "high": 1.0},
        "oscillating": {"steps": 2, "low": 0.5},
    }.items():
        schedule = registry.build(
            "guidance schedule", guidance.GUIDANCE_SCHEDULES, {"name": name, **keywords}
        )
        network = Network()
        run(schedule(weight, LEVELS), network=network)
        assert network.batches == [BATCH]


@pytest.mark.parametrize(
    ("name", "keywords", "said"),
    [
        ("interval", {"low": 3.0, "high": -3.0}, "lower first"),
        ("interval", {"low": float("nan"), "high": 1.0}, "lower first"),
        ("oscillating", {"steps": -1, "low": 1.0}, "0 or more"),
        ("oscillating", {"steps": 2, "low": float("inf")}, "finite"),
    ],
)
def test_impossible_guidance_schedules_are_refused(name, keywords, said):
    with pytest.raises(UserError, match=said):
        guidance.GUIDANCE_SCHEDULES[name](**keywords)


def test_rescale_brings_back_the_spread_of_each_picture():
    plain, guided = run(jnp.array(1.0)).x, run(6.0).x
    spread = {r: run(6.0, rescale=r).x.std((1, 2, 3)) for r in (0.5, 1.0)}
    np.testing.assert_allclose(spread[1.0], plain.std((1, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(
        spread[0.5], (plain.std((1, 2, 3)) + guided.std((1, 2, 3))) / 2, rtol=1e-5
    )
    np.testing.assert_array_equal(run(6.0, rescale=0.0).x, guided)


def test_rescaling_a_flat_picture_leaves_it():
    def flat(z_t, logsnr, cond):
        return Denoised(jnp.zeros_like(z_t) + cond["text_emb"][:, :, None, None])

    np.testing.assert_array_equal(run(2.0, network=flat, rescale=1.0).x, run(2.0, network=flat).x)


def test_a_learned_variance_is_the_conditional_one():
    guided = run(3.0, network=Network(learned_variance=True))
    np.testing.assert_array_equal(guided.fraction[:, 0, 0, 0], COND["text_emb"][:, 0])
    bounded = guidance.thresholded(lambda z, s: guided, guidance.threshold_static)(Z_T, LOGSNR)
    assert np.abs(bounded.x).max() <= 1.0
    np.testing.assert_array_equal(bounded.fraction, guided.fraction)


@pytest.mark.parametrize("kind", process.KINDS)
def test_a_network_of_any_output_becomes_the_same_denoiser(kind):
    x, eps = jax.random.uniform(jax.random.key(1), (2, *Z_T.shape), minval=-1.0)
    logsnr = LOGSNR / 4
    alpha, sigma = schedules.alpha_sigma(process.along_batch(logsnr, x))
    output = {"x": x, "eps": eps, "v": alpha * eps - sigma * x}[kind]
    output = jnp.concatenate([output, jnp.full_like(output, -0.5)], -1)
    denoise = guidance.denoiser(lambda z_t, logsnr, cond: output, kind)
    denoised = denoise(process.diffuse(x, eps, logsnr), logsnr, COND)
    np.testing.assert_allclose(denoised.x, x, atol=1e-5)
    np.testing.assert_array_equal(denoised.fraction, jnp.full_like(x, 0.25))


@pytest.mark.parametrize(
    ("weight", "keywords"),
    [
        (float("nan"), {}),
        (float("inf"), {}),
        (2.0, {"rescale": 1.5}),
        (2.0, {"rescale": float("nan")}),
        (2.0, {"null": {"text_emb": NULL["text_emb"]}}),
    ],
)
def test_contradictions_are_refused(weight, keywords):
    with pytest.raises(UserError, match="give"):
        run(weight, **keywords)
    with pytest.raises(UserError, match="x, eps, v"):
        guidance.denoiser(Network(), "score")


def test_dynamic_threshold_by_hand():
    x = jnp.array([[0.0, 1.0, -2.0, 3.0, -4.0], [0.0, 0.1, 0.2, -0.3, 0.9]])
    # |x| = 0 1 2 3 4: the median is 2, the 87.5th percentile halfway from 3 to 4. The second
    # picture lies within [-1, 1] and stays as it is, whatever its neighbour needs.
    cases = [
        (50.0, 10.0, [0.0, 0.5, -1.0, 1.0, -1.0]),
        (87.5, 10.0, [0.0, 1 / 3.5, -2 / 3.5, 3 / 3.5, -1.0]),
        (100.0, 10.0, [0.0, 0.25, -0.5, 0.75, -1.0]),
        (50.0, 1.6, [0.0, 0.625, -1.0, 1.0, -1.0]),
        (50.0, 1.0, [0.0, 1.0, -1.0, 1.0, -1.0]),
    ]
    for percentile, cap, expected in cases:
        section = {"name": "dynamic", "percentile": percentile, "cap": cap}
        result = registry.build("threshold", guidance.THRESHOLDS, section)(x)
        np.testing.assert_allclose(result[0], expected, rtol=1e-6)
        np.testing.assert_array_equal(result[1], x[1])


def test_static_threshold_clips_and_none_does_nothing():
    x = jnp.array([[-3.0, -0.5, 2.0]])
    np.testing.assert_array_equal(guidance.THRESHOLDS["static"]()(x), [[-1.0, -0.5, 1.0]])
    np.testing.assert_array_equal(guidance.THRESHOLDS["none"]()(x), x)


def test_dynamic_threshold_is_each_pictures_own_at_any_scale():
    x = (
        jax.random.normal(jax.random.key(0), (3, 8, 8, 3))
        * jnp.array([0.1, 3.0, 2e4])[:, None, None, None]
    )
    together = guidance.threshold_dynamic(x, 99.5, np.inf)
    assert np.abs(together).max() <= 1.0
    for i in range(3):
        alone = guidance.threshold_dynamic(x[i : i + 1], 99.5, np.inf)
        np.testing.assert_allclose(together[i], alone[0], rtol=1e-6)


@pytest.mark.parametrize(
    "keys",
    [
        {"percentile": 0.0, "cap": 1.5},
        {"percentile": 101.0, "cap": 1.5},
        {"percentile": 99.5, "cap": 0.5},
        {"percentile": 99.5, "cap": float("nan")},
    ],
)
def test_impossible_thresholds_are_refused(keys):
    with pytest.raises(UserError, match="give"):
        registry.build("threshold", guidance.THRESHOLDS, {"name": "dynamic", **keys})

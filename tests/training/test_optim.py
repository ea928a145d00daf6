"""Learning rates take the values they promise; every optimiser goes downhill."""

import jax
import jax.numpy as jnp
import pytest

from cascade import registry
from cascade.training.optim import LEARNING_RATES, OPTIMIZERS

SECTIONS = {
    "adam": {"b1": 0.9, "b2": 0.99, "eps": 1e-8},
    "adamw": {"b1": 0.9, "b2": 0.99, "eps": 1e-8, "weight_decay": 0.01},
    "adafactor": {
        "decay_rate": 0.8,
        "clipping_threshold": 1.0,
        "b1": 0.0,
        "parameter_scale": False,
    },
}


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_every_optimiser_descends_a_bowl(name):
    section = {"name": name, **SECTIONS[name]}
    optimizer = registry.build("optimizer", OPTIMIZERS, section, learning_rate=0.05)
    params = {"w": jnp.full((4, 4), 2.0), "b": jnp.full(4, -1.0)}
    state = optimizer.init(params)

    def loss(p):
        return jnp.sum(p["w"] ** 2) + jnp.sum(p["b"] ** 2)

    start = loss(params)
    for _ in range(100):
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        params = jax.tree.map(jnp.add, params, updates)
    assert loss(params) < 0.05 * start


def test_constant_rises_linearly_then_stays():
    rate = LEARNING_RATES["constant"](peak=0.1, warmup_steps=10)
    assert float(rate(5)) == pytest.approx(0.05)
    assert float(rate(10)) == float(rate(10_000)) == pytest.approx(0.1)


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_decays_end_where_they_say(name):
    rate = LEARNING_RATES[name](peak=0.1, warmup_steps=10, decay_steps=110, end=0.01)
    assert float(rate(10)) == pytest.approx(0.1)
    assert float(rate(60)) == pytest.approx(0.055, rel=1e-5)  # half-way of either shape
    assert float(rate(110)) == float(rate(1_000)) == pytest.approx(0.01)


def test_a_parameters_scale_is_adafactors_unit():
    section = SECTIONS["adafactor"] | {"parameter_scale": True}
    optimizer = OPTIMIZERS["adafactor"](learning_rate=0.1, **section)
    params = {"large": jnp.full((4, 4), 2.0), "small": jnp.full((4, 4), 0.02)}
    slope = jax.tree.map(jnp.ones_like, params)
    updates, _ = optimizer.update(slope, optimizer.init(params), params)
    assert float(updates["large"][0, 0]) == pytest.approx(100 * float(updates["small"][0, 0]))
    assert float(updates["large"][0, 0]) == pytest.approx(-0.1 * 2.0, rel=1e-4)


def test_weight_decay_leaves_vectors_alone():
    optimizer = OPTIMIZERS["adamw"](learning_rate=0.1, **SECTIONS["adamw"])
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zero, optimizer.init(params), params)
    assert (updates["kernel"] < 0).all() and (updates["bias"] == 0).all()

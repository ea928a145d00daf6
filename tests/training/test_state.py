"""Laws of one update: accumulation, EMA, randomness that follows from the step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cascade.training.state import TrainState, ema_decay, gradients, init_state, make_train_step


class Quadratic:
    """A stage whose loss is the mean of (w − image)² over the batch: gradients by hand."""

    def init(self, key):
        return {"w": jnp.array(3.0)}

    def loss(self, params, batch, key, train=True):
        loss = jnp.mean((params["w"] - batch["image"]) ** 2)
        return loss, {"loss": loss}


@pytest.mark.parametrize("microbatches", [1, 2, 4, 8])
def test_accumulated_gradient_is_the_whole_batchs(microbatches):
    image = jnp.arange(8.0)
    grads, metrics = gradients(
        Quadratic(), {"w": jnp.array(3.0)}, {"image": image}, jax.random.key(0), microbatches, "cpu"
    )
    np.testing.assert_allclose(grads["w"], 2 * (3.0 - image.mean()), rtol=1e-6)
    np.testing.assert_allclose(metrics["loss"], jnp.mean((3.0 - image) ** 2), rtol=1e-6)


def test_ema_follows_its_recurrence(smoke_config):
    optimizer = optax.sgd(0.1)
    smoke_config.train.ema_decay = 0.5
    step = make_train_step(Quadratic(), optimizer, smoke_config.train)
    state = init_state(Quadratic(), optimizer, jax.random.key(0))
    w = ema = 3.0
    for index in range(6):
        state, _ = step(state, {"image": jnp.zeros(4)}, jax.random.key(1))
        w -= 0.1 * 2 * w
        decay = min(0.5, (1 + index) / (10 + index))
        ema = decay * ema + (1 - decay) * w
    np.testing.assert_allclose(state.params["w"], w, rtol=1e-6)
    np.testing.assert_allclose(state.ema_params["w"], ema, rtol=1e-6)


def test_ema_decay_warms_up_to_its_limit():
    assert float(ema_decay(0, 0.999)) == pytest.approx(0.1)
    assert float(ema_decay(10**6, 0.999)) == pytest.approx(0.999)


def test_a_steps_randomness_follows_from_key_and_step_alone():
    class Noisy(Quadratic):
        def loss(self, params, batch, key, train=True):
            loss = params["w"] * jax.random.normal(key)
            return loss, {"loss": loss}

    class Settings:
        microbatches, ema_decay = 1, 0.9

    step = make_train_step(Noisy(), optax.sgd(0.0), Settings)
    key = jax.random.key(7)
    state = init_state(Noisy(), optax.sgd(0.0), key)
    _, first = step(state, {"image": jnp.zeros(1)}, key)
    later = TrainState(state.step + 1, state.params, state.ema_params, state.opt_state)
    _, second = step(later, {"image": jnp.zeros(1)}, key)
    _, again = step(later, {"image": jnp.zeros(1)}, key)
    assert float(first["loss"]) != float(second["loss"]) == float(again["loss"])


class Deep:
    """A stage of far more weights than activations: its step's memory is that of gradients."""

    def init(self, key):
        keys = jax.random.split(key, 8)
        return {str(i): jax.random.normal(k, (256, 256)) / 16 for i, k in enumerate(keys)}

    def loss(self, params, batch, key, train=True):
        h = batch["image"]
        for w in params.values():
            h = jnp.tanh(h @ w)
        loss = jnp.mean(h**2)
        return loss, {"loss": loss}


def temporary_bytes(optimizer, microbatches: int) -> int:
    """What a step of slices of four holds beyond its arguments, as accelerators run it: in a loop.

    Where slices are unrolled, for CPUs' speed, their order and so their memory is the compiler's.
    """

    class Settings:
        ema_decay = 0.9

    Settings.microbatches = microbatches
    state = jax.eval_shape(lambda key: init_state(Deep(), optimizer, key), jax.random.key(0))
    batch = {"image": jax.ShapeDtypeStruct((4 * microbatches, 256), jnp.float32)}
    key = jax.eval_shape(jax.random.key, 0)
    step = jax.jit(make_train_step(Deep(), optimizer, Settings, "tpu"), donate_argnums=0)
    return step.lower(state, batch, key).compile().memory_analysis().temp_size_in_bytes


def test_slices_have_no_gradients_of_their_own_beside_the_sum():
    """Beyond what one slice alone takes, several take their running sum: one copy of the gradients.

    Alone, a gradient is used up by its update as soon as it is there. In a loop it must be added to
    the sum as soon; one kept until its slice is done would make that two copies.
    """
    optimizer = optax.adam(1e-3)
    one_copy = 8 * 256 * 256 * 4
    alone, several = temporary_bytes(optimizer, 1), temporary_bytes(optimizer, 4)
    assert alone < one_copy / 2
    assert one_copy <= several < alone + 1.05 * one_copy

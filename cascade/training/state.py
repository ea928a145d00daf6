"""The training state and the one pure function that advances it."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from cascade.parallel.mesh import compiler_options, replicated


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["step", "params", "ema_params", "opt_state"],
    meta_fields=[],
)
@dataclasses.dataclass
class TrainState:
    """What a checkpoint must hold to go on as if nothing had happened.

    `step` counts finished updates (int32 scalar). Randomness isn't here: every step's key is
    `fold_in(key, step)`.
    """

    step: jax.Array
    params: Any
    ema_params: Any
    opt_state: Any


def init_state(task, optimizer: optax.GradientTransformation, key, *given) -> TrainState:
    """Fresh parameters, their EMA equal to them, and an empty optimiser state.

    Args:
      task: has `init(key, *given)`: a `Stage`, or a `cascade.training.loop.Task`.
    """
    params = task.init(key, *given)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema_params=jax.tree.map(jnp.copy, params),
        opt_state=optimizer.init(params),
    )


def ema_decay(step, decay: float):
    """min(decay, (1 + step) / (10 + step)): young averages forget their initialisation."""
    return jnp.minimum(decay, (1.0 + step) / (10.0 + step))


def gradients(task, params, batch, key, microbatches: int, platform: str, *given):
    """Loss gradient and metrics of a batch [B, ...], taken `microbatches` slices at a time.

    The slices' gradients are averaged, so that memory is that of B / microbatches pictures.

    Args:
      task: has `loss(params, batch, key, *given)`.
      platform: that this is compiled for: "cpu", "gpu", "tpu".
    """
    grad = jax.grad(task.loss, has_aux=True)
    if microbatches == 1:
        return grad(params, batch, key, *given)

    def split(a):  # [B, ...] -> [B/M, M, ...] -> [M, B/M, ...]: each device's share stays its own
        return a.reshape(a.shape[0] // microbatches, microbatches, *a.shape[1:]).swapaxes(0, 1)

    def add_slice(total, slice_and_index):
        part, index = slice_and_index
        grads, metrics = grad(params, part, jax.random.fold_in(key, index), *given)
        return jax.tree.map(jnp.add, total, grads), metrics

    # Inside a scan XLA's CPU backend runs a convolution's kernel gradient about 45 times slower.
    unroll = True if platform == "cpu" else 1
    total, metrics = jax.lax.scan(
        add_slice,
        jax.tree.map(jnp.zeros_like, params),
        (jax.tree.map(split, batch), jnp.arange(microbatches)),
        unroll=unroll,
    )
    mean = jax.tree.map(lambda g: g / microbatches, total)
    return mean, jax.tree.map(lambda m: m.mean(0), metrics)


def make_train_step(
    task, optimizer: optax.GradientTransformation, config, platform: str | None = None
):
    """`train_step(state, batch, key, *given) -> (state, metrics)`, to be jitted, state donated.

    Args:
      task: as for `gradients`.
      config: the `train` section, with `microbatches` and `ema_decay`.
      platform: as `gradients`; None is the platform that is here.

    Metrics are scalars and [K] arrays on the device; nothing here waits for the host.
    """

    platform = platform or jax.default_backend()

    def train_step(state: TrainState, batch, key, *given):
        key = jax.random.fold_in(key, state.step)
        how = config.microbatches, platform
        grads, metrics = gradients(task, state.params, batch, key, *how, *given)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        decay = ema_decay(state.step, config.ema_decay)
        ema_params = jax.tree.map(
            lambda ema, p: decay * ema + (1.0 - decay) * p, state.ema_params, params
        )
        metrics["gradient_norm"] = optax.global_norm(grads)
        return TrainState(state.step + 1, params, ema_params, opt_state), metrics

    return train_step


def jit_train_step(task, optimizer: optax.GradientTransformation, config, mesh: Mesh, placed):
    """`make_train_step`'s, compiled for a mesh, the state donated and coming back where it was.

    Args:
      config: the `train` section.
      placed: the state's shardings.
    """
    return jax.jit(
        make_train_step(task, optimizer, config, mesh.devices.flat[0].platform),
        donate_argnums=0,
        out_shardings=(placed, replicated(mesh)),
        compiler_options=compiler_options(mesh),
    )


def with_shardings(shapes, placed):
    """The shapes of a tree with where each array goes, as Orbax wants them for restoring."""
    return jax.tree.map(
        lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding),
        shapes,
        placed,
    )

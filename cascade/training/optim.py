"""The optax chain that a config spells: clip, then an optimiser under a learning-rate schedule."""

import jax
import optax

from cascade import registry


def constant(*, peak: float, warmup_steps: int) -> optax.Schedule:
    """Linear warm-up from 0 to `peak` over `warmup_steps`, then `peak`."""
    return optax.join_schedules(
        [optax.linear_schedule(0.0, peak, warmup_steps), optax.constant_schedule(peak)],
        [warmup_steps],
    )


def cosine(*, peak: float, warmup_steps: int, decay_steps: int, end: float) -> optax.Schedule:
    """Linear warm-up to `peak`, then half a cosine down to `end`, reached at `decay_steps`."""
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup_steps, decay_steps, end)


def linear(*, peak: float, warmup_steps: int, decay_steps: int, end: float) -> optax.Schedule:
    """Linear warm-up to `peak`, then a straight line down to `end`, reached at `decay_steps`."""
    return optax.join_schedules(
        [
            optax.linear_schedule(0.0, peak, warmup_steps),
            optax.linear_schedule(peak, end, decay_steps - warmup_steps),
        ],
        [warmup_steps],
    )


def adam(*, learning_rate, b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Adam (Kingma & Ba 2015)."""
    return optax.adam(learning_rate, b1=b1, b2=b2, eps=eps)


def adamw(
    *, learning_rate, b1: float, b2: float, eps: float, weight_decay: float
) -> optax.GradientTransformation:
    """Adam with decoupled decay (Loshchilov & Hutter 2019) of matrices and kernels alone."""

    def matrices(params):
        return jax.tree.map(lambda p: p.ndim > 1, params)

    return optax.adamw(
        learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=matrices
    )


def adafactor(
    *,
    learning_rate,
    decay_rate: float,
    clipping_threshold: float,
    b1: float,
    parameter_scale: bool,
) -> optax.GradientTransformation:
    """Adafactor (Shazeer & Stern 2018), which Imagen's base model was trained with.

    Args:
      learning_rate: of each step, times the root mean square of the parameter (at least 1e-3)
        where `parameter_scale` is set.
      decay_rate: of the second moments, which forget by 1 - step^-decay_rate.
      clipping_threshold: of each parameter's update, root mean square.
      b1: 0 keeps no first moment, so that the state is sublinear in the parameters.
    """
    return optax.adafactor(
        learning_rate,
        decay_rate=decay_rate,
        clipping_threshold=clipping_threshold,
        momentum=b1 or None,
        multiply_by_parameter_scale=parameter_scale,
    )


LEARNING_RATES = {"constant": constant, "cosine": cosine, "linear": linear}
OPTIMIZERS = {"adam": adam, "adamw": adamw, "adafactor": adafactor}


def make_optimizer(config) -> optax.GradientTransformation:
    """Global-norm clip (`config.clip_norm`, 0 = none), then `config.optimizer`.

    Args:
      config: the `train` section, with `learning_rate`, `optimizer` and `clip_norm`.
    """
    learning_rate = registry.build("learning_rate", LEARNING_RATES, config.learning_rate)
    optimizer = registry.build(
        "optimizer", OPTIMIZERS, config.optimizer, learning_rate=learning_rate
    )
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    return optax.chain(clip, optimizer)

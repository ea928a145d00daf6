"""A sharded training step computes what an unsharded one computes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from cascade.parallel import rules
from cascade.parallel.mesh import make_mesh, put_batch
from cascade.stage import Stage
from cascade.training.optim import make_optimizer
from cascade.training.state import init_state, make_train_step


def random_batch(stage, size, seed=0):
    rng = np.random.default_rng(seed)
    image, _, cond = stage.shapes(size)
    batch = {
        "image": rng.uniform(-1, 1, image.shape).astype(np.float32),
        "text_emb": rng.normal(size=cond["text_emb"].shape).astype(np.float32),
        "text_mask": rng.uniform(size=cond["text_mask"].shape) < 0.7,
    }
    if "lowres" in cond:
        batch["lowres"] = rng.uniform(-1, 1, cond["lowres"].shape).astype(np.float32)
    return batch


def two_steps(config, mesh, monkeypatch):
    """Losses and parameters after two updates on `mesh`, everything sharded by the rules."""
    monkeypatch.setattr(rules, "SMALLEST_SHARDED", 256)  # so that a tiny network is sharded at all
    stage, optimizer = Stage(config.stage), make_optimizer(config.train)
    key = jax.random.key(0)
    abstract = jax.eval_shape(lambda k: init_state(stage, optimizer, k), key)
    placed = rules.shardings(abstract, mesh)
    state = jax.jit(lambda k: init_state(stage, optimizer, k), out_shardings=placed)(key)
    step = jax.jit(make_train_step(stage, optimizer, config.train), donate_argnums=0)
    losses = []
    for index in range(2):
        state, metrics = step(state, put_batch(random_batch(stage, 8, index), mesh), key)
        losses.append(float(metrics["loss"]))
    return losses, state


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (2, 4, 1)])
def test_sharded_equals_unsharded(smoke_config, sizes, monkeypatch):
    smoke_config.train.batch_size = 8
    alone = make_mesh(data=1, fsdp=1, tensor=1, devices=jax.devices()[:1])
    losses, state = two_steps(smoke_config, alone, monkeypatch)
    mesh = make_mesh(data=sizes[0], fsdp=sizes[1], tensor=sizes[2])
    sharded_losses, sharded_state = two_steps(smoke_config, mesh, monkeypatch)
    np.testing.assert_allclose(sharded_losses, losses, rtol=2e-5)
    # Adam divides by a root: where a gradient is rounding noise its sign is too, so an update of
    # up to the learning rate either way; elsewhere parameters agree.
    rate = smoke_config.train.learning_rate.peak
    for one, other in zip(
        jax.tree.leaves(state.params), jax.tree.leaves(sharded_state.params), strict=True
    ):
        difference = np.abs(np.asarray(one) - np.asarray(other))
        assert difference.max() <= 4 * rate
        assert np.median(difference) < 1e-6


def test_fsdp_shards_the_largest_divisible_axis():
    mesh = make_mesh(data=1, fsdp=8, tensor=1)
    assert rules.fsdp_spec((3, 3, 512, 1024), mesh) == P(None, None, None, "fsdp")
    assert rules.fsdp_spec((3, 3, 512, 1001), mesh) == P(None, None, "fsdp", None)
    assert rules.fsdp_spec((1024,), mesh) == P()  # too small to be worth a gather
    assert rules.fsdp_spec((999, 1001), mesh) == P()  # nothing divides


def test_rules_come_before_the_default():
    mesh = make_mesh(data=1, fsdp=4, tensor=2)
    tree = {
        "attention": {"kernel": jnp.zeros((512, 512))},
        "conv": {"kernel": jnp.zeros((512, 512))},
    }
    placed = rules.shardings(tree, mesh, [("attention/", P(None, "tensor"))])
    assert placed["attention"]["kernel"].spec == P(None, "tensor")
    assert "fsdp" in placed["conv"]["kernel"].spec

"""A sharded training step computes what an unsharded one computes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from tiny_cascade import stage_config, trained

from cascade.parallel import rules
from cascade.parallel.mesh import make_mesh, put_batch
from cascade.training.state import TrainState, make_train_step


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


class Settings:
    """The keys of a config's `train` section that a step reads."""

    microbatches, ema_decay = 1, 0.9


def one_update(trained_stage, mesh):
    """Loss, updated parameters, and how many of them are sharded, after one step on `mesh`."""
    stage, params, _ = trained_stage
    optimizer = optax.sgd(0.1)
    state = TrainState(jnp.zeros((), jnp.int32), params, params, optimizer.init(params))
    state = jax.device_put(state, rules.shardings(state, mesh))
    step = jax.jit(make_train_step(stage, optimizer, Settings))
    state, metrics = step(state, put_batch(random_batch(stage, 8), mesh), jax.random.key(0))
    sharded = sum(not p.sharding.is_fully_replicated for p in jax.tree.leaves(state.params))
    return float(metrics["loss"]), state.params, sharded


def assert_close(one, other, tolerance):
    """Each leaf within `tolerance` of its own largest entry."""
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(np.abs(a).max(), 1e-3))


# test_layout.py has a step that is told of its mesh, as trainings take it.
@pytest.mark.parametrize(("data", "fsdp"), [pytest.param(8, 1, marks=pytest.mark.slow), (2, 4)])
@pytest.mark.parametrize("shape", [pytest.param((8, 0), marks=pytest.mark.slow), (16, 8)])
def test_sharded_equals_unsharded(shape, data, fsdp, monkeypatch):
    monkeypatch.setattr(rules, "SMALLEST_SHARDED", 256)  # so that a tiny network is sharded at all
    stage = trained(stage_config(*shape))
    alone = make_mesh(data=1, fsdp=1, tensor=1, devices=jax.devices()[:1])
    loss, params, _ = one_update(stage, alone)
    mesh = make_mesh(data=data, fsdp=fsdp, tensor=1)
    other_loss, other_params, sharded = one_update(stage, mesh)
    assert (sharded > 0) == (fsdp > 1)
    assert other_loss == pytest.approx(loss, rel=1e-5)
    assert_close(params, other_params, 1e-5)


def test_a_rule_that_doesnt_fit_is_passed_over():
    mesh = make_mesh(data=1, fsdp=4, tensor=2)
    spec = P(None, "tensor")
    assert rules.fits(spec, (3, 8), mesh)
    assert not rules.fits(spec, (3, 7), mesh)
    assert rules.fits(spec, (5, 3, 8), mesh)  # five blocks, stacked
    assert not rules.fits(spec, (8,), mesh)  # a factored moment of Adafactor
    assert rules.fits(P(("fsdp", "tensor"), None), (16, 3), mesh)
    placed = rules.shardings({"attention": {"v_row": jnp.zeros(8)}}, mesh, [("attention/", spec)])
    assert placed["attention"]["v_row"].spec == P()


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

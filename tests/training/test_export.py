"""Averaged weights come back from a run's checkpoint to the host, and nothing else is read."""

import json

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cascade.errors import UserError
from cascade.parallel import rules
from cascade.parallel.mesh import make_mesh
from cascade.training.checkpoint import Checkpoints
from cascade.training.state import TrainState, with_shardings

SEVERAL = 1  # the least elements that are sharded


def state_of(step: int) -> TrainState:
    """A state whose parts all differ."""
    rng = np.random.default_rng(step)

    def params():
        return {
            "dense": {"kernel": jnp.asarray(rng.normal(size=(16, 24)), jnp.float32)},
            "scale": jnp.asarray(rng.normal(size=3), jnp.float32),
        }

    optimizer = optax.adam(0.1)
    return TrainState(jnp.asarray(step), params(), params(), optimizer.init(params()))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A run's two checkpoints, written from eight devices."""
    monkeypatch.setattr(rules, "SMALLEST_SHARDED", SEVERAL)
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    numbers = iter(grain.MapDataset.range(9).to_iter_dataset())
    for step in (1, 2):
        state = state_of(step)
        state = jax.device_put(state, rules.shardings(state, make_mesh(data=2, fsdp=4, tensor=1)))
        assert not state.ema_params["dense"]["kernel"].sharding.is_fully_replicated
        checkpoints.save(step, state, numbers, {})
    checkpoints.close()
    return tmp_path


def restored(folder, state=None):
    """(step, averages) as `cascade bundle` reads them."""
    checkpoints = Checkpoints(folder, read_only=True)
    try:
        step, averages, _ = checkpoints.restore_ema(jax.eval_shape(lambda: state or state_of(0)))
    finally:
        checkpoints.close()
    return step, averages


def assert_averages(tree, step):
    expected = state_of(step).ema_params
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True):
        assert type(ours) is np.ndarray
        np.testing.assert_array_equal(ours, np.asarray(theirs))


def meta_of(folder, step):
    """A checkpoint's meta: its file, and what is in it."""
    path = folder / "checkpoints" / str(step) / "meta" / "metadata"
    return path, json.loads(path.read_text())


def test_averages_come_to_the_host_bit_for_bit(folder):
    step, averages = restored(folder)
    assert step == 2
    assert_averages(averages, 2)


def test_nothing_else_is_read(folder):
    """It may not even fit: here, another optimiser's state and parameters of another shape."""
    other = state_of(0)
    other.params, other.opt_state = {"w": jnp.zeros(5)}, optax.sgd(0.1).init({"w": jnp.zeros(5)})
    _, averages = restored(folder, other)
    assert_averages(averages, 2)


def test_averages_that_changed_are_noticed(folder):
    path, meta = meta_of(folder, 2)
    meta["checksums"]["ema_params"] ^= 1
    path.write_text(json.dumps(meta))
    step, averages = restored(folder)
    assert step == 1
    assert_averages(averages, 1)


@pytest.mark.parametrize("damaged", [False, True])
def test_of_earlier_versions_the_whole_state_is_read_and_verified(folder, damaged):
    for step in (1, 2):
        path, meta = meta_of(folder, step)
        del meta["checksums"]
        meta["format_version"] = 1
        meta["checksum"] ^= damaged
        path.write_text(json.dumps(meta))
    if damaged:
        with pytest.raises(UserError, match="None of the 2 checkpoints"):
            restored(folder)
    else:
        assert_averages(restored(folder)[1], 2)


def test_the_parts_checksums_sum_to_the_wholes(folder):
    for step in (1, 2):
        _, meta = meta_of(folder, step)
        assert set(meta["checksums"]) == {"step", "params", "ema_params", "opt_state"}
        assert sum(meta["checksums"].values()) % 2**32 == meta["checksum"]


def test_training_goes_on_from_what_was_read_before(folder):
    """The other way to read a checkpoint is as it was."""
    here = make_mesh(data=1, fsdp=1, tensor=1, devices=jax.devices()[:1])
    abstract = jax.eval_shape(lambda: state_of(0))
    checkpoints = Checkpoints(folder)
    step, state, _ = checkpoints.restore(with_shardings(abstract, rules.shardings(abstract, here)))
    checkpoints.close()
    assert step == 2
    jax.tree.map(np.testing.assert_array_equal, state, state_of(2))

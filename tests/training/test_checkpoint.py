"""A checkpoint comes back bit for bit, and a damaged one is noticed and stepped over."""

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from cascade.errors import UserError
from cascade.parallel.mesh import make_mesh
from cascade.training.checkpoint import Checkpoints, checksum


def a_state(seed=0):
    w, b = jax.random.split(jax.random.key(seed))
    return {"w": jax.random.normal(w, (300, 40)), "b": jax.random.normal(b, (40,), jnp.bfloat16)}


def numbers():
    return iter(grain.MapDataset.range(100).shuffle(seed=3).to_iter_dataset())


def abstract(state):
    return jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state
    )


def written(tmp_path, steps=(1, 2)):
    """Checkpoints of a state that differs at every step, with the iterator advanced as far."""
    checkpoints, iterator = Checkpoints(tmp_path, keep_last=5, keep_every=0), numbers()
    for step in steps:
        next(iterator)
        checkpoints.save(step, a_state(step), iterator, {"step": step}, f"f{step}")
    checkpoints.wait()
    return checkpoints


def assert_equal(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_state_data_position_and_config_come_back(tmp_path):
    written(tmp_path).close()
    iterator = numbers()
    step, state, meta = Checkpoints(tmp_path).restore(abstract(a_state()), iterator)
    assert step == 2 and meta["config"] == {"step": 2} and meta["text_fingerprint"] == "f2"
    assert_equal(state, a_state(2))
    unbroken = numbers()
    next(unbroken), next(unbroken)
    assert list(iterator) == list(unbroken)


def test_nothing_saved_is_none(tmp_path):
    assert Checkpoints(tmp_path).restore(abstract(a_state())) is None


def test_keep_last_and_keep_every(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=2, keep_every=4)
    iterator = numbers()
    for step in range(1, 8):
        checkpoints.save(step, a_state(), iterator, {})
    checkpoints.wait()
    assert sorted(checkpoints.manager.all_steps()) == [4, 6, 7]


def biggest_file(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip_a_bit(folder):
    path = biggest_file(folder)
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)


def truncate(folder):
    path = biggest_file(folder)
    path.write_bytes(path.read_bytes()[:100])


def empty(folder):
    for path in folder.rglob("*"):
        if path.is_file():
            path.unlink()


@pytest.mark.parametrize("damage", [flip_a_bit, truncate, empty])
def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(tmp_path, damage):
    checkpoints = written(tmp_path)
    damage(checkpoints.folder / "2")
    step, state, _ = Checkpoints(tmp_path).restore(abstract(a_state()))
    assert step == 1
    assert_equal(state, a_state(1))
    assert (tmp_path / "checkpoints.broken" / "2").exists()


def test_all_damaged_is_one_sentence(tmp_path):
    checkpoints = written(tmp_path, steps=(1,))
    truncate(checkpoints.folder / "1")
    with pytest.raises(UserError, match="None of the 1 checkpoints"):
        Checkpoints(tmp_path).restore(abstract(a_state()))


@pytest.mark.parametrize("steps", [(1,), (1, 2)])
def test_an_interrupt_is_no_damage_even_as_orbax_wraps_it(tmp_path, monkeypatch, steps):
    def interrupted(*_):
        try:
            raise KeyboardInterrupt
        except BaseException as error:
            raise Exception("while reading") from error

    written(tmp_path, steps).close()
    monkeypatch.setattr("cascade.training.checkpoint.check_sum", interrupted)
    with pytest.raises(Exception, match="while reading") as raised:
        Checkpoints(tmp_path).restore(abstract(a_state()))
    assert isinstance(raised.value.__cause__, KeyboardInterrupt)
    assert not (tmp_path / "checkpoints.broken").exists()


def test_any_flipped_bit_changes_the_checksum():
    state = {"w": jnp.arange(7.0), "b": jnp.ones(3, jnp.bfloat16)}
    base = checksum(state)
    for bit in range(32):
        word = np.arange(7, dtype=np.float32)
        word.view(np.uint32)[4] ^= np.uint32(1 << bit)
        assert checksum({**state, "w": jnp.asarray(word)}) != base


def test_another_runs_checkpoint_is_refused_and_left_alone(tmp_path):
    written(tmp_path)

    def check(meta, step):
        raise UserError(f"step {step} is another run's")

    other = {"w": jax.ShapeDtypeStruct((7,), jnp.float32)}
    with pytest.raises(UserError, match="step 2 is another run's"):
        Checkpoints(tmp_path).restore(other, check=check)
    assert not (tmp_path / "checkpoints.broken").exists()
    assert sorted(Checkpoints(tmp_path).manager.all_steps()) == [1, 2]


def test_reading_changes_nothing(tmp_path):
    checkpoints = written(tmp_path)
    truncate(checkpoints.folder / "2")
    before = sorted(str(p) for p in tmp_path.rglob("*"))
    step, _, _ = Checkpoints(tmp_path, read_only=True).restore(abstract(a_state()))
    assert step == 1
    assert sorted(str(p) for p in tmp_path.rglob("*")) == before


def test_the_checksum_doesnt_depend_on_the_mesh():
    array = jax.random.normal(jax.random.key(0), (16, 8))
    mesh = make_mesh(data=2, fsdp=4, tensor=1)
    for spec in (P("fsdp"), P("data", "fsdp"), P()):
        placed = jax.device_put(array, NamedSharding(mesh, spec))
        assert checksum({"w": placed}) == checksum({"w": array})

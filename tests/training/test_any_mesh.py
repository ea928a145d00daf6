"""A checkpoint that one mesh wrote is read onto any other: same bits, same next loss."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from tiny_cascade import tiny_experiment

from cascade.parallel import rules
from cascade.parallel.mesh import make_mesh, put_batch
from cascade.stage import Stage
from cascade.training.checkpoint import Checkpoints
from cascade.training.optim import make_optimizer
from cascade.training.state import init_state, with_shardings

# data × fsdp × tensor: these many of the eight devices.
MESHES = {"1×8×1": 8, "2×2×2": 8, "1×4×1": 4, "2×1×1": 2, "1×1×1": 1}
EIGHT = ("1×8×1", "2×2×2")
FEWER = ("1×4×1", "2×1×1", "1×1×1")


def mesh_of(name):
    data, fsdp, tensor = map(int, name.split("×"))
    return make_mesh(data=data, fsdp=fsdp, tensor=tensor, devices=jax.devices()[: MESHES[name]])


@pytest.fixture(scope="module", autouse=True)
def small_arrays_are_sharded():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rules, "SMALLEST_SHARDED", 64)
        yield


@functools.cache
def experiment():
    """(stage, shapes of its training's state, such a state of random numbers)."""
    config = tiny_experiment()
    stage, optimizer = Stage(config.stage), make_optimizer(config.train)
    shapes = jax.eval_shape(functools.partial(init_state, stage, optimizer), jax.random.key(0))
    rng = np.random.default_rng(0)

    def draw(leaf):
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            return np.full(leaf.shape, 7, leaf.dtype)
        return rng.uniform(0, 0.2, leaf.shape).astype(leaf.dtype)

    return stage, shapes, jax.tree.map(draw, shapes)


@functools.cache
def placed(name):
    return rules.shardings(experiment()[1], mesh_of(name))


@functools.cache
def state_on(name):
    return jax.device_put(experiment()[2], placed(name))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The folder that a mesh wrote its checkpoint to."""

    @functools.cache
    def write(name):
        folder = tmp_path_factory.mktemp("run")
        checkpoints = Checkpoints(folder)
        checkpoints.save(7, state_on(name), iter(NoData()), {})
        checkpoints.close()
        return folder

    return write


class NoData:
    """Where no data's position has to be kept, an iterator that has one."""

    def __iter__(self):
        import grain

        return iter(grain.MapDataset.range(1).to_iter_dataset())


@functools.cache
def next_loss(name):
    """state -> the next step's loss, on one batch that all meshes share."""
    stage, _, _ = experiment()
    rng = np.random.default_rng(1)
    z_t, _, cond = stage.shapes(8)
    batch = {
        "image": rng.uniform(-1, 1, z_t.shape).astype(np.float32),
        "text_emb": rng.normal(size=cond["text_emb"].shape).astype(np.float32),
        "text_mask": np.ones(cond["text_mask"].shape, bool),
    }
    batch = put_batch(batch, mesh_of(name))
    loss = jax.jit(stage.loss)
    return lambda state: float(loss(state.params, batch, jax.random.key(0))[0])


@functools.cache
def loss_on(name):
    return next_loss(name)(state_on(name))


def of_leaves(*trees):
    for (path, leaf), *others in zip(
        jax.tree_util.tree_leaves_with_path(trees[0]),
        *(jax.tree.leaves(tree) for tree in trees[1:]),
        strict=True,
    ):
        yield keystr(path), leaf, *others


def keystr(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


@pytest.mark.parametrize(
    ("writer", "reader"),
    [(a, b) for a in EIGHT for b in (*FEWER, *EIGHT)] + [(a, b) for a in FEWER for b in EIGHT],
)
def test_a_checkpoint_is_read_onto_any_mesh(written, writer, reader):
    target = with_shardings(experiment()[1], placed(reader))
    step, state, _ = Checkpoints(written(writer), read_only=True).restore(target)
    assert step == 7
    for name, leaf, expected, sharding in of_leaves(state, experiment()[2], placed(reader)):
        assert np.asarray(leaf).tobytes() == expected.tobytes(), name
        assert leaf.sharding == sharding, name
    assert next_loss(reader)(state) == loss_on(reader)
    assert loss_on(reader) == pytest.approx(loss_on(writer), rel=1e-5)


@pytest.mark.parametrize("writer", EIGHT)
def test_each_device_writes_its_own_part(tmp_path, writer):
    """No chunk on disk exceeds a shard, and no array was put together on the host to write it."""
    state = jax.tree.map(lambda leaf: leaf + 0, state_on(writer))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(7, state, iter(NoData()), {})
    checkpoints.close()
    with ocp.StandardCheckpointer() as reader:
        stored = reader.metadata(tmp_path / "checkpoints" / "7" / "state").item_metadata.tree
    stored = {keystr(path): meta for path, meta in jax.tree_util.tree_leaves_with_path(stored)}
    parts = {"params": 0, "ema_params": 0, "opt_state": 0}
    for name, leaf in of_leaves(state):
        shard, chunk = leaf.sharding.shard_shape(leaf.shape), stored[name].storage.write_shape
        # Less than a shard where several devices hold the same, and share the work.
        assert all(a <= b for a, b in zip(chunk, shard, strict=True)), name
        if shard != leaf.shape:
            parts[name.partition("/")[0]] += 1
            assert leaf._npy_value is None, name  # where JAX keeps what it gathered
    assert min(parts.values()) >= 5
    gathered = next(leaf for leaf in jax.tree.leaves(state) if leaf.ndim > 1)
    np.asarray(gathered)
    assert gathered._npy_value is not None

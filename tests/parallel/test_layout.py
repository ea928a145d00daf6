"""A training step is the same on every mesh, and lies there as it should."""

import functools
import re

import jax
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from test_rules import Settings, assert_close, random_batch
from tiny_cascade import stage_config

from cascade.networks.unet import UNet
from cascade.parallel import rules
from cascade.parallel.layout import Layout
from cascade.parallel.mesh import AXES, make_mesh, put_batch, replicated
from cascade.stage import Stage
from cascade.training.state import init_state, jit_train_step

MESHES = ((8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 1, 8))
WIDE = {"channels": 32, "head_channels": 4, "self_attention": (True,), "dropout": 0.1}
SCANNED = {"num_blocks": (2,), "scan_blocks": True, "remat": "blocks"}
KINDS = {
    "base": (8, 0, {"resampling": "block", "remat": "dots"}, {"learned_variance": True}),
    "super-resolution": (16, 8, {"skips": "level"} | SCANNED, {"crop_resolution": 8}),
}


@pytest.fixture(autouse=True)
def everything_is_large(monkeypatch):
    monkeypatch.setattr(rules, "SMALLEST_SHARDED", 256)


def stage_of(kind: str, layout=None) -> Stage:
    resolution, lowres, network, changes = KINDS[kind]
    config = stage_config(resolution, lowres, **changes)
    config.network.update(WIDE | network)
    return Stage(config, layout=layout)


def mesh_of(sizes):
    devices = jax.devices()[: np.prod(sizes)]
    return make_mesh(**dict(zip(AXES, sizes, strict=True)), devices=devices)


def compiled_step(kind: str, mesh):
    """The state on its mesh, the compiled step, and the step's batch and key."""
    stage, optimizer = stage_of(kind, Layout.of(mesh)), optax.sgd(0.1, momentum=0.9)
    create = functools.partial(init_state, stage, optimizer)
    abstract = jax.eval_shape(create, jax.random.key(0))
    placed = rules.shardings(abstract, mesh)
    # Drawn on one device: what a new layer's zeros multiply would hide it.
    leaves, treedef = jax.tree.flatten(abstract.params)
    rng = np.random.default_rng(0)
    leaves = [0.1 * rng.normal(size=leaf.shape).astype(np.float32) for leaf in leaves]
    params = jax.tree.unflatten(treedef, leaves)
    state = create(jax.random.key(0))
    state.params, state.ema_params = params, params
    state = jax.device_put(state, placed)
    batch = put_batch(random_batch(stage, 8), mesh)
    if stage.training_resolution < stage.config.resolution:
        assert batch["image"].shape[1] == stage.training_resolution
    key = jax.device_put(jax.random.key(1), replicated(mesh))
    step = jit_train_step(stage, optimizer, Settings, mesh, placed)
    return state, step.lower(state, batch, key).compile(), batch, key


QUICK = {"base": (2, 2, 2), "super-resolution": (1, 8, 1)}
CASES = [
    pytest.param(kind, mesh, marks=() if QUICK[kind] == mesh else pytest.mark.slow)
    for kind in KINDS
    for mesh in MESHES
]


@functools.cache
def alone(kind: str):
    """State and metrics after a step on one device."""
    state, step, batch, key = compiled_step(kind, mesh_of((1, 1, 1)))
    return step(state, batch, key)


@pytest.mark.parametrize(("kind", "sizes"), CASES)
def test_every_mesh_takes_the_same_step(kind, sizes):
    expected, metrics = alone(kind)
    mesh = mesh_of(sizes)
    state, step, batch, key = compiled_step(kind, mesh)
    check_aliases(step, len(jax.tree.leaves(state)))
    after, other = step(state, batch, key)
    for name in ("loss", "gradient_norm"):
        assert float(other[name]) == pytest.approx(float(metrics[name]), rel=1e-5)
    assert_close(expected.params, after.params, 1e-5)
    check_places(after, mesh)


def check_aliases(step, arrays: int):
    """All of the donated state's arrays give their memory to the new one's."""
    header = step.as_text().splitlines()[0]
    aliases = re.findall(r"\{[\d, ]*\}: \(\d+, \{\}, \w+-alias\)", header)
    assert len(aliases) == arrays


def check_places(state, mesh):
    """Nothing large that an axis of the mesh divides lies whole on every device."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        if leaf.size >= rules.SMALLEST_SHARDED and any(
            length % mesh.shape["fsdp"] == 0 for length in leaf.shape
        ):
            whole = leaf.sharding.is_fully_replicated
            assert whole == (mesh.shape["fsdp"] == 1 and not over_tensor(path, leaf, mesh)), path


def over_tensor(path, leaf, mesh) -> bool:
    """Whether the rules lay an array over `tensor`, and there is more than one place there."""
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    spec = rules.spec_of(name, leaf.shape, mesh)
    return mesh.shape["tensor"] > 1 and "tensor" in jax.tree.leaves(tuple(spec))


def test_tensor_parallelism_splits_attention_and_wide_convolutions():
    mesh = mesh_of((2, 2, 2))
    stage = stage_of("super-resolution")
    params = jax.eval_shape(stage.init, jax.random.key(0))
    split = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, sharding in jax.tree_util.tree_flatten_with_path(rules.shardings(params, mesh))[0]
        if "tensor" in jax.tree.leaves(tuple(sharding.spec))
    }
    for part in ("attention/qkv", "attention/text_kv", "attention/out"):
        assert any(re.fullmatch(rf"down_0/.*/{part}/kernel", name) for name in split)
    for part in ("conv_in", "conv_out"):
        assert any(re.fullmatch(rf"up_0/.*/{part}/kernel", name) for name in split)


@pytest.mark.parametrize(
    ("own", "spec"),
    [((), P("fsdp", None)), (((r"^params/block/kernel$", P(None, "fsdp")),), P(None, "fsdp"))],
)
def test_a_layout_gathers_the_weights_of_a_block_and_splits_their_gradient(own, spec):
    mesh = mesh_of((1, 8, 1))
    layout, weights = Layout.of(mesh, own), {"kernel": np.ones((64, 64), np.float32)}
    split = NamedSharding(mesh, spec)

    def loss(params, x):
        whole = layout.gathered(params, "block", np.float32)
        return ((x @ whole["kernel"]) ** 2).sum()

    x = jax.device_put(np.ones((8, 64), np.float32), NamedSharding(mesh, P("fsdp")))
    params = jax.device_put(weights, {"kernel": split})
    gradient = jax.jit(jax.grad(loss))
    assert gradient(params, x)["kernel"].sharding.is_equivalent_to(split, 2)
    assert "all-gather" in gradient.lower(params, x).compile().as_text()


def test_one_device_needs_no_layout():
    assert Layout.of(mesh_of((1, 1, 1))) is None
    assert isinstance(stage_of("base").network, UNet)

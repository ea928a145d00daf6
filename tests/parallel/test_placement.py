"""What `cascade describe --mesh` says is what a mesh of real devices holds."""

import functools

import jax
import pytest
from click.testing import CliRunner
from tiny_cascade import stage_config, tiny_experiment

from cascade.cli import main
from cascade.errors import UserError
from cascade.parallel import placement, rules
from cascade.parallel.mesh import AXES, make_mesh
from cascade.stage import Stage
from cascade.training.optim import make_optimizer
from cascade.training.state import init_state


@pytest.fixture
def config(monkeypatch):
    monkeypatch.setattr(rules, "SMALLEST_SHARDED", 256)
    monkeypatch.setattr(placement, "SMALLEST_SHARDED", 256)
    config = tiny_experiment()
    config.stage = stage_config(8, 0)
    return config


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 1, 8)])
def test_a_devices_bytes_are_those_of_its_shards(config, sizes):
    sizes = dict(zip(AXES, sizes, strict=True))
    create = functools.partial(init_state, Stage(config.stage), make_optimizer(config.train))
    state = jax.eval_shape(create, jax.random.key(0))
    placed = rules.shardings(state, make_mesh(**sizes))
    held = [
        sharding.shard_shape(leaf.shape)
        for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(placed), strict=True)
    ]
    said = placement.placement(config, sizes)
    assert [a.elements // a.share for a in said] == [
        functools.reduce(int.__mul__, shape, 1) for shape in held
    ]
    whole = {a.name for a in said if a.share == 1}
    assert whole == {
        jax.tree_util.keystr(path, simple=True, separator="/").partition("/")[2]
        for path, sharding in jax.tree_util.tree_flatten_with_path(placed)[0]
        if sharding.is_fully_replicated
    }


def test_the_table_names_what_stays_whole_and_why(config):
    config.stage.network.channels = 60
    config.stage.network.head_channels = 60
    said = placement.describe_placement(config, {"data": 1, "fsdp": 7, "tensor": 1})
    assert "since they have fewer than 256 elements" in said
    assert "larger arrays stay whole" in said and "residual/conv_out/kernel" in said


def test_an_open_size_is_refused(config):
    with pytest.raises(UserError, match="left open"):
        placement.placement(config, {"data": -1, "fsdp": 8, "tensor": 1})


@pytest.mark.parametrize("mesh", ["data=0", "data=-2", "data=-1,fsdp=-1"])
def test_the_command_refuses_sizes_that_no_mesh_has(mesh):
    arguments = ["describe", "--config", "configs/emoji/demo_base.py:smoke", "--mesh", mesh]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2 and "sizes are 1 or more" in result.output


def test_the_command_describes_every_stage():
    arguments = ["describe", "--config", "configs/imagen/cascade.py:smoke", "--mesh", "fsdp=4"]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert result.output.count("Each device holds") == 3

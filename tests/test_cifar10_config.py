"""The CIFAR-10 config: what its stage costs by hand, that it reads its data and takes a step."""

import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from by_hand import whole
from PIL import Image

from cascade import config
from cascade.data import cifar10
from cascade.data.sources import SOURCES
from cascade.networks.cost import describe as level_costs
from cascade.registry import build
from cascade.stage import Stage
from cascade.training.halvings import check_distillation
from cascade.training.optim import make_optimizer
from cascade.training.state import TrainState, make_train_step

# A program that runs twice needn't be quick, but quickly made.
COMPILED = {"xla_backend_optimization_level": 0}
NAME = "configs/cifar10/base.py"


def test_cost_is_what_a_hand_counts():
    stage = Stage(config.load(NAME).stage)
    rows = level_costs(stage.network, *stage.shapes(1, (32, 32)))
    parameters, flops = whole(stage.config, 32)
    assert sum(row.parameters for row in rows) == parameters
    assert sum(row.flops for row in rows) == pytest.approx(flops, rel=1e-12)


@pytest.mark.parametrize("arg", ["", ":smoke"])
def test_a_small_teacher_and_its_students_are_of_one_kind(arg):
    teacher, students = (
        config.load(f"configs/cifar10/{name}.py{arg}") for name in ("small", "small_distill")
    )
    check_distillation(students)
    shapes = [
        jax.tree.map(jnp.shape, jax.eval_shape(Stage(each.stage).init, jax.random.key(0)))
        for each in (teacher, students)
    ]
    assert shapes[0] == shapes[1]
    sections = ("text", "text_cache", "data")
    assert all(teacher[key] == students[key] for key in sections)
    assert teacher.data.mirror == config.load(f"{NAME}{arg}").data.mirror == 0.5


def test_it_reads_what_the_command_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(cifar10, "ROWS", 10)
    rows = np.arange(10 * 1024 * 3, dtype=np.uint8).reshape(10, 1024, 3)
    for split, names in cifar10.PICTURES.items():
        for name in names:
            Image.fromarray(rows).save(tmp_path / name)
        labels = list(range(10)) * len(names)
        (tmp_path / cifar10.LABELS[split]).write_text(json.dumps(labels))
    data = config.load(NAME).data
    monkeypatch.chdir(tmp_path)
    cifar10.build_cifar10(tmp_path, "data/cifar10")
    for section, count in ((data.source, 50), (data.eval_source, 10)):
        source = build("source", SOURCES, section)
        assert len(source) == count and source.captions(1) == ["an automobile"]
        assert Image.open(io.BytesIO(source[0]["image"])).size == (32, 32)


@pytest.mark.slow  # other smoke versions do, of networks of the same parts
def test_the_smoke_version_takes_a_step():
    loaded = config.load(f"{NAME}:smoke")
    stage, optimizer = Stage(loaded.stage), make_optimizer(loaded.train)
    z_t, _, cond = stage.shapes(2)
    batch = {
        "image": jnp.zeros(z_t.shape),
        "text_emb": jnp.ones(cond["text_emb"].shape),
        "text_mask": jnp.ones(cond["text_mask"].shape, bool),
    }
    params = jax.tree.map(
        lambda leaf: np.full(leaf.shape, 0.1, leaf.dtype),
        jax.eval_shape(stage.init, jax.random.key(0)),
    )
    state = TrainState(jnp.int32(0), params, params, jax.jit(optimizer.init)(params))
    step = jax.jit(make_train_step(stage, optimizer, loaded.train), compiler_options=COMPILED)
    for _ in range(2):  # the first step's rate is 0
        after, metrics = step(state, batch, jax.random.key(1))
        state, before = after, state
    assert np.isfinite(metrics["loss"]) and metrics["gradient_norm"] > 0
    moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), before.params, after.params)
    assert any(jax.tree.leaves(moved))

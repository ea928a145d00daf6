"""What one student learns of its teacher: it begins as it, finitely, and alike on any mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_cascade import trained
from tiny_distillation import tiny_distillation

from cascade.parallel import rules
from cascade.parallel.layout import Layout
from cascade.parallel.mesh import make_mesh, put_batch
from cascade.stage import Stage
from cascade.training.distill import Lesson
from cascade.training.halvings import halvings
from cascade.training.optim import make_optimizer
from cascade.training.state import init_state, jit_train_step


def devices(count):
    return make_mesh(data=1, fsdp=count, tensor=1, devices=jax.devices()[:count])


def lesson_of(config, name, mesh=None):
    """(lesson, its teacher's parameters) of one of a distillation's students."""
    (halving,) = [each for each in halvings(config) if each.name == name]
    section = config.stage
    if halving.teacher:
        (above,) = [each for each in halvings(config) if each.name == halving.teacher]
        section = above.config.stage
    layout = mesh and Layout.of(mesh)
    stages = Stage(section, layout=layout), Stage(halving.config.stage, layout=layout)
    return Lesson(*stages, halving), trained(section).params


def batch_of(stage, count=8):
    rng = np.random.default_rng(1)
    z_t, _, cond = stage.shapes(count)
    batch = {
        "image": rng.uniform(-1, 1, z_t.shape).astype(np.float32),
        "text_emb": rng.normal(size=cond["text_emb"].shape).astype(np.float32),
        "text_mask": np.ones(cond["text_mask"].shape, bool),
    }
    if "lowres" in cond:
        batch["lowres"] = rng.uniform(-1, 1, cond["lowres"].shape).astype(np.float32)
    return batch


def test_a_student_begins_as_its_teacher_whatever_the_weight(tmp_path):
    config = tiny_distillation(tmp_path, guidance=(1.0, 6.0))
    lesson, params = lesson_of(config, "guided")
    student = jax.jit(lesson.init)(jax.random.key(0), params, 0.0)
    batch = batch_of(lesson.teacher, 4)
    cond = {k: batch[k] for k in ("text_emb", "text_mask")}
    arguments = batch["image"], jnp.linspace(-9.0, 9.0, 4)
    ours = lesson.student.network.apply(
        {"params": student}, *arguments, {**cond, "guidance_weight": jnp.array([1.0, 2, 3, 6])}
    )
    theirs = lesson.teacher.network.apply({"params": params}, *arguments, cond)
    assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()
    added = student.keys() - params.keys()
    assert added == {"guidance_embedding"}


@pytest.mark.parametrize("output", ["x", "eps"])
def test_every_prediction_learns_finitely_at_the_noisiest_level(tmp_path, output):
    """In one step, of super-resolution; whole distillations are of v."""
    config = tiny_distillation(tmp_path, lowres=8, output=output, steps=(2, 1))
    lesson, params = lesson_of(config, "1")
    student = lesson.init(jax.random.key(0), params, 0.0)
    grad = jax.jit(jax.grad(lesson.loss, has_aux=True))
    told = jax.random.key(2), params, np.float32(0)
    grads, found = grad(student, batch_of(lesson.student), *told)
    assert np.isfinite(found["loss"]) and found["loss"] > 0
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    assert found["bucket_count"].sum() == 8


def test_a_perfect_student_has_nothing_to_learn(tmp_path):
    """The guided student of a teacher whose text says nothing is that teacher, at every weight."""
    config = tiny_distillation(tmp_path, guidance=(1.0, 6.0))
    config.distill.threshold = {"name": "none"}
    lesson, params = lesson_of(config, "guided")
    batch = batch_of(lesson.student)
    batch["text_emb"][:], batch["text_mask"][:] = 0.0, False  # the null condition
    student = lesson.init(jax.random.key(0), params, 0.0)
    told = jax.random.key(2), params, np.float32(0)
    loss = jax.jit(lesson.loss)
    value, _ = loss(student, batch, *told)
    other, _ = loss(student, batch_of(lesson.student), *told)
    assert float(value) < 1e-9 < 1e-4 < float(other)


def test_sharded_is_unsharded_and_the_teacher_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(rules, "SMALLEST_SHARDED", 64)
    config = tiny_distillation(tmp_path, guidance=(1.0, 6.0))
    optimizer = make_optimizer(config.train)

    def step_on(mesh):
        lesson, params = lesson_of(config, "2", mesh)
        taught = jax.device_put(params, rules.shardings(params, mesh))
        given = taught, np.float32(0)
        create = functools.partial(init_state, lesson, optimizer)
        abstract = jax.eval_shape(create, jax.random.key(0), *given)
        placed = rules.shardings(abstract, mesh)
        state = jax.jit(create, out_shardings=placed)(jax.random.key(0), *given)
        step = jit_train_step(lesson, optimizer, config.train, mesh, placed)
        batch = put_batch(batch_of(lesson.teacher), mesh)
        state, found = step(state, batch, jax.random.key(1), *given)
        for ours, theirs in zip(jax.tree.leaves(params), jax.tree.leaves(taught), strict=True):
            np.testing.assert_array_equal(ours, theirs)  # and it wasn't donated
        return state, found

    (one, found), (two, other) = step_on(devices(1)), step_on(devices(2))
    assert float(found["loss"]) == pytest.approx(float(other["loss"]), rel=1e-5)
    for ours, theirs in zip(jax.tree.leaves(one.params), jax.tree.leaves(two.params), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)

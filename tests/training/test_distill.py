"""Laws of distillation: students begin as their teachers, learn, resume to the bit, on any mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_cascade import stage_config, trained
from tiny_distillation import TEXT, tiny_distillation, write_teacher

import cascade
from cascade import bundle
from cascade.errors import UserError
from cascade.networks.cost import count
from cascade.parallel import rules
from cascade.parallel.layout import Layout
from cascade.parallel.mesh import make_mesh, put_batch
from cascade.stage import Stage
from cascade.training import metrics
from cascade.training.distill import Lesson, distill, distill_cascade
from cascade.training.halvings import halvings
from cascade.training.observe import Observer
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


@pytest.mark.parametrize("output", ["x", "eps", "v"])
def test_every_prediction_and_super_resolution_learn_finitely(tmp_path, output):
    config = tiny_distillation(tmp_path, lowres=8, output=output, steps=(2, 1))
    lesson, params = lesson_of(config, "1")
    student = lesson.init(jax.random.key(0), params, 0.0)
    loss = jax.jit(jax.value_and_grad(lesson.loss, has_aux=True))
    (value, found), grads = loss(
        student, batch_of(lesson.student), jax.random.key(2), params, np.float32(0)
    )
    assert np.isfinite(value) and value > 0
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
    value, _ = jax.jit(lesson.loss)(student, batch, *told)
    other, _ = jax.jit(lesson.loss)(student, batch_of(lesson.student), *told)
    assert float(value) < 1e-9 < 1e-4 < float(other)


@pytest.fixture(scope="module")
def small_arrays_are_sharded():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rules, "SMALLEST_SHARDED", 64)
        yield


def test_sharded_is_unsharded_and_the_teacher_stays(tmp_path, small_arrays_are_sharded):
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

    (one, found), (eight, other) = step_on(devices(1)), step_on(devices(8))
    assert float(found["loss"]) == pytest.approx(float(other["loss"]), rel=1e-5)
    for ours, theirs in zip(
        jax.tree.leaves(one.params), jax.tree.leaves(eight.params), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


# ------------------------------------------------------------------------------ a whole one


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """(config, its folder): distilled without a break, guidance first, then 4 → 2 → 1."""
    folder = tmp_path_factory.mktemp("distill")
    config = tiny_distillation(folder, guidance=(1.0, 6.0), updates=10)
    write_teacher(config)
    distill(config, folder / "straight", progress=False)
    return config, folder


def weights(folder, name):
    """The bytes of a student's weights."""
    return [p.read_bytes() for p in sorted((folder / "students" / name).glob("*.safetensors"))]


def test_students_learn_and_are_kept(straight):
    _, folder = straight
    for name, steps in (("guided", 0), ("2", 2), ("1", 1)):
        rows = metrics.read(folder / "straight" / "halvings" / name / "metrics.jsonl")
        losses = [row["loss"] for row in rows]
        assert len(losses) == 10 and np.mean(losses[-3:]) < np.mean(losses[:3])
        assert rows[-1]["flops_per_second"] > 0
        ((stage, _, updates),), _ = bundle.load_stages(folder / "straight" / "students" / name)
        assert updates == 10
        assert stage.config.distilled.to_dict() == {"steps": steps, "guidance": (1.0, 6.0)}
    assert (folder / "straight" / "finished.json").is_file()


@pytest.mark.parametrize("fatal", [("2", 5)])
def test_a_broken_one_goes_on_to_the_same_bits(straight, fatal, monkeypatch):
    config, folder = straight
    after_step = Observer.after_step

    def deadly(self, step, *rest):
        after_step(self, step, *rest)
        if (self.workdir.name, step) == fatal:
            raise RuntimeError("killed")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(Observer, "after_step", deadly)
        distill(config, folder / "broken", progress=False)
    assert not (folder / "broken" / "students" / "2").exists()
    distill(config, folder / "broken", progress=False)
    for name in ("guided", "2", "1"):
        assert weights(folder / "broken", name) == weights(folder / "straight", name) != []


def test_another_distillation_in_the_same_folder_is_refused(straight):
    config, folder = straight
    other = config.copy_and_resolve_references()
    other.distill.threshold = {"name": "none"}
    with pytest.raises(UserError, match=r"holds another run: config\.distill\.threshold"):
        distill(other, folder / "straight", progress=False)
    fewer = config.copy_and_resolve_references()
    fewer.distill.end_steps = 2
    student = distill(fewer, folder / "straight", progress=False)
    assert student.name == "2"


# ---------------------------------------------------------------------------- what students draw


@pytest.fixture(scope="module")
def pipe(straight):
    return cascade.load(straight[1] / "straight" / "students" / "2")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"steps": 50}, "distilled to draw in 2 steps and is asked for 50"),
        ({"sampler": "heun"}, "can't be drawn with by the sampler 'heun'"),
        ({"guidance": 9.0}, "learnt guidance weights from 1 to 6 and is asked for 9"),
        ({"negative_prompt": "a dog"}, "negative prompt.*leave it out"),
    ],
)
def test_what_a_student_was_not_taught_is_a_sentence(pipe, asked, message):
    with pytest.raises(UserError, match=message):
        pipe("a moon", progress=False, **asked)


def test_guidance_is_an_argument_of_one_program(pipe):
    low, high = (pipe("a moon", guidance=w, progress=False) for w in (1.0, 6.0))
    assert not np.array_equal(low, high)
    (stage,) = pipe.stages
    assert stage.draw._cache_size() == 1
    cond, null = stage.shapes(1)[2], {}
    cond.pop("guidance_weight")
    null = dict(cond)
    keys = jax.eval_shape(functools.partial(jax.random.split, num=1), jax.random.key(0))
    draw = functools.partial(stage.sample, settings=stage.settings(), size=(8, 8))
    params = jax.eval_shape(stage.init, jax.random.key(0))
    weight = jax.ShapeDtypeStruct((), jnp.float32)
    flops = count(
        lambda p, c, n, k, w: draw(p, c, n, k, guidance_weight=w), params, cond, null, keys, weight
    )
    assert flops.total() == pytest.approx(2 * stage.forward_flops)


def test_a_cascade_is_distilled_into_one_bundle(tmp_path):
    base = tiny_distillation(tmp_path, steps=(2, 1), updates=2)
    doubling = tiny_distillation(tmp_path, lowres=8, steps=(2, 1), updates=2)
    write_teacher(doubling, trained(stage_config(8, 0, **TEXT)))
    made = distill_cascade({"base": base, "sr": doubling}, tmp_path / "few", progress=False)
    drawn = cascade.load(made)("a moon", progress=False, return_stages=True)
    assert [stage.shape for stage in drawn] == [(1, 8, 8, 3), (1, 16, 16, 3)]
    alone = cascade.load(tmp_path / "few" / "sr" / "students" / "1")
    assert alone.upscale(drawn[0], stage=0, progress=False).shape == (1, 16, 16, 3)

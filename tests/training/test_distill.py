"""Whole distillations: students learn, are kept, resume to the bit, draw as they were taught."""

import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner
from ml_collections import ConfigDict
from tiny_cascade import stage_config, trained
from tiny_distillation import TEXT, teachers_section, tiny_distillation, write_teacher
from tiny_t5 import write_folder

import cascade
from cascade import bundle, registry
from cascade.cli import main
from cascade.errors import UserError
from cascade.networks.cost import count
from cascade.text.encoders import ENCODERS
from cascade.training import distill as lessons
from cascade.training import metrics
from cascade.training.distill import distill, distill_cascade
from cascade.training.observe import Observer

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def straight(one_device, tmp_path_factory):
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


def test_a_broken_one_goes_on_to_the_same_bits(straight, monkeypatch):
    """After its first student; bench/kill_distillation.py kills at any point, from outside."""
    config, folder = straight
    later = shutil.ignore_patterns("1", "2", "finished.json")
    shutil.copytree(folder / "straight", folder / "broken", ignore=later)
    after_step = Observer.after_step

    def deadly(self, step, *rest):
        after_step(self, step, *rest)
        if (self.workdir.name, step) == ("2", 5):
            raise RuntimeError("killed")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(Observer, "after_step", deadly)
        distill(config, folder / "broken", progress=False)
    assert not (folder / "broken" / "students" / "2").exists()
    distill(config, folder / "broken", progress=False)
    for name in ("2", "1"):
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
    cond = {k: v for k, v in stage.shapes(1)[2].items() if k != "guidance_weight"}
    keys = jax.eval_shape(functools.partial(jax.random.split, num=1), jax.random.key(0))
    draw = functools.partial(stage.sample, settings=stage.settings(), size=(8, 8))
    params = jax.eval_shape(stage.init, jax.random.key(0))
    weight = jax.ShapeDtypeStruct((), jnp.float32)
    flops = count(
        lambda *given: draw(*given[:-1], guidance_weight=given[-1]),
        params, cond, cond, keys, weight,
    )  # fmt: skip
    assert flops.total() == pytest.approx(2 * stage.forward_flops)


def test_a_cascade_is_distilled_into_one_bundle(tmp_path, monkeypatch):
    base = tiny_distillation(tmp_path, steps=(2, 1), updates=2)
    doubling = tiny_distillation(tmp_path, lowres=8, steps=(2, 1), updates=2)
    write_teacher(doubling, trained(stage_config(8, 0, **TEXT)))
    encoders, learn = [], lessons.learn

    def noted(config, folder, place, progress):
        encoders.append(place.encoder)
        return learn(config, folder, place, progress)

    monkeypatch.setattr(lessons, "learn", noted)
    made = distill_cascade({"base": base, "sr": doubling}, tmp_path / "few", progress=False)
    assert encoders[0] is encoders[1]  # whose weights may be many
    drawn = cascade.load(made)("a moon", progress=False, return_stages=True)
    assert [stage.shape for stage in drawn] == [(1, 8, 8, 3), (1, 16, 16, 3)]
    alone = cascade.load(tmp_path / "few" / "sr" / "students" / "1")
    assert alone.upscale(drawn[0], stage=0, progress=False).shape == (1, 16, 16, 3)


def test_students_of_a_t5_are_put_together(tmp_path, monkeypatch):
    """They don't carry its weights; a command that begins again isn't finished until it is."""
    text = {"name": "t5", "max_length": 4, "null": "zeros", "keep_padding": False}
    text |= {"lower_case": False, "dtype": "float32", "weights": str(write_folder(tmp_path / "t5"))}
    config = tiny_distillation(tmp_path, steps=(2, 1), updates=2, text_width=16)
    config.text = ConfigDict(text)
    encoder = registry.build("text encoder", ENCODERS, text)
    teacher = [trained(teachers_section(config))]
    bundle.save_bundle(config.distill.teacher, teacher, text, encoder, text_weights=False)
    few, other = tmp_path / "few", tmp_path / "other"
    made = distill_cascade({"base": config}, few, progress=False)
    assert bundle.load_bundle(made).text_encoder.fingerprint == encoder.fingerprint

    arguments = ["bundle", "--stages", str(few / "base" / "students" / "1"), "--out", str(other)]
    assert "text_weights" in CliRunner().invoke(main, arguments).output
    named = CliRunner().invoke(main, [*arguments, "--text-weights", text["weights"]])
    assert named.exit_code == 0, named.output
    assert bundle.load_bundle(other).text_encoder.fingerprint == encoder.fingerprint

    assert (few / "finished.json").is_file()
    monkeypatch.setattr(lessons, "learn", lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        distill_cascade({"base": config}, few, progress=False)
    assert not (few / "finished.json").exists()

"""The emoji cascade's recipes: whole, refused where they don't fit, and run to their end."""

import jax
import pytest
from click.testing import CliRunner

from cascade import config, reproduce
from cascade.cli import main
from cascade.data.emoji.builder import DEFAULTS
from cascade.errors import UserError
from cascade.parallel.topology import KINDS
from cascade.stage import Stage
from cascade.training.distill import Lesson
from cascade.training.halvings import halvings


@pytest.mark.parametrize("name", reproduce.RECIPES)
def test_a_recipe_has_what_it_names(name):
    recipe = reproduce.RECIPES[name]
    assert recipe.variant in DEFAULTS
    lessons = config.load_cascade([recipe.distill])
    assert list(lessons) == list(recipe.stages) == list(recipe.students)
    for stage, lesson in lessons.items():
        trained = config.load(recipe.stages[stage])
        assert trained.stage.resolution == lesson.stage.resolution
        assert str(recipe.students[stage]) in [halving.name for halving in halvings(lesson)]


def test_the_full_recipe_s_arithmetic_fits_half_an_hour_and_its_weights_60_mb():
    recipe = reproduce.RECIPES["full"]
    lessons = config.load_cascade([recipe.distill])
    parameters, flops = 0, 0.0
    for name, spec in recipe.stages.items():
        whole = config.load(spec)
        stage = Stage(whole.stage)
        sections = {"": whole.stage} | {h.name: h.config.stage for h in halvings(lessons[name])}
        flops += 3 * stage.forward_flops * whole.train.steps * whole.train.batch_size
        for each in halvings(lessons[name]):
            lesson = Lesson(Stage(sections[each.teacher]), Stage(each.config.stage), each)
            flops += lesson.flops * each.config.train.steps * each.config.train.batch_size
        made = jax.eval_shape(Stage(each.config.stage).init, jax.random.key(0))
        parameters += sum(array.size for array in jax.tree.leaves(made))
    assert parameters * 2 < 60e6  # bytes, in bfloat16
    # At an eighth of the peak; the other half is for data, compiling and the evaluation.
    assert flops / (KINDS["NVIDIA H200"].flops / 8) < 15 * 60


def test_what_is_refused(tmp_path):
    with pytest.raises(UserError, match="no recipe 'tiny'; choose from small, full, smoke"):
        reproduce.run(tmp_path, "tiny")
    assert not list(tmp_path.iterdir())
    reproduce.begin(tmp_path, "full")
    with pytest.raises(UserError, match="begun by the recipe 'full', not 'small'"):
        reproduce.run(tmp_path, "small")


@pytest.mark.parametrize("written", [b"enormous", b"\xff", None])
def test_a_folder_of_no_recipe_is_refused(tmp_path, written):
    told = tmp_path / "recipe.txt"
    told.mkdir() if written is None else told.write_bytes(written)
    with pytest.raises(UserError, match=r"recipe\.txt .* another --workdir"):
        reproduce.run(tmp_path, "small")


@pytest.mark.slow
def test_it_makes_a_bundle_that_draws_and_reuses_it(tmp_path, monkeypatch):
    reproduce.run(tmp_path, "smoke")
    for split in ("train", "heldout"):
        assert (tmp_path / "evaluation" / split / "report.html").is_file()
    words = ["sample", "--bundle", str(tmp_path / "bundle"), "--prompt", "a cat", "--num", "1"]
    drawn = CliRunner().invoke(main, [*words, "--out", str(tmp_path / "out")])
    assert drawn.exit_code == 0, drawn.output
    for job in ("train", "distill_cascade", "bundle_runs"):
        monkeypatch.setattr(reproduce, job, lambda *_, **__: pytest.fail("made again"))
    reproduce.run(tmp_path, "smoke")

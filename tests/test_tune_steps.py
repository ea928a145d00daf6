"""`cascade tune-steps`: better levels get into the bundle, and pictures are drawn with them."""

import shutil

import jax
import numpy as np
import pytest
from click.testing import CliRunner
from tiny_cascade import TEXT, WordEncoder, stage_config, trained

from cascade import bundle, manifest, tune_steps
from cascade.cli import main
from cascade.errors import UserError
from cascade.images import to_uint8
from cascade.pipeline import load
from cascade.text.encoders import ENCODERS

PROMPTS = ["a red apple", "two blue birds"]
POOR = {"name": "given", "levels": (-20.0, -19.0, -18.5, -18.0, 20.0)}  # nearly all noise
QUICK = {"pictures": 2, "reference_steps": 12, "rounds": 2, "progress": False}


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """These networks are tiny: compiling them well takes longer than running them."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(autouse=True, scope="module")
def words():
    """The encoder without weights, under the name that the bundles give."""

    def build(*, max_length: int, weights: str):
        return WordEncoder()

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ENCODERS, "words", build)
        yield


@pytest.fixture(scope="module")
def untouched(tmp_path_factory):
    configs = [stage_config(*sizes) for sizes in ((8, 0), (16, 8))]
    for config in configs:
        config.sampling.sampler = {"name": "ddim"}
        config.sampling.update(guidance=1.0, steps=4)
    configs[1].sampling.spacing = POOR
    folder = tmp_path_factory.mktemp("bundles") / "tiny"
    return bundle.save_bundle(folder, list(map(trained, configs)), TEXT, WordEncoder())


@pytest.fixture
def folder(untouched, tmp_path):
    return shutil.copytree(untouched, tmp_path / "tiny")


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_levels_that_are_found_are_stored_and_drawn_with(folder):
    before, old = files(folder), load(folder)
    arguments = ["--pictures", "4", "--reference-steps", "12", "--rounds", "2"]
    result = CliRunner().invoke(
        main, ["tune-steps", "--bundle", str(folder), "--prompt", "a moon", *arguments]
    )
    assert result.exit_code == 0, result.output
    assert "4 steps of ddim" in result.output and "--sampler ddim --steps 4" in result.output
    after, new = files(folder), load(folder)
    assert {name for name in before if before[name] != after[name]} == {"cascade.json"}
    assert before.keys() == after.keys()

    ((name, levels),) = new.stages[0].config.sampling.searched
    assert name == "ddim" and len(levels) == 5
    given = {"name": "given", "levels": levels}
    assert [each.spacing.to_dict() for each in new.settings()] == [given, POOR]
    for other in ({"steps": 5}, {"sampler": {"name": "heun"}}):
        assert new.stages[0].settings(**other).spacing.name == "uniform"
    uniform = {"name": "uniform"}
    assert new.stages[0].settings(spacing=uniform).spacing.to_dict() == uniform
    by_hand = old.stages[0].settings(spacing=given)
    np.testing.assert_array_equal(old.stages[0].levels(by_hand), np.float32(levels))


def test_a_new_bundle_of_a_stage_that_enlarges(untouched, tmp_path, monkeypatch):
    """What the search is worth isn't the question here, but what it is given and where it goes."""
    before, losses = files(untouched), []

    def search(loss, starts, rounds, tried):
        losses.extend(loss(levels) for levels in starts)
        return np.array([-20.0, -2.0, -1.0, 1.0, 20.0]), 0.0

    monkeypatch.setattr(tune_steps, "search_levels", search)
    out = tmp_path / "new"
    found = tune_steps.tune_steps(untouched, PROMPTS, stage=1, out=out, **QUICK)
    assert files(untouched) == before
    assert load(out).settings()[1].spacing.levels == found.levels == (-20.0, -2.0, -1.0, 1.0, 20.0)
    assert load(out).settings()[0].spacing.name == "uniform"
    assert 0 < min(losses) < max(losses) < 1
    with pytest.raises(UserError, match="already holds a bundle"):
        tune_steps.tune_steps(untouched, PROMPTS, out=out, **QUICK)


def test_references_are_the_pictures_that_sampling_draws(untouched, monkeypatch):
    """By the same keys: those to search on are the first ones, those held out come after them."""
    kept, make = [], tune_steps._noises

    def noises(*arguments):
        kept.append(make(*arguments))
        return kept[-1]

    monkeypatch.setattr(tune_steps, "_noises", noises)
    monkeypatch.setattr(tune_steps, "search_levels", lambda loss, starts, *_: (starts[0], 0.0))
    tune_steps.tune_steps(untouched, PROMPTS, stage=1, seed=3, **QUICK)
    cascade, reference = load(untouched), {"sampler": "heun", "spacing": "uniform", "steps": 12}
    for first, (batch,) in zip((0, 2), kept, strict=True):
        how = {"seed": 3, "first_index": first, "batch_size": 2, "progress": False}
        small, _ = cascade(PROMPTS, return_stages=True, **how)
        drawn = cascade.upscale(small, PROMPTS, 1, **how, **reference)
        np.testing.assert_allclose(to_uint8(batch.reference), drawn, atol=1)
        np.testing.assert_array_equal(to_uint8(batch.cond["lowres"]), small)


def test_levels_that_are_no_better_are_not_stored(folder, monkeypatch):
    before = files(folder)
    monkeypatch.setattr(
        tune_steps, "search_levels", lambda loss, starts, *_: (np.linspace(-2.0, 2.0, 5), 0.0)
    )
    result = tune_steps.tune_steps(folder, PROMPTS, **QUICK)
    assert not result.stored and result.after > result.before and files(folder) == before


def test_levels_of_other_samplers_and_steps_stay(folder):
    for sampler, levels in [
        ("ddim", (-9.0, 0.0, 20.0)),
        ("heun", (-9.0, 1.0, 20.0)),
        ("ddim", (-9.0, -1.0, 1.0, 20.0)),
        ("ddim", (-9.0, 2.0, 20.0)),
    ]:
        tune_steps._store(folder, None, False, 0, sampler, levels)
    stages, _ = bundle.load_stages(folder)
    assert stages[0].stage.config.sampling.searched == (
        ("heun", (-9.0, 1.0, 20.0)),
        ("ddim", (-9.0, -1.0, 1.0, 20.0)),
        ("ddim", (-9.0, 2.0, 20.0)),
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sampler": "ancestral"}, "draws by chance"),
        ({"sampler": "hein"}, "Unknown sampler name 'hein'"),
        ({"steps": 1}, "steps is 1; give a whole number, 2 to"),
        ({"steps": 12}, "reference_steps is 12; give a whole number, 13 to"),
        ({"stage": 2}, "stage is 2; give a whole number, 0 to 1"),
        ({"pictures": 0}, "pictures is 0"),
        ({"rounds": 0}, "rounds is 0"),
        ({"out": ""}, "empty name"),
    ],
)
def test_what_can_not_be_searched_is_a_sentence(untouched, options, said):
    with pytest.raises(UserError, match=said):
        tune_steps.tune_steps(untouched, PROMPTS, **{**QUICK, **options})


def test_oscillating_guidance_has_no_reference(folder):
    contents = manifest.read(folder)
    sampling = contents["stages"][0]["config"]["sampling"]
    sampling |= {"guidance_schedule": {"name": "oscillating", "steps": 1, "low": 1.0}}
    manifest.write(folder, {key: contents[key] for key in ("text", "stages")})
    with pytest.raises(UserError, match="Oscillating guidance"):
        tune_steps.tune_steps(folder, PROMPTS, **QUICK)

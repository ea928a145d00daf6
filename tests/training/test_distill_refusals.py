"""What can't be distilled is said in a sentence, before anything is written."""

import re

import pytest
from click.testing import CliRunner
from tiny_distillation import tiny_distillation, write_teacher

from cascade import config as configs
from cascade.cli import main
from cascade.errors import UserError
from cascade.text.bert import minilm
from cascade.training.distill import distill, distill_cascade
from cascade.training.halvings import check_distillation, halvings
from cascade.training.teacher import find_teacher
from cascade.training.train import train


def changed(config, **changes):
    """The config with other values, whose `__` stand for dots."""
    for key, value in changes.items():
        *sections, last = key.split("__")
        section = config
        for name in sections:
            section = section[name]
        section[last] = value
    return config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distill__start_steps": 48, "distill__end_steps": 5}, "from 48 steps to 5.*power of two"),
        ({"distill__start_steps": 3}, "from 3 steps to 1.*power of two"),
        ({"distill__start_steps": 1}, "nothing to distill"),
        ({"distill__guidance": (6.0, 1.0)}, "the lowest and the highest guidance weight"),
        ({"distill__guidance": (0.0, 0.5)}, "learnt guidance weights from 0 to 0.5.*asked for 1"),
        ({"stage__sampling__sampler": {"name": "heun"}}, "can't be drawn with by .*'heun'"),
        ({"stage__sampling__spacing": {"name": "karras"}}, "spacing"),
        (
            {"stage__distilled__steps": 8, "stage__sampling__steps": 8},
            "itself a student of 8 steps",
        ),
        (
            {
                "stage__distilled__steps": 4,
                "stage__sampling__steps": 4,
                "distill__objective": {
                    "name": "consistency",
                    "backward": False,
                    "teacher_steps_start": 8,
                    "teacher_steps_end": 16,
                },
            },
            "'consistency' asks the teacher at any time.* student of 4 steps",
        ),
        ({"train__learning_rate__decay_steps": 9}, "decay_steps is 9 but a student learns for"),
        ({"distill__objective__name": "progresive"}, "did you mean 'progressive'"),
        ({"distill__objective": {"name": "progressive"}}, "Missing key 'backward'"),
        ({"distill__end_steps": 0}, "config.distill.end_steps is 0; it must be at least 1"),
    ],
)
def test_numbers_that_do_not_fit(tmp_path, changes, message):
    config = changed(tiny_distillation(tmp_path), **changes)
    with pytest.raises(UserError, match=message) as error:
        configs.check(config)
        check_distillation(config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stage__resolution": 16}, "draws 16×16 from text, but config.stage draws 8×8 from text"),
        ({"stage__output": "eps"}, "config.stage.output is 'v' but the teacher's is 'eps'"),
        ({"stage__network__channels": 16}, "config.stage.network.channels is 8 but"),
        ({"stage__schedule__logsnr_max": 15.0}, "config.stage.schedule.logsnr_max is 20.0 but"),
        ({"stage__text_length": 5, "text__max_length": 5}, "trained with the text encoder"),
    ],
)
def test_a_teacher_that_is_not_the_stage(tmp_path, changes, message):
    config = tiny_distillation(tmp_path)
    write_teacher(changed(tiny_distillation(tmp_path), **changes))
    with pytest.raises(UserError, match=message):
        distill(config, tmp_path / "few", progress=False)
    assert not (tmp_path / "few").exists()


def test_a_teacher_that_is_not_there(tmp_path):
    config = tiny_distillation(tmp_path)
    with pytest.raises(UserError, match="neither a bundle nor a run's folder"):
        find_teacher(config, minilm(max_length=4, weights=""))


def test_what_a_network_may_differ_in(tmp_path):
    config = changed(tiny_distillation(tmp_path), stage__network__remat="blocks")
    write_teacher(changed(tiny_distillation(tmp_path), stage__network__dropout=0.1))
    assert find_teacher(config, minilm(max_length=4, weights="")).trained_steps == 7


def test_training_and_distilling_take_their_own_configs(tmp_path):
    config = tiny_distillation(tmp_path)
    with pytest.raises(UserError, match="for `cascade distill`"):
        train(config, tmp_path / "run")
    plain = config.copy_and_resolve_references()
    del plain["distill"]
    with pytest.raises(UserError, match="no `distill` section"):
        distill(plain, tmp_path / "run")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["configs/emoji/base64.py:smoke"], "no `distill` section"),
        (["configs/emoji/distill.py:smoke"], "is a cascade of base, sr256; name the one"),
        (["configs/emoji/distill.py:base:smoke"] * 2, "2 configs were given.*add --cascade"),
        (["configs/emoji/distill.py:base:smoke", "--cascade"], "is of one stage"),
    ],
)
def test_the_command_says_it_too(tmp_path, arguments, message):
    specs = [part for spec in arguments if spec[0] != "-" for part in ("--config", spec)]
    flags = [flag for flag in arguments if flag[0] == "-"]
    result = CliRunner().invoke(main, ["distill", *specs, *flags, "--workdir", str(tmp_path / "d")])
    assert result.exit_code == 2 and len(result.output.strip().splitlines()) == 1
    assert re.search(message, result.output)


def test_who_learns_from_whom(tmp_path):
    config = tiny_distillation(tmp_path, steps=(8, 1), guidance=(1.0, 6.0))
    assert [(h.name, h.teacher) for h in halvings(config)] == [
        ("guided", ""), ("4", "guided"), ("2", "4"), ("1", "2"),
    ]  # fmt: skip
    steps = {"teacher_steps_start": 8, "teacher_steps_end": 16}
    config.distill.objective = {"name": "consistency", "backward": False, **steps}
    assert [h.teacher for h in halvings(config)] == ["", "guided", "guided", "guided"]
    config.distill.updates_last = 50
    assert [h.config.train.steps for h in halvings(config)] == [6, 6, 50, 50]
    assert [h.config.train.learning_rate.decay_steps for h in halvings(config)] == [6, 6, 50, 50]
    assert len({h.config.seed for h in halvings(config)}) == 4


def test_a_cascade_has_one_text_encoder(tmp_path):
    other = changed(tiny_distillation(tmp_path), text__max_length=6)
    with pytest.raises(UserError, match="The stages base and sr have the text encoders"):
        distill_cascade({"base": tiny_distillation(tmp_path), "sr": other}, tmp_path / "few")
    assert not (tmp_path / "few").exists()


@pytest.mark.parametrize("arg", ["", ":smoke"])
def test_shipped_configs_are_complete(arg):
    paper = configs.load(f"configs/cifar10/distill.py{arg}")
    several = configs.load_cascade([f"configs/emoji/distill.py{arg}"])
    for config in (paper, *several.values()):
        check_distillation(config)
    updates = sum(halving.config.train.steps for halving in halvings(paper))
    assert updates == (8 if arg else 750_000)  # the paper's

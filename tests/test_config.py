"""A config that leaves out, adds or contradicts something is refused by the key's name."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict

from cascade import config
from cascade.errors import UserError

CONFIGS = ["base64", "sr256", "demo_base", "demo_sr"]
BASE = "configs/emoji/base64.py"


def paths(section, prefix=()):
    """Every key of a config, nested sections included, but not what a registry defines."""
    for key, value in section.items():
        yield (*prefix, key)
        if isinstance(value, ConfigDict):
            yield from paths(value, (*prefix, key))


ALL_PATHS = list(paths(config.load(BASE)))


@pytest.mark.parametrize("arg", ["", ":smoke"])
@pytest.mark.parametrize("name", CONFIGS)
def test_shipped_configs_are_complete(name, arg):
    config.load(f"configs/emoji/{name}.py{arg}")


@pytest.mark.parametrize("name", ["demo_base", "demo_sr"])
def test_accelerator_variants_are_complete(name):
    loaded = config.load(f"configs/emoji/{name}.py:accelerator")
    assert loaded.train.steps > config.load(f"configs/emoji/{name}.py").train.steps


@given(st.sampled_from(ALL_PATHS))
def test_any_missing_key_is_named(path):
    loaded = config.load(BASE)
    section = loaded
    for key in path[:-1]:
        section = section[key]
    with section.unlocked():
        del section[path[-1]]
    with pytest.raises(UserError, match=path[-1]):
        config.check(loaded)


@given(st.sampled_from([p for p in ALL_PATHS if len(p) > 1]))
def test_any_foreign_key_is_named(path):
    loaded = config.load(BASE)
    section = loaded
    for key in path[:-1]:
        section = section[key]
    with section.unlocked():
        section["stray"] = 1
    with pytest.raises(UserError, match="stray"):
        config.check(loaded)


@given(st.sampled_from(ALL_PATHS))
def test_any_wrong_type_is_named(path):
    loaded = config.load(BASE)
    section = loaded
    for key in path[:-1]:
        section = section[key]
    with section.ignore_type(), section.unlocked():
        section[path[-1]] = object()
    with pytest.raises(UserError, match=path[-1]):
        config.check(loaded)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("--config.train.stepz=3", "stepz"),
        ("--config.train.steps=three", "steps"),
        ("--config.train.steps=0", "steps"),
        ("--config.stage.output=noise", "output"),
        ("--config.stage.lowres_resolution=64", "lowres_resolution"),
        ("--config.stage.crop_resolution=32", "crop_resolution"),
        ("--config.train.microbatches=3", "microbatches"),
        ("--config.text.max_length=7", "max_length"),
        ("--config.data.source.name=imagenet", "imagenet"),
        ("--config.stage.sampling.steps=0", "steps"),
        ("--config.stage.sampling.guidance=nan", "guidance"),
        ("--train.steps=3", "--train.steps=3"),
        ("steps=3", "steps=3"),
    ],
)
def test_bad_overrides_are_one_sentence(override, said):
    with pytest.raises(UserError) as caught:
        config.load(BASE, [override])
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("spec", ["configs/none.py", f"{BASE}:tiny"])
def test_missing_files_and_arguments_are_one_sentence(spec):
    with pytest.raises(UserError):
        config.load(spec)


def test_an_error_inside_a_config_file_is_one_sentence(tmp_path):
    path = tmp_path / "broken.py"
    path.write_text("def get_config(arg=''):\n    return 1 / 0\n")
    with pytest.raises(UserError, match="division by zero"):
        config.load(str(path))


def test_json_round_trip():
    loaded = config.load("configs/emoji/sr256.py")
    assert config.from_json(config.to_json(loaded)).to_dict() == loaded.to_dict()

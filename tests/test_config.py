"""A config that leaves out, adds or contradicts something is refused by the key's name."""

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict

from cascade import config
from cascade.errors import UserError
from cascade.schema import SCHEMA, Part

CONFIGS = ["base64", "sr256", "small_base", "small_sr", "demo_base", "demo_sr"]
BASE = "configs/emoji/base64.py"


def paths(section, prefix=()):
    """Every key of a config, nested sections included, but not what a registry defines."""
    for key, value in section.items():
        yield (*prefix, key)
        if isinstance(value, ConfigDict):
            yield from paths(value, (*prefix, key))


ALL_PATHS = list(paths(config.load(BASE)))


def named(path):
    """A pattern of the dotted key; within a registered part, of the part's and then the key."""
    schema = SCHEMA
    for depth, key in enumerate(path):
        if isinstance(schema, Part):
            section = ".".join(("config", *path[:depth]))
            return rf"{re.escape(section)}: .*['`\s]{key}['`\s]"
        schema = schema.get(key)
    return rf"{re.escape('.'.join(('config', *path)))}(?![\w.])"


def section_of(loaded, path):
    for key in path[:-1]:
        loaded = loaded[key]
    return loaded


@pytest.mark.parametrize("arg", ["", ":smoke"])
@pytest.mark.parametrize("name", CONFIGS)
def test_shipped_configs_are_complete(name, arg):
    assert set(config.load(f"configs/emoji/{name}.py{arg}")) == set(SCHEMA)


@pytest.mark.parametrize("name", ["demo_base", "demo_sr"])
def test_accelerator_variants_are_complete(name):
    loaded = config.load(f"configs/emoji/{name}.py:accelerator")
    assert loaded.train.steps > config.load(f"configs/emoji/{name}.py").train.steps


@given(st.sampled_from(ALL_PATHS))
def test_any_missing_key_is_named(path):
    loaded = config.load(BASE)
    section = section_of(loaded, path)
    with section.unlocked():
        del section[path[-1]]
    with pytest.raises(UserError, match=named(path)):
        config.check(loaded)


@given(st.sampled_from([p for p in ALL_PATHS if len(p) > 1]))
def test_any_foreign_key_is_named(path):
    loaded = config.load(BASE)
    section = section_of(loaded, path)
    with section.unlocked():
        section["stray"] = 1
    with pytest.raises(UserError, match=named((*path[:-1], "stray"))):
        config.check(loaded)


@given(st.sampled_from(ALL_PATHS))
def test_any_wrong_type_is_named(path):
    loaded = config.load(BASE)
    section = section_of(loaded, path)
    with section.ignore_type(), section.unlocked():
        section[path[-1]] = object()
    with pytest.raises(UserError, match=named(path)):
        config.check(loaded)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("--config.train.stepz=3", "config.train.stepz (did you mean 'steps'?)"),
        ("--config.trian.steps=3", "config.trian (did you mean 'train'?)"),
        ("--config.train.steps.x=3", "config.train.steps.x"),
        ("--config.data.source.spilt=x", "config.data.source.spilt (did you mean 'split'?)"),
        ("--config.stage.network.strides[9]=1", "config.stage.network.strides has no item [9]"),
        ("--config.train[0]=1", "config.train has no item [0]"),
        ("--config.train.steps=three", "config.train.steps"),
        ("--config.stage.output=noise", "config.stage.output"),
        ("--config.stage.lowres_resolution=64", "config.stage.lowres_resolution"),
        ("--config.stage.crop_resolution=32", "config.stage.crop_resolution"),
        ("--config.train.microbatches=3", "config.train.microbatches"),
        ("--config.text.max_length=7", "config.text.max_length"),
        ("--config.data.source.name=imagenet", "config.data.source: Unknown data source name"),
        ("--config.data.crop=random", "config.data.cache_decoded"),
        ("--config.stage.sampling.spacing.name=karas", "sampling.spacing: Unknown spacing name"),
        ("--config.stage.sampling.searched=('ddim',)", "sampling.searched holds 'ddim'"),
        ("--config.stage.sampling.searched=(('heum',(0,1)),)", "sampling.searched holds ('heum'"),
        ("--config.stage.sampling.searched=(('heun',(1,1)),)", "searched for heun has the levels"),
        ("--config.stage.network.remat=some", "remat is 'some'; choose from none, dots, blocks"),
        ("--config.stage.network.remat=False", "remat is 'False', which is 'none' now; choose"),
        ("--config.stage.network.remat=True", "remat is 'True', which is 'blocks' now; choose"),
        ("--config.stage.network.skips=some", "The network's skips is 'some'; choose from"),
        ("--config.sharding_rules=('kernel',)", "config.sharding_rules holds 'kernel'"),
        ("--config.sharding_rules=((1,('fsdp',)),)", "config.sharding_rules holds (1, "),
        ("--config.sharding_rules=(('(',('fsdp',)),)", "config.sharding_rules holds ('(', "),
        ("--config.sharding_rules=(('a','fsdp'),)", "config.sharding_rules holds ('a', 'fsdp')"),
        ("--config.sharding_rules=(('a',('row',)),)", "config.sharding_rules holds ('a', ('row'"),
        ("--config.sharding_rules=(('a',('fsdp','fsdp')),)", "each at most once"),
        ("--config.sharding_rules=(('a',(('data','fsdp'),'data')),)", "each at most once"),
        ("--train.steps=3", "--train.steps=3"),
        ("steps=3", "steps=3"),
    ],
)
def test_bad_overrides_are_one_sentence(override, said):
    with pytest.raises(UserError) as caught:
        config.load(BASE, [override])
    assert said in str(caught.value)
    assert "\n" not in str(caught.value) and "\\" not in str(caught.value)


OUTSIDE = {
    "seed": [-1, 2**32],
    "text_cache.folder": [" "],
    "text_cache.dtype": ["", "int4", "float32"],
    "stage.resolution": [0],
    "stage.channels": [0, 1, 4],
    "stage.network.channels": [0],
    "stage.network.channel_mults": [(), (1, 0, 1, 1)],
    "stage.network.num_blocks": [(2, 2, 2, 0)],
    "stage.network.skip_scale": [math.nan, math.inf],
    "stage.network.head_channels": [0],
    "stage.network.norm_groups": [0],
    "stage.lowres_resolution": [-1],
    "stage.crop_resolution": [-32],
    "stage.text_drop": [-0.1, 1.1, math.nan],
    "stage.network.dropout": [-0.1, 1.0, math.nan],
    "stage.sampling.steps": [0, 100_001],
    "stage.sampling.guidance": [math.nan, math.inf],
    "stage.sampling.rescale": [-0.1, 1.1, math.nan],
    "stage.sampling.aug_level": [-0.1, 1.1, math.nan],
    "stage.sampling.tile": [-64],
    "stage.sampling.tile_overlap": [-16],
    "data.workers": [-1],
    "data.max_broken_rate": [-0.1, 1.1, math.nan],
    "data.filter.min_side": [-1],
    "data.filter.max_aspect": [0.5, math.nan],
    "train.steps": [0],
    "train.batch_size": [0],
    "train.microbatches": [0],
    "train.log_every": [0],
    "train.eval_every": [-1],
    "train.sample_every": [-1],
    "train.checkpoint_every": [-1],
    "train.keep_every": [-1],
    "train.keep_last": [0],
    "train.eval_batches": [-1],
    "train.sample_count": [0],
    "train.ema_decay": [-0.1, 1.0, math.nan],
    "train.clip_norm": [-1.0, math.nan, math.inf],
    "train.optimizer.b1": [-0.1, 1.0, math.nan],
    "train.learning_rate.peak": [-1e-3, math.nan, math.inf],
    "train.learning_rate.warmup_steps": [-1],
    "train.learning_rate.decay_steps": [0, 10],  # the second: no more than warmup_steps
    "train.learning_rate.end": [-1e-3, math.nan],
}


@pytest.mark.parametrize(("key", "value"), [(k, v) for k, vs in OUTSIDE.items() for v in vs])
def test_a_number_outside_its_range_is_named(key, value):
    loaded = config.load(BASE)
    loaded.train.learning_rate = ConfigDict(
        {"name": "cosine", "peak": 1e-3, "warmup_steps": 10, "decay_steps": 90, "end": 1e-5}
    )
    config.check(loaded)
    path = key.split(".")
    section_of(loaded, path)[path[-1]] = value
    with pytest.raises(
        UserError, match=rf"^config\.{re.escape(key)} is {re.escape(repr(value))}; "
    ):
        config.check(loaded)


@pytest.mark.parametrize("key", ["eval_every", "sample_every", "checkpoint_every", "keep_every"])
def test_an_interval_of_zero_means_never(key):
    assert config.load(BASE, [f"--config.train.{key}=0"]).train[key] == 0


def test_sharding_rules_are_pairs_of_a_pattern_and_a_spec():
    rules = "(('conv.*kernel',(None,None,None,('fsdp','tensor'))),('bias',()))"
    assert len(config.load(BASE, [f"--config.sharding_rules={rules}"]).sharding_rules) == 2


@pytest.mark.parametrize("spec", ["", "configs/none.py", f"{BASE}:tiny"])
def test_missing_files_and_arguments_are_one_sentence(spec):
    with pytest.raises(UserError):
        config.load(spec)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def get_config(arg):\n    return 1 / 0", "ZeroDivisionError: division by zero (line 2: "),
        ("def get_config(arg):\n    assert arg", "AssertionError (line 2: assert arg)"),
        ("def get_config(arg):\n    raise ValueError('say x')", ": say x."),
        ("def get_config(arg):\n    return open('/none')", "FileNotFoundError: "),
        ("def get_config(:", "SyntaxError: invalid syntax"),
        ("raise SystemExit(3)", "SystemExit: 3 (line 1: "),
        ("x = 1", "has no get_config"),
        ("def get_config(arg):\n    return 1", "must return an ml_collections.ConfigDict"),
    ],
)
def test_an_error_inside_a_config_file_is_one_sentence(tmp_path, text, said):
    path = tmp_path / "broken.py"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        config.load(str(path))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value) and "Traceback" not in str(caught.value)


def test_json_round_trip():
    loaded = config.load("configs/emoji/sr256.py")
    assert config.from_json(config.to_json(loaded)).to_dict() == loaded.to_dict()


@pytest.mark.parametrize(("before", "now"), [(True, "blocks"), (False, "none")])
def test_what_was_recomputed_before_policies_is_read_as_one(before, now):
    loaded = config.load("configs/emoji/base64.py:smoke")
    saved = config.to_json(loaded)
    saved["stage"]["network"]["remat"] = before
    assert config.from_json(saved).stage.network.remat == now


def test_what_was_trained_before_pictures_were_mirrored_mirrored_none():
    loaded = config.load(BASE)
    saved = config.to_json(loaded)
    del saved["data"]["mirror"]
    assert config.from_json(saved).to_dict() == loaded.to_dict()


@pytest.mark.parametrize(
    ("before", "now"),
    [((), {"name": "constant"}), ((-1, 2.5), {"name": "interval", "low": -1, "high": 2.5})],
)
def test_an_interval_of_guidance_is_read_as_its_schedule(before, now):
    loaded = config.load("configs/emoji/base64.py:smoke")
    saved = config.to_json(loaded)
    sampling = saved["stage"]["sampling"]
    del sampling["guidance_schedule"], sampling["searched"]
    sampling["guidance_interval"] = list(before)
    read = config.from_json(saved)
    assert read.stage.sampling.guidance_schedule.to_dict() == now
    config.check(read)
    loaded.stage.sampling.guidance_schedule = now
    assert read.to_dict() == loaded.to_dict()

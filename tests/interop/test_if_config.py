"""DeepFloyd IF's configs and files are read whole, and written as they were read."""

import inspect

import jax
import numpy as np
import pytest
from if_torch import diffusers, randomised, torch
from tiny_if import CASES, read_stage, unet

from cascade.interop import if_unet
from cascade.interop.folders import read_json
from cascade.shards import named


def test_every_option_is_known():
    parameters = set(inspect.signature(diffusers.UNet2DConditionModel.__init__).parameters)
    known = {*if_unet.STATED, *if_unet.MAPPED, *if_unet.BUILT}
    assert known == parameters - {"self"}


def test_defaults_are_those_of_diffusers():
    """What an older file leaves out means what it means to diffusers."""
    signature = inspect.signature(diffusers.UNet2DConditionModel.__init__).parameters
    for key, default in {**if_unet.MAPPED, **if_unet.BUILT}.items():
        if key not in if_unet.STATED:
            assert signature[key].default == default, key


@pytest.mark.parametrize("name", CASES)
def test_what_is_written_is_what_was_read(name, tmp_path):
    """diffusers builds the same network, to the shape of each tensor, from our description."""
    original = diffusers.UNet2DConditionModel(**CASES[name])
    original.save_config(tmp_path)
    description = read_json(tmp_path, "config.json")
    later = description["in_channels"] == 6
    read = if_unet.read("config.json", description, later)
    stage = {**read, "lowres_resolution": 4 * later}
    written = if_unet.write(stage)
    again = if_unet.read("config.json", written, later)
    assert again["network"].pop("residual_scale") == pytest.approx(
        read["network"].pop("residual_scale"), rel=1e-12
    )
    assert again == read
    rebuilt = diffusers.UNet2DConditionModel.from_config(written)
    assert {key: value.shape for key, value in rebuilt.state_dict().items()} == {
        key: value.shape for key, value in original.state_dict().items()
    }


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_weights_are_read_as_they_are(dtype, tmp_path):
    model = randomised(unet("a", sample_size=4), seed=0).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "half")
    model.float().save_pretrained(tmp_path / "whole")
    _, half = read_stage(tmp_path / "half")
    _, whole = read_stage(tmp_path / "whole")
    for (path, a), (_, b) in zip(named(half), named(whole), strict=True):
        np.testing.assert_array_equal(a.astype(np.float32), b, err_msg=path)


def test_shards_are_read_as_one_file_is(tmp_path):
    model = randomised(unet("a", sample_size=4), seed=0)
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="200KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    _, whole = read_stage(tmp_path / "whole")
    _, shards = read_stage(tmp_path / "shards")
    assert jax.tree.all(jax.tree.map(np.array_equal, whole, shards))

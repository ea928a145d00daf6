"""What diffusers' pipelines can't express isn't exported to them; the sentence names it."""

from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_if import read_stage
from tiny_t5 import write_folder

from cascade.bundle import TrainedStage, load_bundle, save_bundle
from cascade.errors import UserError
from cascade.interop.deepfloyd import TEXT
from cascade.interop.diffusers_folder import export_diffusers
from cascade.registry import build
from cascade.stage import Stage
from cascade.text.encoders import ENCODERS

FOLDER = Path(__file__).parents[1] / "golden" / "if"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"network.text_norm": "layer"}, "network.text_norm = 'layer'"),
        ({"network.noise_embedding": "logsnr"}, "network.noise_embedding = 'logsnr'"),
        ({"network.skip_scale": 0.7}, "network.skip_scale = 0.7"),
        ({"network.entry_skips": False}, "network.entry_skips = False"),
        ({"network.middle_attention": (True, False)}, "network.middle_attention"),
        ({"network.pool_projected": True}, "network.pool_projected = True"),
        ({"network.text_attention": (False, False)}, "network.self_attention"),
        ({"network.scan_blocks": True}, "network.scan_blocks = True"),
        ({"schedule.betas": "linear"}, "network.noise_embedding"),
        ({"schedule": {"name": "cosine", "logsnr_min": -20.0, "logsnr_max": 20.0}}, "schedule"),
        ({"sampling.sampler": {"name": "ddim"}}, "sampling.sampler.name = 'ddim'"),
        ({"sampling.spacing": {"name": "uniform"}}, "sampling.spacing"),
        ({"sampling.rescale": 0.5}, "sampling.rescale = 0.5"),
        (
            {"sampling.guidance_schedule": {"name": "interval", "low": -1.0, "high": 1.0}},
            "sampling.guidance_schedule",
        ),
        ({"learned_variance": False}, "learned_variance = False"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_diffusers_can_not_express(changes, said, tmp_path):
    bundle = bundle_of(tmp_path, changes)
    with pytest.raises(UserError, match=f"Stage 0 has .*{said}"):
        export_diffusers(bundle, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def bundle_of(tmp_path: Path, changes: dict, text_weights: bool = True, **text) -> Path:
    """A bundle of IF's first stage with some settings of its section changed."""
    section = read_stage(FOLDER / "stage_1", text_length=77)[0].config.copy_and_resolve_references()
    section.unlock()
    for path, value in changes.items():
        *up, key = path.split(".")
        inner = section
        for part in up:
            inner = inner[part]
        inner[key] = value
    stage = Stage(section)
    params = jax.tree.map(
        lambda leaf: np.zeros(leaf.shape, np.float32), jax.eval_shape(stage.init, jax.random.key(0))
    )
    weights = write_folder(tmp_path / "t5", d_model=32, num_heads=4)
    settings = {**TEXT, "dtype": "float32", "weights": str(weights), **text}
    encoder = build("text encoder", ENCODERS, settings)
    return save_bundle(
        tmp_path / "bundle",
        [TrainedStage(stage, params, 1)],
        settings,
        encoder,
        text_weights=text_weights,
    )


def test_a_bundle_without_its_t5_is_exported_with_the_one_that_is_given(tmp_path):
    bundle = bundle_of(tmp_path, {}, text_weights=False)
    with pytest.raises(UserError, match="text_weights"):
        export_diffusers(bundle, tmp_path / "out")
    out = export_diffusers(bundle, tmp_path / "out", text_weights=str(tmp_path / "t5"))
    written = load_file(out / "stage0" / "text_encoder" / "model.safetensors")
    given = load_file(tmp_path / "t5" / "model.safetensors")
    for name in written:
        np.testing.assert_array_equal(written[name], given[name])


def test_weights_that_are_not_finite_once_rounded_are_not_exported(tmp_path, monkeypatch):
    """The largest float32 is beyond bfloat16's."""
    bundle = bundle_of(tmp_path, {})
    loaded = load_bundle(bundle)
    largest = jax.tree.map(
        lambda leaf: np.full_like(leaf, np.finfo(np.float32).max), loaded.stages[0].params
    )
    broken = loaded._replace(stages=(loaded.stages[0]._replace(params=largest),))
    monkeypatch.setattr("cascade.interop.diffusers_folder.load_bundle", lambda folder, **_: broken)
    with pytest.raises(UserError, match="infinite"):
        export_diffusers(bundle, tmp_path / "out", dtype="bfloat16")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", [{"null": "zeros"}, {"lower_case": False}])
def test_text_that_diffusers_would_read_otherwise(change, tmp_path):
    bundle = bundle_of(tmp_path, {}, **change)
    with pytest.raises(UserError, match=next(iter(change))):
        export_diffusers(bundle, tmp_path / "out")

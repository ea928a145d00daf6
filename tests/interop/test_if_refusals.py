"""Of DeepFloyd IF nothing is passed over: what isn't built, or isn't whole, is refused by name."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from if_steps import IF
from safetensors.numpy import load_file, save_file
from tiny_if import read_stage, unet
from tiny_t5 import write_folder

from cascade.bundle import load_bundle
from cascade.errors import UserError
from cascade.interop import if_scheduler, if_unet
from cascade.interop.deepfloyd import import_deepfloyd, stage_section
from cascade.stage import Stage

FOLDER = Path(__file__).parents[1] / "golden" / "if"
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    "change",
    [
        {"down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"]},
        {"up_block_types": ["ResnetUpsampleBlock2D"] * 2},
        {"block_out_channels": []},
        {"block_out_channels": [32, -32]},
        {"layers_per_block": [1, 1, 1]},
        {"layers_per_block": "two"},
        {"layers_per_block": 3000},
        {"layers_per_block": [1, 0]},
        {"block_out_channels": [32] * 11},
        {"mid_block_type": "UNetMidBlock2DCrossAttn"},
        {"mid_block_scale_factor": 2.0},
        {"resnet_out_scale_factor": 0.0},
        {"act_fn": "mish"},
        {"norm_eps": 1e-6},
        {"norm_num_groups": None},
        {"in_channels": 6},
        {"out_channels": 4},
        {"class_embed_type": "timestep"},
        {"cross_attention_norm": "layer_norm"},
        {"cross_attention_dim": [64, 64]},
        {"attention_head_dim": [16, 8]},
        {"encoder_hid_dim_type": "text_image_proj"},
        {"addition_embed_type": "text_time"},
        {"time_embedding_type": "fourier"},
        {"freq_shift": 1},
        {"flip_sin_to_cos": False},
        {"resnet_time_scale_shift": "default"},
        {"resnet_skip_time_act": "yes"},
        {"only_cross_attention": 1},
        {"use_linear_projection": True},
        {"sample_size": None},
        {"sample_size": [16, 16]},
        {"a_new_option": False},
    ],
    ids=lambda change: "-".join(f"{key}={value}" for key, value in change.items()),
)
def test_an_option_of_a_unet_that_is_not_built(change):
    key = next(iter(change))
    with pytest.raises(UserError, match=rf"config\.json.*{key}"):
        if_unet.read("config.json", unet("aa") | change, super_resolution=False)


@pytest.mark.parametrize("change", [{"act_fn": "x" * 9999}, {"x" * 9999: 1}, {"new": [1] * 9999}])
def test_a_refusal_quotes_no_more_than_one_can_read(change):
    with pytest.raises(UserError) as error:
        if_unet.read("config.json", unet("aa") | change, super_resolution=False)
    assert len(str(error.value)) < 300


def test_a_refusal_of_a_pipeline_is_as_short(pipelines, tmp_path):
    rewrite(pipelines[0] / "model_index.json", _class_name="x" * 9999)
    with pytest.raises(UserError) as error:
        import_deepfloyd(pipelines, tmp_path / "out")
    assert len(str(error.value)) < 500


def test_the_published_size_is_the_published_number():
    """IF-I-XL has 4.3 billion parameters."""
    changes = {"block_out_channels": [704, 1408, 2112, 2816], "cross_attention_dim": 2816}
    heads = {"attention_head_dim": 64, "addition_embed_type_num_heads": 64}
    config = unet("raaa", sample_size=64, layers_per_block=3, encoder_hid_dim=4096)
    section = stage_section(
        "XL",
        {"unet": {**config, **changes, **heads}, "scheduler": IF},
        lowres_resolution=0,
        text_length=77,
        dtype="bfloat16",
    )
    params = jax.eval_shape(Stage(section).init, jax.random.key(0))
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert round(count / 1e9, 1) == 4.3


def test_notes_on_the_file_are_no_options():
    noted = unet("aa") | {"_class_name": "UNet2DConditionModel", "_name_or_path": "/a"}
    assert if_unet.read("f", noted, False) == if_unet.read("f", unet("aa"), False)


@pytest.mark.parametrize("key", if_unet.STATED)
def test_what_must_be_stated(key):
    config = unet("aa")
    del config[key]
    with pytest.raises(UserError, match=f"lacks '{key}'"):
        if_unet.read("config.json", config, super_resolution=False)


@pytest.mark.parametrize(
    "config",
    [
        {"beta_schedule": "scaled_linear"},
        {"beta_end": 0.012},
        {"num_train_timesteps": 500},
        {"trained_betas": [0.1, 0.2]},
        {"variance_type": "fixed_small_log"},
        {"variance_type": "learned_range"},
        {"clip_sample_range": 2.0},
        {"timestep_spacing": "other"},
        {"steps_offset": 1},
        {"rescale_betas_zero_snr": True},
        {"prediction_type": "flow"},
        {"sample_max_value": 0.5},
        {"dynamic_thresholding_ratio": "most"},
        {"use_karras_sigmas": False},
    ],
)
def test_an_option_that_is_not_built_is_named(config):
    with pytest.raises(UserError, match=next(iter(config))):
        if_scheduler.read("config", config, learned_variance=False)


def change_weights(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda t: t.pop("mid_block.attentions.0.to_q.weight"),
            "lack .*mid_block.attentions.0.to_q",
        ),
        (lambda t: t.update(extra=np.zeros(3, np.float16)), "'extra', which config.json has no"),
        (
            lambda t: t.update({"conv_in.weight": np.zeros((8, 3, 1, 1), np.float16)}),
            r"'conv_in.weight' with the shape \(8, 3, 1, 1\) where .* \(8, 3, 3, 3\)",
        ),
        (lambda t: t.update({"conv_in.weight": t["conv_in.weight"].T.copy()}), "conv_in.weight"),
    ],
    ids=["missing", "foreign", "misshapen", "turned"],
)
def test_a_tensor_that_does_not_fit(change, said, tmp_path):
    shutil.copytree(FOLDER / "stage_1", tmp_path / "unet")
    change_weights(tmp_path / "unet", change)
    with pytest.raises(UserError, match=said):
        read_stage(tmp_path / "unet")


def pipeline(folder: Path, stage: int) -> Path:
    """A pipeline's folder as published, around a network that is kept for tests."""
    name = "IFSuperResolutionPipeline" if stage > 1 else "IFPipeline"
    shutil.copytree(FOLDER / f"stage_{stage}", folder / "unet")
    description = json.loads((folder / "unet" / "config.json").read_text())
    schedulers = ["scheduler", *(["image_noising_scheduler"] if stage > 1 else [])]
    if stage > 1:
        (folder / "unet" / "config.json").write_text(json.dumps(description | {"sample_size": 16}))
    for scheduler in schedulers:
        (folder / scheduler).mkdir()
        config = {"_class_name": "DDPMScheduler", **IF}
        (folder / scheduler / "scheduler_config.json").write_text(json.dumps(config))
    write_folder(folder / "text_encoder", d_model=32, num_heads=4)
    (folder / "tokenizer").mkdir()
    (folder / "text_encoder" / "spiece.model").rename(folder / "tokenizer" / "spiece.model")
    index = {
        "_class_name": name,
        "unet": ["diffusers", "UNet2DConditionModel"],
        **{part: ["diffusers", "DDPMScheduler"] for part in schedulers},
        "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "T5Tokenizer"],
        "safety_checker": ["deepfloyd_if", "IFSafetyChecker"],
        "requires_safety_checker": True,
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def pipelines(tmp_path):
    return pipeline(tmp_path / "I", 1), pipeline(tmp_path / "II", 2)


def spoil_t5(folder: Path):
    """Puts one NaN into a T5's weights."""
    tensors = load_file(folder / "model.safetensors")
    tensors["shared.weight"][5, 0] = np.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def rewrite(path: Path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_an_import_says_what_it_leaves_out(pipelines, tmp_path, caplog):
    import_deepfloyd(pipelines, tmp_path / "out")
    (said,) = [r.getMessage() for r in caplog.records if "safety checker" in r.getMessage()]
    assert all(str(folder) in said for folder in pipelines)
    bundle = load_bundle(tmp_path / "out")
    assert [trained.trained_steps for trained in bundle.stages] == [None, None]
    assert [trained.stage.config.resolution for trained in bundle.stages] == [8, 16]
    sampling = [trained.stage.config.sampling for trained in bundle.stages]
    assert [(s.steps, s.guidance, s.aug_level) for s in sampling] == [
        (100, 7.0, 0.0),
        (50, 4.0, 0.251),
    ]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda i, ii: (ii, i), "'IFSuperResolutionPipeline' where IFPipeline is needed"),
        (lambda i, ii: (i, i), "'IFPipeline' where IFSuperResolutionPipeline is needed"),
        (lambda i, ii: (i / "unet",), "no file 'model_index.json'"),
        (lambda i, ii: (), "no source"),
        (
            lambda i, ii: rewrite(i / "model_index.json", vae=["diffusers", "VAE"]) or (i,),
            "the part 'vae'",
        ),
        (
            lambda i, ii: rewrite(i / "model_index.json", text_encoder=[None, None]) or (i,),
            "no text_encoder",
        ),
        (
            lambda i, ii: (
                rewrite(i / "model_index.json", unet=["diffusers", "UNet2DModel"]) or (i,)
            ),
            "unet is a 'UNet2DModel'",
        ),
        (
            lambda i, ii: rewrite(i / "unet" / "config.json", _class_name="VAE") or (i,),
            "says it is 'VAE'",
        ),
        (
            lambda i, ii: (
                rewrite(
                    ii / "image_noising_scheduler" / "scheduler_config.json", beta_schedule="linear"
                )
                or (i, ii)
            ),
            "other betas",
        ),
        (
            lambda i, ii: (
                rewrite(i / "scheduler" / "scheduler_config.json", variance_type="fixed_small")
                or (i,)
            ),
            "variance_type = 'fixed_small'",
        ),
        (
            lambda i, ii: (i / "unet" / WEIGHTS).rename(i / "unet" / "pytorch_model.bin") and (i,),
            "only pickles",
        ),
        (
            lambda i, ii: (i / "tokenizer" / "spiece.model").write_bytes(b"words") and (i,),
            "not a SentencePiece model",
        ),
        (
            lambda i, ii: (i / "tokenizer" / "spiece.model").unlink() or (i,),
            "no spiece.model, which current transformers leaves out",
        ),
        (
            lambda i, ii: shutil.rmtree(i / "text_encoder") or (i,),
            "no text_encoder",
        ),
        (lambda i, ii: spoil_t5(i / "text_encoder") or (i,), "holds NaN or infinity"),
        (
            lambda i, ii: rewrite(ii / "text_encoder" / "config.json", num_layers=1) or (i, ii),
            "encoder.block.1.* config.json knows nothing of",
        ),
    ],
)
def test_a_folder_that_is_not_what_it_claims(change, said, pipelines, tmp_path):
    with pytest.raises(UserError, match=said):
        import_deepfloyd(change(*pipelines), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_stages_share_their_text_encoder(pipelines, tmp_path):
    write_folder(pipelines[1] / "text_encoder", d_model=32, num_heads=4, num_layers=1)
    with pytest.raises(UserError, match="another text encoder"):
        import_deepfloyd(pipelines, tmp_path / "out")

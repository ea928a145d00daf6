"""The whole of DeepFloyd IF: imported, drawn with, exported, and drawn with by diffusers again."""

import shutil
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest
from if_steps import IF
from if_torch import diffusers, randomised, to_torch, torch
from tiny_if import super_resolution, unet

import cascade
from cascade.diffusion.process import picture_noise
from cascade.interop.deepfloyd import import_deepfloyd
from cascade.interop.diffusers_folder import export_diffusers

transformers = pytest.importorskip("transformers")

VOCABULARY = Path(__file__).parents[1] / "text" / "t5_vocab" / "spiece.model"
PROMPT = " A red Fox on the snow "  # IF reads it in lower case
SEED, STEPS, GUIDANCE, NOISE_LEVEL = 5, (6, 4), (7.0, 4.0), 250
TEXT = {"encoder_hid_dim": 32, "cross_attention_dim": 32, "time_embedding_dim": 32}


def network(config):
    """A random U-Net with small outputs: guided steps don't blow rounding errors up.

    Its variance lies above the posterior's upper bound.
    """
    model = randomised(config, seed=1)
    with torch.no_grad():
        model.conv_out.weight *= 0.05
        model.conv_out.bias[3:] += 1.5
    return model


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    """Folders of stages I and II with random parts, all of them small, as diffusers writes them."""
    folder = tmp_path_factory.mktemp("if")
    (folder / "vocabulary").mkdir()
    shutil.copy(VOCABULARY, folder / "vocabulary")
    tokenizer = transformers.T5Tokenizer.from_pretrained(folder / "vocabulary")
    torch.manual_seed(0)
    shape = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 4}
    config = transformers.T5Config(**shape, vocab_size=32128, feed_forward_proj="gated-gelu")
    shared = {
        "tokenizer": tokenizer,
        "text_encoder": transformers.T5EncoderModel(config).eval(),
        **dict.fromkeys(("safety_checker", "feature_extractor", "watermarker")),
        "requires_safety_checker": False,
    }
    base = diffusers.IFPipeline(
        unet=network(unet("ra", sample_size=8, **TEXT)),
        scheduler=diffusers.DDPMScheduler(**IF),
        **shared,
    )
    base.save_pretrained(folder / "I")
    later = diffusers.IFSuperResolutionPipeline(
        unet=network(super_resolution("ra", sample_size=16, **TEXT)),
        scheduler=diffusers.DDPMScheduler(**IF | {"sample_max_value": 1.0}),
        image_noising_scheduler=diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        **shared,
    )
    later.save_pretrained(folder / "II")
    for stage in ("I", "II"):  # as published; today's transformers writes tokenizer.json alone
        shutil.copy(VOCABULARY, folder / stage / "tokenizer")
    return folder / "I", folder / "II"


@pytest.fixture(scope="module")
def bundle(pipelines, tmp_path_factory):
    return import_deepfloyd(list(pipelines), tmp_path_factory.mktemp("bundle") / "if")


def noises(stage: int, size: int):
    """The noise that our stage draws picture 0 with, in the order that diffusers asks for it."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(SEED), 0), stage)
    aug, start, steps = (jax.random.fold_in(key, purpose)[None] for purpose in range(3))
    yield picture_noise(start, (size, size, 3))
    if stage > 0:
        yield picture_noise(jax.random.split(aug[0])[1:], (size, size, 3))
    for i in range(STEPS[stage]):
        yield picture_noise(jax.random.fold_in(steps[0], i)[None], (size, size, 3))


def drawn_by_diffusers(folders) -> list[np.ndarray]:
    """The picture of each stage, uint8, of diffusers' pipelines with our noise."""
    base = diffusers.IFPipeline.from_pretrained(folders[0])
    later = diffusers.IFSuperResolutionPipeline.from_pretrained(folders[1])
    pictures, given = [], {}
    for i, pipe in enumerate((base, later)):
        pipe.set_progress_bar_config(disable=True)
        drawn = noises(i, pipe.unet.config.sample_size)

        def noise(shape, drawn=drawn, **_):
            return to_torch(np.asarray(next(drawn)))

        where = type(pipe).__module__
        with (
            mock.patch(f"{where}.randn_tensor", noise),
            mock.patch("diffusers.schedulers.scheduling_ddpm.randn_tensor", noise),
        ):
            image = pipe(
                PROMPT,
                num_inference_steps=STEPS[i],
                guidance_scale=GUIDANCE[i],
                clean_caption=False,
                **given,
            ).images[0]
        pictures.append(np.asarray(image))
        given = {"image": image, "noise_level": NOISE_LEVEL}
    return pictures


@pytest.fixture(scope="module")
def exported(bundle, tmp_path_factory):
    out = export_diffusers(bundle, tmp_path_factory.mktemp("exported") / "if")
    return out / "stage0", out / "stage1"


@pytest.fixture(scope="module")
def theirs(pipelines):
    return drawn_by_diffusers(pipelines)


def test_pictures_are_those_of_diffusers(bundle, theirs):
    pipe = cascade.load(bundle)
    assert pipe.stages[1].config.sampling.aug_level == (NOISE_LEVEL + 1) / 1000
    drawing = {"seed": SEED, "steps": STEPS, "guidance": GUIDANCE, "return_stages": True}
    ours, others = (pipe(text, progress=False, **drawing) for text in (PROMPT, "a blue whale"))
    for (picture,), (other,), expected in zip(ours, others, theirs, strict=True):
        error, change = (np.abs(each.astype(int) - expected).max() for each in (picture, other))
        print(f"{expected.shape[:2]}: largest error {error} of 255; another prompt's {change}")
        assert error <= 2
        assert change > 20


def test_what_is_exported_is_what_was_imported(exported, theirs):
    for again, first in zip(drawn_by_diffusers(exported), theirs, strict=True):
        np.testing.assert_array_equal(again, first)


def test_an_export_can_be_imported(bundle, exported, tmp_path):
    again = import_deepfloyd(exported, tmp_path / "again")
    first, second = cascade.bundle.load_bundle(bundle), cascade.bundle.load_bundle(again)
    assert first.text_encoder.fingerprint == second.text_encoder.fingerprint
    for a, b in zip(first.stages, second.stages, strict=True):
        assert jax.tree.all(jax.tree.map(np.array_equal, a.params, b.params))
        assert a.stage.config == b.stage.config

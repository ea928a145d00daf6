"""Training that encodes its captions as it goes: the cache's losses, and exact resumption."""

import jax
import numpy as np
import pytest
from one_level import flags
from tiny_t5 import write_folder

from cascade import config, registry
from cascade.parallel.mesh import batch_sharding, make_mesh, put_batch
from cascade.text.encoders import ENCODERS, minilm
from cascade.text.on_the_fly import Tokenized, encoded
from cascade.training import metrics
from cascade.training.train import train

FLOAT16 = 2**-11  # what a cache rounds by
FLOAT32 = 1e-5  # of sums in another order
CAPTIONS = [f"a drawing of {n} {what}" for n in range(4) for what in ("cats", "very red apples")]


# Texts are never dropped, and steps so large that without any the losses would be off by percents.
FELT = {"stage__text_drop": 0.0, "train__learning_rate__peak": 0.03, "train__log_every": 1}


def run(workdir, cache, **changes):
    """The logged rows of a smoke run on eight devices, by step."""
    overrides = flags(mesh__data=2, mesh__fsdp=4, text_cache__folder=cache, **FELT, **changes)
    train(config.load("configs/emoji/base64.py:smoke", overrides), workdir, progress=False)
    return {row["step"]: row for row in metrics.read(workdir / "metrics.jsonl") if "loss" in row}


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """(folder, rows) of an unbroken run of four steps without a cache."""
    folder = tmp_path_factory.mktemp("straight")
    return folder, run(folder, cache="")


def test_losses_are_those_of_a_cache_to_its_rounding(straight, tmp_path):
    cached = run(tmp_path / "run", cache=tmp_path / "cache")
    assert list(cached) == list(straight[1]) == [1, 2, 3, 4]
    for step, row in cached.items():
        for key in ("loss", "gradient_norm"):
            np.testing.assert_allclose(straight[1][step][key], row[key], rtol=FLOAT16)


def test_it_evaluates_and_draws(straight):
    folder, _ = straight
    assert any("eval_loss" in row for row in metrics.read(folder / "metrics.jsonl"))
    assert (folder / "samples" / "00000004.png").is_file()


def test_a_resumed_run_repeats_the_unbroken_one(straight, tmp_path):
    first = run(tmp_path, cache="", train__steps=2)
    resumed = run(tmp_path, cache="")
    assert list(first) == [1, 2]
    for step, row in straight[1].items():
        for key in ("loss", "gradient_norm"):
            assert resumed[step][key] == row[key]


@pytest.mark.parametrize("name", ["minilm", "t5"])
def test_batches_are_encoded_where_they_lie_by_one_program(name, tmp_path):
    section = {"name": name, "max_length": 16, "weights": ""}
    if name == "t5":  # as DeepFloyd IF has it: all positions' states go to the stages
        section |= {"weights": str(write_folder(tmp_path)), "null": "empty_prompt"}
        section |= {"keep_padding": True, "lower_case": True, "dtype": "float32"}
    encoder, reference = (registry.build("text encoder", ENCODERS, section) for _ in range(2))
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    encoder.place(mesh)
    emb, mask = reference.encode(CAPTIONS)
    for shift in range(3):
        batch = put_batch(Tokenized(encoder)(np.roll(CAPTIONS, shift).tolist()), mesh)
        assert batch.keys() == {"text_ids", "token_mask"}
        with jax.transfer_guard("disallow" if shift else "allow"):  # the first may load weights
            texts = encoded(encoder, batch)
        assert texts.keys() == {"text_emb", "text_mask"}
        assert texts["text_emb"].sharding.is_equivalent_to(batch_sharding(mesh), 3)
        # float32 sums in another order: the whole length in place of the caption's own.
        np.testing.assert_allclose(texts["text_emb"], np.roll(emb, shift, axis=0), atol=FLOAT32)
        np.testing.assert_array_equal(texts["text_mask"], np.roll(mask, shift, axis=0))
    assert encoder._apply._cache_size() == 1


def test_the_first_cut_caption_is_named_once(caplog):
    texts = Tokenized(minilm(max_length=4, weights=""))
    for _ in range(3):
        texts(["a cat", "a cat that sleeps"])
    assert caplog.text.count("longer than the 4 tokens") == 1
    assert "'a cat that sleeps'" in caplog.text

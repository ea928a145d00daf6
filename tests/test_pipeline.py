"""Same seed, same picture: whatever the batch, before and after saving, alone or in the cascade."""

import json
import logging
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny_cascade import TEXT, WordEncoder, stage_config, tiny_stages, trained

import cascade
from cascade import images, sample
from cascade.batches import Batch
from cascade.errors import UserError
from cascade.parallel.mesh import all_devices
from cascade.pipeline import Cascade
from cascade.request import default_batch_size

PROMPTS = ["a red apple", "two blue birds"]


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """These networks are tiny: compiling them well takes longer than running them."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def stages():
    return tiny_stages()


@pytest.fixture(scope="module")
def pipe(stages):
    return Cascade(stages, TEXT, WordEncoder())


@pytest.fixture(scope="module")
def base(stages):
    """The first stage alone, where one is enough."""
    return Cascade(stages[:1], TEXT, WordEncoder())


@pytest.fixture(scope="module")
def drawn(pipe):
    """[base, enlarged] of four pictures for each of two prompts, in one batch."""
    return pipe(PROMPTS, num_images=4, batch_size=8, return_stages=True, progress=False)


def spread(a, b):
    return np.abs(a.astype(int) - b.astype(int)).max()


# ------------------------------------------------------------------------------ the same picture


def test_pictures_are_uint8_and_one_size_up_a_stage(drawn):
    assert [x.shape for x in drawn] == [(8, 8, 8, 3), (8, 16, 16, 3)]
    assert all(x.dtype == np.uint8 for x in drawn)


def test_every_picture_is_another(drawn):
    for stage in drawn:
        for i in range(8):
            for j in range(i):
                assert spread(stage[i], stage[j]) > 20


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_batch_does_not_matter(pipe, drawn, batch_size):
    again = pipe(PROMPTS, num_images=4, batch_size=batch_size, return_stages=True, progress=False)
    for a, b in zip(again, drawn, strict=True):
        assert spread(a, b) <= 1


def test_neither_do_the_pictures_drawn_before(pipe, drawn):
    last = pipe(PROMPTS[1], first_index=7, return_stages=True, progress=False)
    for a, b in zip(last, drawn, strict=True):
        assert spread(a[0], b[7]) <= 1


def test_bit_for_bit_whatever_is_drawn_beside_it(pipe, drawn):
    """With the same rows, on the same machine."""
    some = pipe(PROMPTS[1], 3, first_index=5, batch_size=8, return_stages=True, progress=False)
    for a, b in zip(some, drawn, strict=True):
        np.testing.assert_array_equal(a, b[5:8])


def test_several_small_pictures_go_through_at_once_unless_told_otherwise(base):
    rows = [len(batch.stages[-1]) for batch in base.draw_batches("moon", 9, progress=False)]
    assert rows == ([3, 3, 3] if jax.default_backend() == "cpu" else [5, 5])


def test_large_ones_on_a_cpu_do_not(pipe):
    if jax.default_backend() != "cpu":
        pytest.skip("an accelerator draws several at once")
    assert [default_batch_size(pipe.mesh, side, 8) for side in (256, 512)] == [4, 1]


@given(st.integers(1, 10**6), st.sampled_from([64, 256, 1024]))
def test_default_batches_are_few_and_have_less_than_a_row_each_to_fill(count, side):
    mesh = all_devices()
    most = default_batch_size(mesh, side, 2**40)
    rows = default_batch_size(mesh, side, count)
    batches = -(-count // rows)
    assert rows <= most and batches == -(-count // most)
    assert batches * rows - count < batches


def test_a_batch_passes_all_stages_before_the_next_is_begun(pipe, drawn):
    """So a number of pictures that no memory holds can be begun."""
    batches = pipe.draw_batches(PROMPTS[0], 10**9, batch_size=8, progress=False)
    for a, b in zip(next(batches), drawn, strict=True):
        assert len(a) == 8
        np.testing.assert_array_equal(a[:4], b[:4])


def test_the_batches_make_the_whole(base, drawn):
    sizes, pictures = [], []
    for (batch,) in base.draw_batches(PROMPTS[0], 9, batch_size=8, progress=False):
        sizes.append(len(batch))
        pictures.extend(batch)
    assert sizes == [8, 1]
    np.testing.assert_array_equal(pictures[:4], drawn[0][:4])


def test_the_same_picture_bit_for_bit_from_a_bundle(pipe, tmp_path):
    loaded = cascade.load(pipe.save(tmp_path / "b"), WordEncoder())
    before, after = (each("moon", return_stages=True, progress=False) for each in (pipe, loaded))
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a, b)


def test_another_seed_is_another_picture(base):
    first, second = (base("moon", seed=seed, progress=False) for seed in (0, 2**32 - 1))
    assert spread(first, second) > 20


def test_enlarging_a_saved_picture_is_what_the_cascade_does(pipe, drawn, tmp_path):
    files = [images.save_png(tmp_path / f"{i}.png", x) for i, x in enumerate(drawn[0][:3])]
    pictures = [images.read_image(file) for file in files]
    big = pipe.upscale(pictures, PROMPTS[0], batch_size=8, progress=False)
    np.testing.assert_array_equal(big, drawn[1][:3])


@pytest.mark.parametrize(
    "change",
    [
        {"guidance": 4.0},
        {"guidance": (2.0, 1.0)},
        {"negative_prompt": "moon"},
        {"steps": (3, 2)},
        {"aug_level": 0.6},
        {"spacing": "uniform_logsnr"},
    ],
)
def test_each_setting_changes_the_picture(pipe, drawn, change):
    other = pipe(PROMPTS[0], 3, batch_size=8, return_stages=True, progress=False, **change)
    assert spread(other[1], drawn[1][:3]) > 1
    same_base = "aug_level" in change or change in ({"guidance": (2.0, 1.0)}, {"steps": (3, 2)})
    assert (spread(other[0], drawn[0][:3]) == 0) == same_base


def test_a_sampler_is_a_name_or_a_section(base):
    same, noisier, ddim = (
        base("moon", sampler=sampler, progress=False)
        for sampler in (
            {"name": "ancestral", "gamma": 0.3},
            {"name": "ancestral", "gamma": 1.0},
            "ddim",
        )
    )
    assert spread(same, base("moon", progress=False)) == 0
    assert spread(same, noisier) > 1 and spread(same, ddim) > 1


def test_one_program_serves_prompts_seeds_weights_and_levels(pipe):
    def programs():
        return [stage.draw._cache_size() for stage in pipe.stages]

    def draw(*args, **options):
        pipe(*args, batch_size=8, progress=False, **options)

    draw("moon", 3)
    once = programs()
    draw(["", "moon", "a very long prompt of many words"], 1, 5, guidance=7.5)
    draw("moon", 2, guidance=(0, 3), negative_prompt="sun", aug_level=0.9)
    draw("moon", 9)
    assert programs() == once


def test_not_square(pipe, caplog):
    small, big = pipe("moon", size=(8, 24), return_stages=True, progress=False)
    assert small.shape == (1, 8, 24, 3) and big.shape == (1, 16, 48, 3)
    assert spread(pipe.upscale(small, "moon", progress=False), big) <= 1
    photo = Image.effect_noise((99, 33), 80).convert("RGB")
    assert pipe.upscale(photo, progress=False).shape == (1, 16, 48, 3)
    assert "shrunk" in caplog.text


# ------------------------------------------------------------------------------------- the text


@pytest.mark.parametrize("prompt", ["", " \n"])
def test_an_empty_prompt_is_the_null_condition_and_said_so(base, prompt, caplog):
    with caplog.at_level(logging.WARNING):
        empty = base(prompt, guidance=1.0, progress=False)
    assert "unconditional" in caplog.text
    # Guidance 0 looks at the null condition alone.
    null = base("moon", guidance=0.0, progress=False)
    assert spread(empty, null) <= 1


def test_a_long_prompt_is_cut_and_said_so(base, caplog):
    with caplog.at_level(logging.WARNING):
        long = base("moon " * 20_000, progress=False)
    assert "cut off" in caplog.text
    assert spread(long, base("moon moon moon moon", progress=False)) == 0


def test_an_empty_negative_prompt_goes_without_saying(base, caplog):
    base("moon", negative_prompt="", progress=False)
    assert not caplog.text


def test_between_two_prompts_are_pictures_from_one_to_the_other(base):
    path = [cascade.Between("two blue birds", "moon", fraction) for fraction in (0, 0.5, 1)]
    first, middle, last = (base(prompt, progress=False) for prompt in path)
    np.testing.assert_array_equal(first, base("two blue birds", progress=False))
    np.testing.assert_array_equal(last, base("moon", progress=False))
    assert spread(middle, first) > 1 and spread(middle, last) > 1
    beside = base([path[1], "moon", path[0]], progress=False)
    np.testing.assert_array_equal(beside[:1], middle)
    np.testing.assert_array_equal(beside[1:2], base("moon", first_index=1, progress=False))


def test_with_the_real_text_encoder(tmp_path, caplog):
    from cascade.text.encoders import minilm

    section = {"name": "minilm", "max_length": 8, "weights": ""}
    stage = trained(stage_config(8, 0, text_width=384, text_length=8))
    whole = Cascade([stage], section, minilm(max_length=8, weights=""))
    loaded = cascade.load(whole.save(tmp_path / "b"))
    apple, empty, _ = loaded(["a red apple", "", "word " * 1000], progress=False)
    assert spread(apple, empty) > 20
    assert "unconditional" in caplog.text and "cut off" in caplog.text
    with pytest.raises(UserError, match="surrogate"):
        loaded("\ud800", progress=False)


# ------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": 3}, "prompt"),
        ({"prompt": ["a", None]}, "prompt"),
        ({"prompt": "a\ud800"}, "surrogate"),
        ({"num_images": 0}, "num_images"),
        ({"num_images": 1.5}, "num_images"),
        ({"num_images": 10**20}, "num_images"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**32}, "seed"),
        ({"seed": "x"}, "seed"),
        ({"first_index": -1}, "first_index"),
        ({"batch_size": 0}, "batch_size"),
        ({"steps": 0}, "[Ss]teps"),
        ({"steps": (3, -1)}, "[Ss]teps"),
        ({"steps": 2.5}, "steps"),
        ({"steps": (3, 3, 3)}, "3 values.*2 stages"),
        ({"steps": "3"}, "steps"),
        ({"steps": 10**30}, "steps.*100000"),
        ({"steps": np.array([2.5, 1.0])}, "steps"),
        ({"steps": np.True_}, "steps"),
        ({"guidance": 10**400}, "guidance.*10000"),
        ({"guidance": -1e5}, "guidance.*10000"),
        ({"guidance": np.array([np.nan, 1])}, "guidance"),
        ({"sampler": [1]}, "sampler"),
        ({"guidance": float("nan")}, "guidance"),
        ({"guidance": (1.0, float("inf"))}, "guidance"),
        ({"guidance": ()}, "0 values"),
        ({"aug_level": 1.1}, "aug_level"),
        ({"aug_level": -0.1}, "aug_level"),
        ({"aug_level": float("nan")}, "aug_level"),
        ({"sampler": "dim"}, "ddim"),
        ({"spacing": "karas"}, "karras"),
        ({"spacing": "leading"}, "train_steps"),
        ({"spacing": {"name": "given", "levels": (0.0, 1.0)}}, "for 1 steps"),
        ({"sampler": {"name": "ddim", "eta": 1.0}}, "eta"),
        ({"size": 8}, "size"),
        ({"size": (8,)}, "size"),
        ({"size": (8, 0)}, "size"),
        ({"size": (8, 9)}, "multiples of 2"),
        ({"size": (8, 8194)}, "at most 8192"),
        ({"negative_prompt": None}, "negative prompt"),
        ({"negative_prompt": ["a", "b"]}, "negative prompt"),
        ({"negative_prompt": "\ud800"}, "The negative prompt.*surrogate"),
    ],
)
def test_bad_arguments_are_said_in_a_sentence(pipe, arguments, message):
    with pytest.raises(UserError, match=message) as error:
        pipe(**{"prompt": "moon", "progress": False, **arguments})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stage": 0}, "Stage 0 can't"),
        ({"stage": 2}, "Stage 2 can't"),
        ({"stage": -1}, "stage"),
        ({"prompt": ["a", "b"]}, "2 prompts"),
        ({"images": []}, "picture"),
        ({"seed": -1}, "seed"),
        ({"batch_size": 0}, "batch_size"),
        ({"steps": (1, 2)}, "steps has 2 values.*give one value"),
    ],
)
def test_bad_arguments_of_upscale(pipe, arguments, message):
    with pytest.raises(UserError, match=message):
        pipe.upscale(**{"images": np.zeros((8, 8, 3), np.uint8), "progress": False, **arguments})


def test_numpy_values_and_one_value_for_the_stage_that_enlarges(pipe):
    assert pipe.settings(np.int64(2), np.float32(2)) == pipe.settings(2, 2.0)
    assert (
        pipe.settings(np.array([1, 2])) == pipe.settings((1, 2)) == pipe.settings([np.int8(1), 2])
    )
    assert pipe.settings((2,), stage=1) == pipe.settings(2)[1:]


def test_a_cascade_draws_in_tiles(pipe):
    """Of 16×16, the second stage's 8×8 tiles change the picture; the base fits into one."""
    drawing = {"steps": 1, "return_stages": True, "progress": False}
    base, whole = pipe("moon", **drawing)
    again, tiled = pipe("moon", tile=8, tile_overlap=4, **drawing)
    np.testing.assert_array_equal(again, base)
    assert tiled.shape == whole.shape and not np.array_equal(tiled, whole)
    enlarged = pipe.upscale(base, "moon", steps=1, tile=8, tile_overlap=4, progress=False)
    np.testing.assert_array_equal(enlarged, tiled)


def test_stages_that_do_not_fit_or_were_not_trained(stages):
    base, doubling = stages
    for stages, message in [
        ([base._replace(trained_steps=0), doubling], "untrained"),
        ([doubling, base], "lowres_resolution"),
        ([], "at least one"),
    ]:
        with pytest.raises(UserError, match=message):
            Cascade(stages, TEXT, WordEncoder())


def test_a_stage_alone_that_enlarges_does_just_that(pipe, stages):
    alone = Cascade(stages[1:], TEXT, WordEncoder())
    picture = np.zeros((8, 8, 3), np.uint8)
    enlarged = alone.upscale(picture, "moon", stage=0, steps=1, progress=False)
    assert enlarged.shape == (1, 16, 16, 3)
    with pytest.raises(UserError, match=r"no base stage.*cascade upscale --stage 0"):
        alone("moon", progress=False)


def test_a_diverged_stage_is_not_drawn_as_static(stages):
    broken = stages[0]._replace(params=jax.tree.map(lambda p: p * np.nan, stages[0].params))
    with pytest.raises(UserError, match="NaN"):
        Cascade([broken], TEXT, WordEncoder())("moon", progress=False)


def test_importing_cascade_does_not_import_jax():
    code = "import sys, cascade; assert 'jax' not in sys.modules; cascade.load"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError):
        cascade.lod  # noqa: B018


# ------------------------------------------------------------------------------------- the jobs


@pytest.fixture
def loadable(pipe, monkeypatch):
    """Lets the jobs load the tiny cascade by any name."""
    monkeypatch.setattr(sample, "load", lambda folder, **_: pipe)
    return pipe


def test_the_sample_job_writes_pictures_that_tell_how_they_were_made(loadable, drawn, tmp_path):
    *pictures, sheet = sample.sample_to_folder(
        "b",
        PROMPTS[:1],
        tmp_path / "new" / "out",
        num_images=3,
        guidance=(2, 2),
        negative_prompt=" ",
        size="8x8",
        progress=False,
    )
    assert len(pictures) == 3 and sheet.exists()
    for i, path in enumerate(pictures):
        assert spread(images.read_image(path), drawn[1][i]) <= 1
        texts = images.read_metadata(path)
        assert (texts["prompt"], texts["seed"], texts["index"]) == (PROMPTS[0], "0", str(i))
        settings = json.loads(texts["settings"])
        assert [stage["steps"] for stage in settings["stages"]] == [3, 3]
        assert (settings["negative_prompt"], settings["size"]) == (" ", [8, 8])


def test_one_picture_of_many_is_drawn_again(loadable, drawn, tmp_path):
    (path,) = sample.sample_to_folder("b", PROMPTS[1:], tmp_path, first_index=6, progress=False)
    assert re.fullmatch(r"two-blue-birds-0-6-[0-9a-f]{6}\.png", path.name)
    assert images.read_metadata(path)["index"] == "6"
    assert spread(images.read_image(path), drawn[1][6]) <= 1


def test_pictures_are_on_the_disk_before_the_next_batch(loadable, tmp_path, monkeypatch):
    draw = loadable.draw_batches

    def interrupted(*args, **options):
        yield next(draw(*args, **options))
        assert len(list(tmp_path.glob("moon-0-?-*.png"))) == 8
        raise KeyboardInterrupt

    monkeypatch.setattr(loadable, "draw_batches", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sample.sample_to_folder("b", ["moon"], tmp_path, num_images=9, batch_size=8, progress=False)


def test_the_upscale_job(loadable, drawn, tmp_path):
    small = images.save_png(tmp_path / "small.png", drawn[0][0])
    big = sample.upscale_to_file(
        "b", small, tmp_path / "big.png", prompt=PROMPTS[0], progress=False
    )
    assert spread(images.read_image(big), drawn[1][0]) <= 1
    assert images.read_metadata(big)["prompt"] == PROMPTS[0]


def test_only_the_very_same_request_replaces_a_file(loadable, tmp_path, monkeypatch):
    blank = jnp.zeros((1, 16, 16, 3), np.uint8)
    monkeypatch.setattr(
        loadable,
        "draw_batches",
        lambda prompts, *_, **__: (Batch(i, 1, [blank]) for i in range(len(prompts))),
    )
    long = "moon " * 20
    requests = [
        {"prompts": ["a cat!", "moon"]},
        {"prompts": ["A cat?", "sun"]},
        {"prompts": [long + "a", long + "b"]},
        *({"prompts": ["moon"], change: 2} for change in ("guidance", "steps", "seed")),
        {"prompts": ["moon"], "sampler": "heun"},
        {"prompts": ["moon"], "size": "8x16"},
        {"prompts": ["moon"], "negative_prompt": "sun"},
        {"prompts": ["moon"], "folder": "c"},
    ]
    runs = [
        [p.name for r in requests for p in sample.sample_to_folder(**{"folder": "b", **r, **there})]
        for there in [{"out": tmp_path}] * 2
    ]
    assert runs[0] == runs[1] and len(set(runs[0])) == len(runs[0]) == 16
    assert len(list(tmp_path.iterdir())) == 16


def no_drawing(*_):
    pytest.fail("drew")


def test_an_output_that_cannot_be_written_stops_before_sampling(loadable, tmp_path, monkeypatch):
    monkeypatch.setattr("cascade.batches._draw", no_drawing)
    small = images.save_png(tmp_path / "small.png", np.zeros((8, 8, 3), np.uint8))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file, not a folder"):
        sample.sample_to_folder("b", ["moon"], tmp_path / "file" / "out")
    with pytest.raises(UserError, match="is a file, not a folder"):
        sample.upscale_to_file("b", small, tmp_path / "file" / "big.png")
    for out in (tmp_path, "", tmp_path / "big.jpg"):
        with pytest.raises(UserError, match="PNG"):
            sample.upscale_to_file("b", small, out)


def test_a_folder_in_a_pictures_place_stops_before_sampling(loadable, tmp_path, monkeypatch):
    (path,) = sample.sample_to_folder("b", ["moon"], tmp_path, progress=False)
    path.unlink()
    path.mkdir()
    monkeypatch.setattr("cascade.batches._draw", no_drawing)
    with pytest.raises(UserError, match="is a folder"):
        sample.sample_to_folder("b", ["moon"], tmp_path, progress=False)


def test_bad_arguments_leave_no_folder(loadable, tmp_path):
    small = images.save_png(tmp_path / "small.png", np.zeros((8, 8, 3), np.uint8))
    out = tmp_path / "out"
    for bad in ({"seed": -1}, {"negative_prompt": "\ud800"}, {"steps": 0}):
        with pytest.raises(UserError):
            sample.sample_to_folder("b", ["moon"], out, **bad)
        with pytest.raises(UserError):
            sample.upscale_to_file("b", small, out / "big.png", **bad)
    assert not out.exists()


def test_the_bar_is_closed_before_an_error_is_said(loadable, tmp_path, monkeypatch, capsys):
    def full_disk(*_):
        raise UserError("full")

    monkeypatch.setattr(sample, "save_png", full_disk)
    with pytest.raises(UserError) as error:
        sample.sample_to_folder("b", ["moon"], tmp_path, num_images=2)
    assert error and capsys.readouterr().err.endswith("\n")


@pytest.mark.parametrize("size", ["8", "8x", "axb", "-8x8", "8x8x8", "", "٨x٨"])
def test_a_size_that_cannot_be_read(loadable, tmp_path, size):
    with pytest.raises(UserError, match="HEIGHTxWIDTH"):
        sample.sample_to_folder("b", ["moon"], tmp_path, size=size)


def test_the_command_line_ends_with_a_sentence_and_code_2(tmp_path):
    from cascade.cli import main

    arguments = ["sample", "--bundle", str(tmp_path), "--prompt", "moon", "--out", str(tmp_path)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert "isn't a bundle" in result.output and "Traceback" not in result.output

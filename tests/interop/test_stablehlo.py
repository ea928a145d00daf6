"""Exported programs draw the pipeline's pictures where this package isn't imported."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax import export
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import stablehlo
from PIL import Image
from safetensors.numpy import load_file
from tiny_cascade import TEXT, WordEncoder, stage_config, trained

from cascade.diffusion import guidance
from cascade.errors import UserError
from cascade.interop.stablehlo import PLATFORMS, export_stablehlo
from cascade.pipeline import Cascade
from cascade.shards import named
from cascade.stage import Stage

EXAMPLE = Path(__file__).parents[2] / "examples" / "call_stablehlo.py"
PROMPTS = ["a red apple", "moon"]


@pytest.fixture(scope="module")
def exported(bundle, tmp_path_factory):
    out = tmp_path_factory.mktemp("exports") / "tiny"
    return export_stablehlo(bundle, out, prompts=PROMPTS, steps=(3, 2), progress=False)


def manifest_of(folder: Path) -> dict:
    return json.loads((folder / "stablehlo.json").read_text())


def program(folder: Path, stage: int, name: str) -> export.Exported:
    (entry,) = (each for each in manifest_of(folder)["stages"] if each["stage"] == stage)
    file = entry["programs"][name]["jax_export"]["name"]
    return export.deserialize(bytearray((folder / file).read_bytes()))


ALONE = """
import runpy, sys
folder, example = sys.argv[1:]
for batch in ("1", "3"):
    sys.argv[1:] = [folder, "--prompt", "1", "--seed", "5", "--num", batch, "--out", batch]
    runpy.run_path(example, run_name="__main__")
assert not [name for name in sys.modules if name.partition(".")[0] == "cascade"]
"""


def test_a_process_without_this_package_draws_the_same_pictures(exported, stages, tmp_path):
    """Both stages, for two batch sizes, from the one file of each."""
    command = [sys.executable, "-c", ALONE, str(exported), str(EXAMPLE)]
    quick = {"XLA_FLAGS": "--xla_backend_optimization_level=0"}  # half the time to compile
    subprocess.run(command, check=True, cwd=tmp_path, env={**os.environ, **quick})
    pipe = Cascade(stages, TEXT, WordEncoder())
    # A picture doesn't depend on its batch, but for rounding.
    wanted = pipe("moon", 3, seed=5, steps=(3, 2), batch_size=3, progress=False)
    for batch in (1, 3):
        drawn = [np.asarray(Image.open(tmp_path / f"{batch}/5-{i}.png")) for i in range(batch)]
        assert np.abs(np.stack(drawn).astype(int) - wanted[:batch]).max() <= 1  # of 255
    assert wanted.std() > 10


def test_the_example_says_what_it_lacks(exported, tmp_path, monkeypatch):
    copy = shutil.copytree(exported, tmp_path / "copy")
    (copy / "text.safetensors").write_bytes(b"damaged")
    for folder, prompt, said in [(exported, "2", "--prompt"), (copy, "0", "damaged")]:
        monkeypatch.setattr(sys, "argv", ["example", str(folder), "--prompt", prompt])
        with pytest.raises(SystemExit, match=said):
            runpy.run_path(str(EXAMPLE), run_name="__main__")


def example_arguments(rows: list[dict], rng, batch: int) -> dict[str, np.ndarray]:
    """An array for each argument that a manifest lists, in its shape and dtype."""
    arrays = {}
    for row in rows:
        shape = [batch if side == "b" else side for side in row["shape"]]
        if row["dtype"] == "float32":
            arrays[row["name"]] = np.asarray(rng.normal(size=shape), np.float32)
        else:  # masks with holes in them, and keys
            arrays[row["name"]] = rng.integers(0, 2, shape).astype(row["dtype"])
    return arrays


def called_with(arrays: dict[str, np.ndarray]) -> list:
    """Arguments of a program, in order, from `example_arguments`: "cond/…" become one dict."""
    arguments = {}
    for name, value in arrays.items():
        argument, _, key = name.partition("/")
        if key:
            arguments.setdefault(argument, {})[key] = value
        else:
            arguments[argument] = value
    return list(arguments.values())


@pytest.mark.parametrize("index", [0, 1])
def test_the_denoiser_is_the_conditional_network_turned_to_x_hat(exported, stages, index):
    stage, params, _ = stages[index]
    entry = manifest_of(exported)["stages"][index]
    rows = entry["programs"]["denoise"]["arguments"]
    arrays = example_arguments(rows, np.random.default_rng(0), 2)
    cond = {name[5:]: value for name, value in arrays.items() if name.startswith("cond/")}
    weights = load_file(exported / f"stage{index}.safetensors")
    called = program(exported, index, "denoise").call(
        weights, arrays["z_t"], arrays["logsnr"], cond
    )
    denoise = guidance.denoiser(
        lambda z, logsnr, cond: stage.network.apply({"params": params}, z, logsnr, cond),
        stage.config.output,
    )
    wanted = jax.jit(denoise)(arrays["z_t"], arrays["logsnr"], cond).x
    np.testing.assert_allclose(called["x_hat"], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["denoise", "sample"])
@pytest.mark.parametrize("index", [0, 1])
def test_the_manifest_lists_arguments_as_the_files_take_them(exported, stages, index, name):
    """Weights in the order of their names, then the rows of the manifest, in both files."""
    entry = manifest_of(exported)["stages"][index]["programs"][name]
    loaded = program(exported, index, name)
    weights = [(leaf.shape, leaf.dtype) for _, leaf in sorted(named(stages[index].params))]
    rows = [(tuple(row["shape"]), row["dtype"]) for row in entry["arguments"]]
    taken = [
        (tuple(side if isinstance(side, int) else str(side) for side in aval.shape), aval.dtype)
        for aval in loaded.in_avals
    ]
    assert taken == [*weights, *rows]
    assert tuple(loaded.platforms) == PLATFORMS == ("cpu", "cuda", "tpu")
    data = (exported / entry["portable"]["name"]).read_bytes()
    with ir.Context() as context:
        module = stablehlo.deserialize_portable_artifact(context, data)
        main = next(op for op in module.body if op.name.value == "main")
        types = [str(kind) for kind in main.type.inputs]
    assert types[0] == "tensor<i32>" and len(types) == 1 + len(taken)
    assert [kind.count("?") for kind in types[1:]] == [shape.count("b") for shape, _ in taken]


def loads(monkeypatch, *stages):
    """Lets an export find these stages in whatever folder it is given."""
    loaded = type("Loaded", (), {"stages": stages, "text_encoder": WordEncoder()})
    monkeypatch.setattr("cascade.interop.stablehlo.load_bundle", lambda folder, **_: loaded)


def test_a_guided_student_draws_by_every_weight_that_it_learnt(monkeypatch, tmp_path):
    """As the pipeline does, one program for all; in other steps than its own it isn't exported."""
    config = stage_config(8, 0, distilled={"steps": 2, "guidance": (1.0, 6.0)})
    config.network.embed_guidance = True
    config.sampling.sampler, config.sampling.steps = {"name": "ddim"}, 2
    student = trained(config)
    loads(monkeypatch, student)
    with pytest.raises(UserError, match="distilled to draw in 2 steps and is asked for 3"):
        export_stablehlo("student", tmp_path / "out", steps=3, progress=False)
    out = export_stablehlo("student", tmp_path / "out", prompts=PROMPTS, progress=False)
    (entry,) = manifest_of(out)["stages"]
    (row,) = (
        each
        for each in entry["programs"]["sample"]["arguments"]
        if each["name"] == "guidance_weight"
    )
    assert row["shape"] == [] and "from 1 to 6" in row["meaning"]
    text, weights = (load_file(out / f"{name}.safetensors") for name in ("text", "stage0"))
    cond = {key: text[key][1:] for key in ("text_emb", "text_mask")}
    null_cond = {f"text_{key}": text[f"null_{key}"][None] for key in ("emb", "mask")}
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(5), 0), 0)
    draw = jax.jit(program(out, 0, "sample").call)
    pipe, drawn = Cascade((student,), TEXT, WordEncoder()), []
    for weight in (1.0, 4.5):
        keys, told = jax.random.key_data(key)[None], np.float32(weight)
        x = np.asarray(draw(weights, cond, null_cond, keys, told)["x"])
        drawn.append(np.rint(127.5 * (x + 1)).astype(int))
        wanted = pipe("moon", seed=5, guidance=weight, progress=False)
        assert np.abs(drawn[-1] - wanted).max() <= 1  # of 255
    assert np.abs(drawn[0] - drawn[1]).max() > 1 and draw._cache_size() == 1


@pytest.mark.parametrize(
    ("lowres", "changes"),
    [
        (0, {"output": "eps", "learned_variance": True}),
        (8, {"output": "eps", "learned_variance": True, "lowres_upsampling": "before_noise"}),
    ],
)
def test_what_deepfloyd_needs_is_drawn_for_any_batch(monkeypatch, tmp_path, lowres, changes):
    """Learned variance, discrete schedules, enlarging before noise; cuDNN's attention, tiles."""
    discrete = {"name": "discrete", "betas": "squaredcos_cap_v2", "train_steps": 1000}
    config = stage_config(16, lowres, schedule=discrete, aug_schedule=discrete, **changes)
    config.network.noise_embedding = "squaredcos_cap_v2"
    config.sampling.tile, config.sampling.tile_overlap = 8, 2
    config.sampling.spacing = {"name": "trailing", "train_steps": 1000}
    network = trained(config)
    plain = Stage(config.copy_and_resolve_references())
    network.stage.config.network.attention_implementation = "cudnn"  # as on the GPU it came from
    below = [] if lowres == 0 else [trained(stage_config(8, 0))]
    loads(monkeypatch, *below, network)
    last = len(below)
    out = export_stablehlo("bundle", tmp_path / "out", stages=[last], progress=False)
    (entry,) = manifest_of(out)["stages"]
    assert entry["stage"] == last
    rows = entry["programs"]["denoise"]["arguments"]
    shapes = {row["name"]: row["shape"] for row in rows}
    assert shapes.get("cond/lowres", ["b", 16, 16, 3]) == ["b", 16, 16, 3]
    assert [row["name"] for row in entry["programs"]["denoise"]["results"]] == ["fraction", "x_hat"]
    rows = entry["programs"]["sample"]["arguments"]
    arrays = example_arguments(rows, np.random.default_rng(1), 2)
    arrays["guidance_weight"] = np.float32(2.0)
    if lowres:
        arrays["aug_level"] = np.float32(0.3)
    cond, null_cond, keys, *scalars = called_with(arrays)
    weights = load_file(out / f"stage{last}.safetensors")
    drawn = program(out, last, "sample").call(weights, cond, null_cond, keys, *scalars)["x"]
    keys = jax.random.wrap_key_data(keys, impl="threefry2x32")
    settings, size = plain.settings(), (16, 16)
    wanted = plain.draw(network.params, cond, null_cond, keys, settings, size, *scalars)
    np.testing.assert_allclose(drawn, wanted, atol=1e-4)
    assert np.std(wanted) > 0.05


def test_text_is_the_encoders(exported):
    text = load_file(exported / "text.safetensors")
    emb, mask = WordEncoder().encode(PROMPTS)
    null_emb, null_mask = WordEncoder().null()
    for name, wanted in {
        "text_emb": emb,
        "text_mask": mask,
        "null_emb": null_emb,
        "null_mask": null_mask,
    }.items():
        np.testing.assert_array_equal(text[name], wanted)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stages": [2]}, "stage is 2"),
        ({"stages": [-1]}, "stage is -1"),
        ({"steps": 0}, "steps"),
        ({"steps": (1, 2, 3)}, "3 values"),
        ({"sampler": "euler"}, "euler"),
        ({"size": (9, 8)}, "multiples of 2"),
        ({"prompts": [" "]}, "blank"),
    ],
)
def test_bad_arguments_leave_nothing(bundle, tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        export_stablehlo(bundle, tmp_path / "out", progress=False, **arguments)
    assert not list(tmp_path.iterdir())


def test_a_failure_halfway_leaves_what_was_there(bundle, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "stablehlo.json").write_text("old")
    with pytest.raises(UserError, match="overwrite"):
        export_stablehlo(bundle, out, progress=False)

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cascade.interop.stablehlo.write_manifest", full_disk)
    with pytest.raises(UserError, match="No space left"):
        export_stablehlo(bundle, out, stages=[0], overwrite=True, progress=False)
    assert (out / "stablehlo.json").read_text() == "old"
    assert list(tmp_path.iterdir()) == [out]

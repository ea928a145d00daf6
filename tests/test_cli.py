"""Whatever a user types wrong: one clear sentence on stderr, exit code 2, nothing half-written."""

import json
import os
import signal
import subprocess
import sys

import pytest
from click.testing import CliRunner
from one_level import flags
from PIL import Image
from processes import QUICK
from tiny_cascade import stage_config, trained

from cascade.bundle import save_bundle
from cascade.cli import main
from cascade.images import read_metadata
from cascade.text.encoders import ENCODERS

TEXT = {"name": "minilm", "max_length": 8, "weights": ""}
SMOKE = "configs/emoji/base64.py:smoke"


def run(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def sentence(*arguments) -> str:
    """What a failing command says, after checking that it fails as promised."""
    result = run(*arguments)
    assert result.exit_code == 2, (result.exit_code, result.output, result.exception)
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in result.output
    return lines[0]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """A tiny two-stage bundle with the real text encoder."""
    folder = tmp_path_factory.mktemp("bundles") / "tiny"
    shape = {"text_width": 384, "text_length": 8}
    stages = [trained(stage_config(8, 0, **shape)), trained(stage_config(16, 8, **shape))]
    encoder = ENCODERS["minilm"](max_length=8, weights="")
    return save_bundle(folder, stages, TEXT, encoder)


COMMANDS = [
    "", "demo", "data", "data build", "data cifar10", "embed", "train", "describe", "bundle",
    "distill", "sample", "upscale", "evaluate", "reproduce", "import", "import deepfloyd", "export",
    "plan", "tune-steps",
]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_and_leaves_have_an_example(command):
    result = run(*command.split(), "--help")
    assert result.exit_code == 0
    assert command in ("", "data", "import") or "Example: cascade" in result.output


@pytest.mark.parametrize("group", ["", "data", "import"])
def test_what_commands_do_is_said_whole_in_80_columns(group):
    said = CliRunner().invoke(main, [*group.split(), "--help"], terminal_width=80).stdout
    assert "..." not in said.partition("Commands:")[2]


def test_help_imports_no_jax():
    code = (
        "import sys; from cascade.cli import main\n"
        "try: main(['train', '--help'])\n"
        "except SystemExit: pass\n"
        "assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_without_a_tpu_nobody_complains_of_it():
    pytest.importorskip("libtpu")
    code = "from cascade.cli import main; main(['data', '--help']); import jax; jax.devices()"
    names = ("JAX_PLATFORMS", "TPU_ACCELERATOR_TYPE", "TPU_WORKER_HOSTNAMES")
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True,
        env={key: value for key, value in os.environ.items() if key not in names},
    )  # fmt: skip
    assert "TPU" not in done.stderr and "Trace" not in done.stderr, done.stderr


def test_sample_writes_pictures_with_their_settings(bundle, tmp_path):
    result = run("sample", "--bundle", bundle, "--prompt", "a red apple", "--num", 2,
                 "--steps", "2,1", "--seed", 5, "--out", tmp_path / "out")  # fmt: skip
    assert result.exit_code == 0, result.output
    pictures = sorted((tmp_path / "out").glob("a-red-apple*.png"))
    assert len(pictures) == 2
    assert Image.open(pictures[0]).size == (16, 16)
    metadata = read_metadata(pictures[0])
    assert metadata["prompt"] == "a red apple" and metadata["seed"] == "5"


def test_upscale_writes_a_picture(bundle, tmp_path):
    Image.new("RGB", (20, 20), "red").save(tmp_path / "small.png")
    result = run("upscale", "--bundle", bundle, "--image", tmp_path / "small.png",
                 "--prompt", "red", "--out", tmp_path / "big.png",
                 "--tile", 8, "--tile-overlap", 4)  # fmt: skip
    assert result.exit_code == 0, result.output
    assert Image.open(tmp_path / "big.png").size == (16, 16)
    (drawn_with,) = json.loads(read_metadata(tmp_path / "big.png")["settings"])["stages"]
    assert (drawn_with["tile"], drawn_with["tile_overlap"]) == (8, 4)


def test_describe_prints_a_table():
    result = run("describe", "--config", SMOKE)
    assert result.exit_code == 0
    assert "down_0" in result.output and "GFLOP" in result.output


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--steps", "0"], "steps"),
        (["--steps", "-3,2"], "steps"),
        (["--steps", "1,2,3"], "3 values"),
        (["--guidance", "nan"], "guidance"),
        (["--guidance", "inf,1"], "guidance"),
        (["--aug-level", "2"], "aug_level"),
        (["--sampler", "euler"], "euler"),
        (["--spacing", "karas"], "karras"),
        (["--num", "0"], "num_images"),
        (["--batch-size", "0"], "batch_size"),
        (["--size", "9x8"], "multiples of 2"),
        (["--tile", "0,7"], "tile is 7"),
        (["--size", "large"], "size"),
        (["--seed", "-1"], "seed"),
        (["--prompt", "half a \ud83d smile"], "surrogate"),
        (["--out", ""], "it is empty"),
    ],
)
def test_bad_drawing_options(bundle, tmp_path, options, said):
    out = tmp_path / "out"
    common = ["sample", "--bundle", bundle, "--prompt", "x", "--out", out]
    assert said in sentence(*common, *options)
    assert not list(out.glob("*.png"))


def test_a_very_long_prompt_is_cut_and_said_so(bundle, tmp_path, caplog):
    result = run("sample", "--bundle", bundle, "--prompt", "apple " * 16_667, "--num", 1,
                 "--steps", 1, "--out", tmp_path)  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "cut" in caplog.text or "truncated" in caplog.text


def test_an_empty_prompt_is_unconditional_and_said_so(bundle, tmp_path, caplog):
    result = run("sample", "--bundle", bundle, "--prompt", "", "--num", 1, "--steps", 1,
                 "--out", tmp_path)  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "uncondition" in caplog.text


def test_an_output_folder_that_cant_be_written(bundle, tmp_path):
    (tmp_path / "file").write_text("in the way")
    out = tmp_path / "file" / "out"
    assert str(out.name) in sentence("sample", "--bundle", bundle, "--prompt", "x", "--out", out)


def test_a_truncated_bundle(bundle, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in bundle.rglob("*"):
        target = copy / path.relative_to(bundle)
        target.mkdir() if path.is_dir() else target.write_bytes(path.read_bytes())
    shard = next(copy.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:100])
    assert shard.name in sentence("sample", "--bundle", copy, "--prompt", "x", "--out", tmp_path)


@pytest.mark.parametrize("bundle_path", ["nowhere", "."])
def test_no_bundle(bundle_path, tmp_path):
    said = sentence(
        "sample", "--bundle", tmp_path / bundle_path, "--prompt", "x", "--out", tmp_path
    )
    assert str(tmp_path) in said


def test_no_picture_to_enlarge(bundle, tmp_path):
    assert "none.png" in sentence("upscale", "--bundle", bundle, "--image", tmp_path / "none.png")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("--config.train.stepz=3", "stepz"),
        ("--config.train.steps=many", "steps"),
        ("--config.train.batch_size=0", "batch_size"),
        ("--config.mesh.data=3", "mesh"),
        ("--config.stage.resolution=17", "17"),
    ],
)
def test_bad_training_settings(override, said, tmp_path):
    said_so = sentence("train", "--config", SMOKE, "--workdir", tmp_path / "run",
                       f"--config.text_cache.folder={tmp_path}/cache", override)  # fmt: skip
    assert said in said_so


CUSTOM = """
from cascade.configs.emoji import base64

def get_config(arg=""):
    config = base64.get_config("smoke")
    config.text_cache.folder = {cache!r}
    config.data.source = config.data.eval_source = {source!r}
    return config
"""


@pytest.mark.parametrize(
    ("files", "source", "said"),
    [
        ({}, {"name": "folder", "path": "{folder}"}, "no picture"),
        ({"a.txt": "a caption"}, {"name": "folder", "path": "{folder}"}, "no picture"),
        ({}, {"name": "tfds", "dataset": "imagenet", "data_dir": "{folder}", "split": "train",
              "image_key": "image", "caption_key": "captions", "template": "{{}}"}, "imagenet"),
        ({}, {"name": "array_record", "files": "{folder}/*.array_record", "image_key": "image",
              "caption_key": "captions"}, "array_record"),
    ],
)  # fmt: skip
def test_bad_data(files, source, said, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    source = {key: value.replace("{folder}", str(folder)) for key, value in source.items()}
    config = tmp_path / "custom.py"
    config.write_text(CUSTOM.format(cache=str(tmp_path / "cache"), source=source))
    assert said in sentence("train", "--config", config, "--workdir", tmp_path / "run")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--processes", "2"], "--coordinator HOST:PORT and --process I are missing"),
        (["--coordinator", "a:1", "--processes", "2", "--process", "2"], "Process 2 of 2 can't be"),
        (["--coordinator", "a", "--processes", "2", "--process", "1"], "should be HOST:PORT"),
    ],
)
@pytest.mark.parametrize("command", ["train", "embed"])
def test_bad_places_among_processes(command, options, said, tmp_path):
    place = ["--workdir", tmp_path / "run"] if command == "train" else ["--out", tmp_path / "out"]
    assert said in sentence(command, "--config", SMOKE, *place, *options)
    assert not list(tmp_path.iterdir())


def test_bundling_an_untrained_run(tmp_path):
    assert "train" in sentence("bundle", "--stages", tmp_path, "--out", tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_export_writes_each_kind_of_folder(bundle, tmp_path):
    for target, options, mark in [
        ("safetensors", ["--dtype", "bfloat16"], "stage1.safetensors"),
        ("stablehlo", ["--stage", 0, "--prompt", "a red apple"], "stage0-sample.stablehlo"),
    ]:
        out = tmp_path / target
        result = run("export", "--to", target, "--bundle", bundle, "--out", out, *options)
        assert result.exit_code == 0, result.output
        assert f"Wrote {out}" in result.output and (out / mark).is_file()


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [(signal.SIGTERM, 143, "Terminated."), (signal.SIGINT, 130, "Interrupted.")],
)
def test_an_export_that_is_stopped_leaves_nothing(
    bundle, tmp_path, monkeypatch, number, code, said
):
    def stopped(*arguments, **options):
        signal.raise_signal(number)

    monkeypatch.setattr("cascade.interop.weights.write_stage", stopped)
    before = signal.signal(signal.SIGTERM, lambda *_: pytest.fail("SIGTERM isn't handled"))
    # A suite that runs in the background was started with Ctrl-C ignored.
    keyboard = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        result = run("export", "--to", "safetensors", "--bundle", bundle, "--out", tmp_path / "x")
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, keyboard)
    assert result.exit_code == code and f"error: {said}" in result.stderr.splitlines()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--to", "onnx"], "onnx"),
        (["--to", "safetensors", "--steps", "3"], "--steps"),
        (["--to", "safetensors", "--prompt", "x"], "--prompt"),
        (["--to", "safetensors", "--text-weights", "x"], "--text-weights"),
        (["--to", "stablehlo", "--text-weights", "none.npz"], "none.npz"),
        (["--to", "stablehlo", "--tile", "7"], "tile is 7"),
        (["--to", "stablehlo", "--dtype", "bfloat16"], "--dtype"),
        (["--to", "diffusers", "--stage", "0"], "--stage"),
        (["--to", "stablehlo", "--size", "large"], "HEIGHTxWIDTH"),
        (["--to", "stablehlo", "--stage", "7"], "stage is 7"),
        (["--to", "stablehlo", "--prompt", " "], "blank"),
    ],
)
def test_bad_export_options(bundle, tmp_path, options, said):
    out = tmp_path / "out"
    assert said in sentence("export", *options, "--bundle", bundle, "--out", out)
    assert not out.exists()


@pytest.mark.parametrize("target", ["diffusers", "safetensors", "stablehlo"])
def test_exporting_what_is_no_bundle(target, tmp_path):
    folder, out = tmp_path / "folder", tmp_path / "out"
    folder.mkdir()
    said = sentence("export", "--to", target, "--bundle", folder, "--out", out)
    assert "isn't a bundle" in said and not out.exists()


def test_importing_what_is_no_folder(tmp_path):
    source, out = tmp_path / "none", tmp_path / "out"
    assert "none" in sentence("import", "deepfloyd", "--source", source, "--out", out)
    assert not out.exists()


def test_embedding_with_an_unknown_setting(tmp_path):
    override = "--config.text_cache.dtipe=int8"
    assert "dtipe" in sentence("embed", "--config", SMOKE, "--out", tmp_path / "out", override)
    assert not (tmp_path / "out").exists()


FULL_DISK = """
import resource, sys
from cascade.cli import main
# Files beyond this size fail to grow, as on a full disk; the checkpoint's arrays need more.
if sys.argv[1] != "none":
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
main(sys.argv[2:])
"""


def test_a_full_disk_keeps_the_previous_checkpoint(tmp_path):
    workdir = tmp_path / "run"

    def train(limit, steps):
        return subprocess.run(
            [sys.executable, "-c", FULL_DISK, str(limit), "train", "--config", SMOKE,
             "--workdir", str(workdir), *flags(
                 train__steps=steps, train__checkpoint_every=1, train__eval_every=99,
                 train__sample_every=99, text_cache__folder=tmp_path / "cache",
             )],
            capture_output=True, text=True, env={**os.environ, "XLA_FLAGS": QUICK}, check=False,
        )  # fmt: skip

    first = train("none", 1)
    assert first.returncode == 0, first.stderr
    full = train(100_000, 3)
    assert full.returncode == 2, full.stderr
    errors = [line for line in full.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "step 1 is good" in errors[0] and "Traceback" not in full.stderr
    again = train("none", 3)
    assert again.returncode == 0, again.stderr
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == sorted({r["step"] for r in rows})

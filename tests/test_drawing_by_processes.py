"""Two real processes draw, enlarge, evaluate and leave sheets as one process does."""

import itertools
import json

import numpy as np
import pytest
from one_level import flags
from processes import cluster, run_processes
from tiny_cascade import stage_config, trained

from cascade import config
from cascade.images import read_image, save_png
from cascade.pipeline import Cascade
from cascade.sample import sample_to_folder, upscale_to_file
from cascade.text.encoders import minilm
from cascade.training.train import train

FLOAT32 = 1e-5  # what the order of a sum over devices may change
PROMPTS = ["a red apple", "two blue birds"]

# Each process's part of the test; its last drawing can't be written by process 1.
TOGETHER = """
import sys
import jax
from cascade.cli import main
from cascade.parallel import processes, rules

processes.connect(saves_when_terminated=True)  # as training wants it, before the first job
rules.SMALLEST_SHARDED = 256  # so that tiny networks are sharded at all
process, folder, training = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
bundle = ["--bundle", f"{folder}/bundle", "--mesh", "data=2,fsdp=2"]
sample = ["sample", *bundle, "--prompt", "a red apple", "--prompt", "two blue birds", "--num", "3"]
main([*sample, "--out", f"{folder}/drawn"])
main(["upscale", *bundle, "--image", f"{folder}/small.png", "--out", f"{folder}/big.png"])
main(["train", "--workdir", f"{folder}/run", *training])
print("trained")
main([*sample, "--out", [f"{folder}/fine", f"{folder}/small.png/out"][process]])
"""


def training(folder, **changes):
    """Two steps; a held-out batch and a half, and a sheet, at the end."""
    settings = dict(
        text_cache__folder=folder / "cache",
        data__eval_source__records=11,
        data__eval_source__name="synthetic",
        train__steps=2,
        train__eval_every=2,
        train__eval_batches=2,
        train__sample_every=2,
        train__sample_count=3,
    )
    return flags(**{**settings, **changes})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A bundle of two stages, and a picture to enlarge."""
    folder = tmp_path_factory.mktemp("together")
    text = {"name": "minilm", "max_length": 8, "weights": ""}
    reads = {"text_width": 384, "text_length": 8}
    stages = [trained(stage_config(8, 0, **reads)), trained(stage_config(16, 8, **reads))]
    Cascade(stages, text, minilm(max_length=8, weights="")).save(folder / "bundle")
    save_png(folder / "small.png", np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8))
    return folder


def test_two_processes_do_what_one_does(folder):
    spec = ["--config", "configs/emoji/base64.py:smoke"]
    shared = training(folder, mesh__data=2, mesh__fsdp=2)
    commands = [["-c", TOGETHER, process, folder, *spec, *shared] for process in range(2)]
    codes, outputs = run_processes(commands, devices=2, environment=cluster(2), timeout=600)
    # What only one of them couldn't write stopped both, each with its own sentence.
    assert codes == [2, 2], [output.err[-3000:] for output in outputs]
    assert [output.out.count("trained\n") for output in outputs] == [1, 1], outputs
    assert "Process 1 failed" in outputs[0].err and "small.png' is a file" in outputs[1].err

    drawn = {path.name: read_image(path) for path in (folder / "drawn").glob("*.png")}
    files = sample_to_folder(
        folder / "bundle", PROMPTS, folder / "alone", num_images=3, progress=False
    )
    assert drawn.keys() == {path.name for path in files} and len(drawn) == 7
    for path in files:
        assert spread(drawn[path.name], read_image(path)) <= 1
    # Each process wrote its own, and said so; process 0 the sheet too.
    said = [[line for line in output.out.splitlines() if "drawn/" in line] for output in outputs]
    assert sorted(itertools.chain(*said)) == sorted(str(folder / "drawn" / n) for n in drawn)
    assert [len(lines) for lines in said] == [5, 2]

    big = upscale_to_file(folder / "bundle", folder / "small.png", folder / "1.png", progress=False)
    assert spread(read_image(folder / "big.png"), read_image(big)) <= 1

    train(config.load(spec[1], training(folder)), folder / "one", progress=False)
    ours, theirs = evaluated(folder / "run"), evaluated(folder / "one")
    assert ours.keys() == theirs.keys() and "eval_loss" in ours
    for name in ours:
        assert ours[name] == pytest.approx(theirs[name], rel=FLOAT32), name
    sheets = [read_image(folder / run / "samples" / "00000002.png") for run in ("run", "one")]
    assert spread(*sheets) <= 1 and np.asarray(sheets[0]).std() > 0


def spread(a, b):
    return np.abs(np.asarray(a, int) - np.asarray(b, int)).max()


def evaluated(run) -> dict[str, float]:
    """What a run logged of its held-out pictures."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (row,) = [row for row in rows if "eval_loss" in row]
    return {key: value for key, value in row.items() if key.startswith("eval_")}

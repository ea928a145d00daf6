"""The bundle that comes with the package: within its limits, and drawing what it's asked for."""

import json

import numpy as np
from click.testing import CliRunner

from cascade.bundle import SHIPPED
from cascade.cli import main
from cascade.data.emoji.builder import single_drawings
from cascade.evaluation.retrieval import nearest
from cascade.images import read_image

ASKED = ("a red apple", "a red heart", "a pizza")


def test_it_keeps_to_its_size():
    sizes = {path.name: path.stat().st_size for path in SHIPPED.rglob("*") if path.is_file()}
    assert max(sizes.values()) < 16_000_000 and sum(sizes.values()) <= 60_000_000
    stages = json.loads((SHIPPED / "cascade.json").read_text())["stages"]
    assert [stage["dtype"] for stage in stages] == ["bfloat16"] * 2
    assert [stage["config"]["resolution"] for stage in stages] == [64, 256]


def test_its_card_and_its_licences_lie_beside_it():
    card = (SHIPPED / "README.md").read_text(encoding="utf-8")
    for told in ("Data", "Training", "Evaluation", "Limits", "Bias", "Intended use", "Licences"):
        assert f"\n## {told}\n" in card
    assert "CC BY 4.0" in (SHIPPED / "NOTICE").read_text(encoding="utf-8")


def test_without_a_bundle_named_it_draws_what_is_asked_for(tmp_path):
    prompts = [part for prompt in ASKED for part in ("--prompt", prompt)]
    command = ["sample", *prompts, "--num", "1", "--out", str(tmp_path)]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    paths = result.stdout.splitlines()[: len(ASKED)]
    drawn = np.stack([read_image(path) for path in paths])
    assert drawn.shape == (len(ASKED), 256, 256, 3)
    known, names = single_drawings("small", 64)
    small = drawn.reshape(-1, 64, 4, 64, 4, 3).mean((2, 4))
    assert [names[i] for i in nearest(small, known)] == list(ASKED)

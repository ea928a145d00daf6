"""The report is one file: nothing in it is fetched, and no prompt can break out of it."""

import re

import numpy as np

from cascade.evaluation.report import Drawing, StageSummary, write_report


def written(tmp_path, prompt="a red apple"):
    picture = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    rows = [{"step": i, "loss": 1 / i} for i in range(1, 30)] + [{"step": 29, "eval_loss": 0.2}]
    write_report(
        tmp_path / "report.html",
        title="Test",
        introduction=["What this is."],
        command="cascade sample",
        known=[Drawing(prompt, [picture, picture], picture, True)],
        unseen=[Drawing("a blue apple", [picture, picture])],
        stages=[StageSummary("base", "8×8", rows, {"stage": {"resolution": 8}})],
        parts={"train": {"seconds": 125.0, "peak_gib": 1.25}},
        facts={"device": "a CPU"},
    )
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def test_it_is_self_contained(tmp_path):
    html = written(tmp_path)
    addresses = re.findall(r"(?:src|href)=\"([^\"]*)\"", html)
    assert len(addresses) == 6 and all(a.startswith("data:image/") for a in addresses)
    assert "2 min 5 s" in html and "stage.resolution" in html
    assert list(tmp_path.iterdir()) == [tmp_path / "report.html"]


def test_prompts_are_escaped(tmp_path):
    assert "<script>" not in written(tmp_path, prompt="<script>alert(1)</script>")

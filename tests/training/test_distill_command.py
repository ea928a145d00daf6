"""`cascade distill`, the command: each objective, its options changed from outside."""

import json

import numpy as np
import pytest
from click.testing import CliRunner
from tiny_distillation import tiny_distillation, write_config, write_teacher

import cascade
from cascade.cli import main
from cascade.training import metrics

PROGRESSIVE = {"name": "progressive", "backward": False}
CONSISTENCY = {
    "name": "consistency",
    "teacher_steps_start": 4,
    "teacher_steps_end": 8,
    "backward": False,
}


@pytest.mark.parametrize(
    ("objective", "backward"),
    [
        pytest.param(PROGRESSIVE, True, marks=pytest.mark.slow),
        (CONSISTENCY, True),
        pytest.param(CONSISTENCY, False, marks=pytest.mark.slow),
    ],
)
def test_a_student_draws(tmp_path, objective, backward):
    """Of its own pictures (`backward`) as asked for outside the file, or of the data's."""
    config = tiny_distillation(tmp_path, steps=(4, 2), updates=3)
    config.distill.objective = objective
    write_teacher(config)
    few = tmp_path / "few"
    arguments = ["--config", write_config(config, tmp_path / "few.py"), "--workdir", few]
    arguments += ["--config.distill.objective.backward=True"] * backward
    done = CliRunner().invoke(main, ["distill", *map(str, arguments)])
    assert done.exit_code == 0, done.output
    run = json.loads((few / "halvings" / "2" / "config.json").read_text())
    assert run["distill"]["objective"] == {**objective, "backward": backward}
    losses = [row["loss"] for row in metrics.read(few / "halvings" / "2" / "metrics.jsonl")]
    assert len(losses) == 3 and np.all(np.isfinite(losses)) and losses[0] > 0
    drawn = cascade.load(few / "students" / "2")("a moon", progress=False)
    assert drawn.shape == (1, 8, 8, 3) and drawn.std() > 1

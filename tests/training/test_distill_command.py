"""`cascade distill`, the command: either objective, its options changed from outside."""

import json

import numpy as np
import pytest
from click.testing import CliRunner
from tiny_distillation import tiny_distillation, write_config, write_teacher

import cascade
from cascade.cli import main
from cascade.training import metrics

PROGRESSIVE = {"name": "progressive", "backward": False}
CONSISTENCY = {"name": "consistency", "teacher_steps_start": 4, "teacher_steps_end": 8}


@pytest.mark.parametrize(
    "objective",
    [pytest.param(PROGRESSIVE, marks=pytest.mark.slow), CONSISTENCY | {"backward": False}],
)
def test_a_student_of_its_own_pictures_draws(tmp_path, objective):
    config = tiny_distillation(tmp_path, steps=(4, 2), updates=3)
    config.distill.objective = objective
    write_teacher(config)
    few = tmp_path / "few"
    arguments = ["--config", write_config(config, tmp_path / "few.py"), "--workdir", few]
    arguments += ["--config.distill.objective.backward=True"]
    done = CliRunner().invoke(main, ["distill", *map(str, arguments)])
    assert done.exit_code == 0, done.output
    run = json.loads((few / "halvings" / "2" / "config.json").read_text())
    assert run["distill"]["objective"] == {**objective, "backward": True}
    losses = [row["loss"] for row in metrics.read(few / "halvings" / "2" / "metrics.jsonl")]
    assert len(losses) == 3 and np.all(np.isfinite(losses)) and losses[0] > 0
    drawn = cascade.load(few / "students" / "2")("a moon", progress=False)
    assert drawn.shape == (1, 8, 8, 3) and drawn.std() > 1

"""`cascade distill`, the command: each objective, options changed from outside, two processes."""

import json

import numpy as np
import pytest
from click.testing import CliRunner
from processes import cluster, run_processes
from safetensors.numpy import load_file
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


@pytest.mark.slow
def test_two_processes_make_the_student_of_one(tmp_path):
    """But for what the order of a sum over processes changes."""
    config = tiny_distillation(tmp_path, steps=(4, 2), updates=4)
    write_teacher(config)
    file = write_config(config, tmp_path / "few.py")
    call = ["-c", "from cascade.cli import main; main()", "distill", "--config", file]
    found = []
    for count in (1, 2):
        workdir = tmp_path / f"by-{count}"
        place = cluster(count) if count > 1 else {}
        command = [*call, "--workdir", workdir]
        codes, outputs = run_processes([command] * count, environment=place, timeout=1800)
        assert codes == [0] * count, outputs
        (weights,) = (workdir / "students" / "2").glob("stage0*.safetensors")
        found.append((metrics.read(workdir / "halvings" / "2" / "metrics.jsonl"), weights))
    (ours, one), (theirs, two) = found
    assert len(ours) == len(theirs) == 4
    losses = ([row["loss"] for row in rows] for rows in (ours, theirs))
    np.testing.assert_allclose(*losses, rtol=1e-5)
    one, two = load_file(one), load_file(two)
    assert one.keys() == two.keys()
    for key, value in one.items():
        np.testing.assert_allclose(value, two[key], atol=1e-4, err_msg=key)

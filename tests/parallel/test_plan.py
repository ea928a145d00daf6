"""Plans: what a child compiles is checked against what is known; mistakes are sentences."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
from click.testing import CliRunner
from tiny_cascade import tiny_experiment

from cascade import config as configs
from cascade.cli import main
from cascade.errors import UserError
from cascade.parallel import plan
from cascade.parallel.ahead import needed_bytes
from cascade.parallel.estimate import MACHINE_CODE, estimate, report
from cascade.parallel.search import search, table
from cascade.parallel.topology import CHIPS

SMOKE = "configs/emoji/base64.py:smoke"


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Plans are kept below a temporary home, and nowhere else."""
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def tiny():
    return tiny_experiment()


def measured(**changes) -> plan.Measured:
    """A made-up answer: a tenth of a second of v5e's arithmetic, less of all else."""
    chip = CHIPS["v5e"]
    values = {
        "device_kind": "TPU v5 lite",
        "devices": 256,
        "device_bytes": None,
        "mesh": {"data": 8, "fsdp": 32, "tensor": 1},
        "parameters": 10**9,
        "model_flops": 0.075 * 256 * chip.flops,
        "flops": 0.1 * 256 * chip.flops,
        "ideal_bytes": 6e9,
        "peak_bytes": 14e9,
        "argument_bytes": 2e9,
        "temporary_bytes": 11e9,
        "result_bytes": 1e6,
        "code_bytes": 1e8,
        "donated_bytes": 2e9,
        "sent": {"all-gather": [8e9, 40], "between slices": [1e8, 3]},
        "traffic_bytes": 0.05 * chip.hbm_bandwidth,
        "compile_seconds": 60.0,
        "host_bytes": 4e9,
    }
    return plan.Measured(**(values | changes))


def test_this_machines_step_is_measured_and_kept(tiny, monkeypatch):
    found = plan.measure(tiny, "local", progress=False)
    assert (found.devices, found.mesh) == (8, {"data": 8, "fsdp": 1, "tensor": 1})
    leaves = jax.tree.leaves(jax.eval_shape(_stage(tiny).init, jax.random.key(0)))
    assert found.parameters == sum(leaf.size for leaf in leaves)
    # Parameters and their EMA are whole on each device, and their new values take their places.
    assert 8 * found.parameters <= found.donated_bytes <= found.argument_bytes
    # Gradients are float32 here, where the least counts two bytes each; metrics are a few more.
    assert found.sent["all-reduce"][0] == pytest.approx(2 * found.ideal_bytes, rel=0.02)
    assert found.flops == pytest.approx(found.model_flops, rel=0.2)
    assert found.traffic_bytes > found.argument_bytes
    assert found.host_bytes > 10**8

    monkeypatch.setattr(subprocess, "Popen", None)  # asked again, nothing is compiled
    assert plan.measure(tiny, "local", progress=False) == found
    tiny.data.workers += 1  # nor where the program stays the same
    assert plan.measure(tiny, "local", progress=False) == found
    tiny.train.batch_size = 8
    with pytest.raises(TypeError):
        plan.measure(tiny, "local", progress=False)


def _stage(config):
    from cascade.stage import Stage

    return Stage(config.stage)


def test_a_sampler_is_measured(tiny):
    found = plan.measure(tiny, "local", sample=True, progress=False)
    evaluations = tiny.stage.sampling.steps * 2 * tiny.train.batch_size  # guided: two each
    assert found.flops == evaluations * _stage(tiny).forward_flops
    assert found.donated_bytes == 0
    text = report(found, what="w", where="local", batch=16, steps=None, utilisation=0.4)
    assert "FLOPs a batch" in text and "days" not in text


def test_a_compiler_that_takes_too_much_is_stopped(tiny):
    with pytest.raises(UserError, match="--host-memory"):
        plan.measure(tiny, "local", host_limit=30e6, progress=False)


def test_a_child_that_breaks_is_quoted(tiny, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "nonsense")
    with pytest.raises(UserError, match="nonsense"):
        plan.measure(tiny, "local", progress=False)


def test_a_folder_beside_it_isnt_taken_for_the_package(tiny, tmp_path, monkeypatch):
    (tmp_path / "cascade").mkdir()
    (tmp_path / "cascade" / "__init__.py").write_text("")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="needs 7 devices"):
        plan.measure(plan.changed(tiny, mesh="fsdp=7"), "local")


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="asks /proc which processes there are")
def test_a_plan_that_is_killed_leaves_no_compiler_behind():
    program = (
        "from cascade import config; from cascade.parallel import plan; "
        "plan.measure(config.load('configs/emoji/base64.py'), 'local')"  # minutes, if it may
    )
    killed = subprocess.Popen([sys.executable, "-c", program])
    children = Path(f"/proc/{killed.pid}/task/{killed.pid}/children")
    while not (found := children.read_text().split()):
        time.sleep(0.05)
    (child,) = found
    time.sleep(1.0)
    killed.kill()
    killed.wait()
    end = time.monotonic() + 30
    while is_running(child) and time.monotonic() < end:
        time.sleep(0.05)
    assert not is_running(child)


def is_running(pid: str) -> bool:
    """Whether there is such a process that is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_what_the_compiler_is_told_is_part_of_what_is_kept(tiny, monkeypatch):
    request = {"config": configs.to_json(tiny), "topology": "v5e-4", "sample": False}
    before = plan._cache_file(request)
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_something=1")
    assert plan._cache_file(request) != before


def test_the_longest_bound_binds():
    found = estimate(measured(), 2048, utilisation=0.5)
    assert found.binds == "arithmetic" and found.fits
    assert found.bounds["arithmetic"] == pytest.approx(0.1)
    assert found.bounds["memory"] == pytest.approx(0.05)
    assert found.bounds["interconnect"] == pytest.approx(8e9 / CHIPS["v5e"].link_bandwidth)
    assert found.bounds["network"] == pytest.approx(1e8 / CHIPS["v5e"].network_bandwidth)
    assert found.seconds == pytest.approx(0.15)  # useful work alone, at half the peak
    assert found.images_per_second == pytest.approx(2048 / 0.15)
    slow = estimate(measured(traffic_bytes=CHIPS["v5e"].hbm_bandwidth), 2048, utilisation=0.5)
    assert slow.binds == "memory" and slow.seconds == pytest.approx(1.0)


def test_machine_code_that_wasnt_made_needs_room_too():
    nearly = CHIPS["v5e"].hbm_bytes - MACHINE_CODE / 2
    assert estimate(measured(peak_bytes=nearly), 1, 0.4).fits
    unmade = measured(peak_bytes=nearly, code_bytes=None)
    assert not estimate(unmade, 1, 0.4).fits
    assert "assumed" in report(unmade, what="w", where="w", batch=1, steps=1, utilisation=0.4)


def test_the_report_says_what_was_found():
    text = report(measured(), what="w", where="v5e-256", batch=2048, steps=576_000, utilisation=0.5)
    for said in ("Estimates", "fits", "1.35 ×", "arithmetic bound", "binds", "1.0 days", "60 s"):
        assert said in text, said


def test_what_doesnt_fit_is_said():
    refused = measured(peak_bytes=20e9, sent=None, traffic_bytes=None, argument_bytes=None)
    text = report(refused, what="w", where="v5e-256", batch=1, steps=1, utilisation=0.4)
    assert "does not fit" in text and "bound" not in text


@pytest.mark.parametrize(
    ("refusal", "gib"),
    [
        ("Ran out of memory in memory space hbm. Used 20.5G of 15.75G hbm.", 20.5),
        ("Ran out of memory on HBM, the total memory required for HLO temporaries (512.00M)", 2.5),
    ],
)
def test_the_compilers_refusal_says_how_much(refusal, gib):
    assert needed_bytes(RuntimeError(refusal), 2 * 2**30) == gib * 2**30


def test_another_failure_stays_one():
    with pytest.raises(RuntimeError, match="else"):
        needed_bytes(RuntimeError("Used something else"), 0)


def test_search_says_where_nothing_fits(tiny, monkeypatch):
    asked = []

    def compiled(config, topology, **_):
        asked.append((config.mesh.fsdp, config.stage.network.remat, config.train.batch_size))
        mesh = {"data": 4 // config.mesh.fsdp, "fsdp": config.mesh.fsdp, "tensor": 1}
        return measured(mesh=mesh, devices=4, peak_bytes=20e9, sent=None)

    monkeypatch.setattr("cascade.parallel.search.measure", compiled)
    found = search(tiny, "v5e-4", tries=80, utilisation=0.4)
    assert len(asked) == len(set(asked)) == len(found)  # batches 16, 8 and 4, on 3 meshes, 4 ways
    assert {one.batch for one in found} == {16, 8, 4}
    assert "Nothing that was tried fits" in table(found)


def test_search_looks_at_every_mesh_and_goes_on_after_a_failure(tiny, monkeypatch, capsys):
    def compiled(config, topology, **_):
        if config.mesh.fsdp == 8:
            raise UserError("It was too much.")
        fsdp = max(config.mesh.fsdp, 1)
        return measured(mesh={"data": 8 // fsdp, "fsdp": fsdp, "tensor": 1}, devices=8)

    monkeypatch.setattr("cascade.parallel.search.measure", compiled)
    found = search(tiny, "v5e-8", tries=2, utilisation=0.4)
    assert [one.mesh["fsdp"] for one in found] == [1, 8]
    assert "It was too much." in table(found) and "It was too much." in capsys.readouterr().err
    slices = search(tiny, "2xv5e-4", tries=20, utilisation=0.4)  # each holds a whole copy
    assert {one.mesh["data"] % 2 for one in slices} == {0}


@pytest.mark.parametrize("tries", [1, 3, 60])
def test_search_keeps_to_its_tries_and_puts_the_best_first(tiny, monkeypatch, tries):
    def compiled(config, topology, **_):
        batch, fsdp = config.train.batch_size, max(config.mesh.fsdp, 1)
        model = 1e13 * batch
        return measured(
            mesh={"data": 4 // fsdp, "fsdp": fsdp, "tensor": 1},
            devices=4,
            peak_bytes=8e9 / fsdp
            + batch * (1e8 if config.stage.network.remat == "blocks" else 2e8),
            sent={"all-gather": [1e9 * fsdp, 1]},
            model_flops=model,
            flops=model,
        )

    monkeypatch.setattr("cascade.parallel.search.measure", compiled)
    found = search(tiny, "v5e-4", tries=tries, utilisation=0.4)
    assert len(found) <= tries
    best = found[0]
    assert best.estimate.fits
    speeds = [one.estimate.images_per_second for one in found if one.estimate.fits]
    assert speeds == sorted(speeds, reverse=True)
    assert f"--config.train.batch_size={best.batch}" in table(found)
    if tries == 60:  # the largest batch that fits is found: 4 chips take 2 + 12.8 of 17 GB
        assert max(one.batch for one in found if one.estimate.fits) == 128


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--topology", "v5p-9"], "v5p comes in"),
        (["--topology", "h100"], "Unknown topology"),
        (["--topology", "v5e-4", "--mesh", "data=two"], "Can't read the mesh"),
        (["--topology", "v5e-4", "--mesh", "rows=2"], "Can't read the mesh"),
        (["--topology", "v5e-4", "--mesh", "data=2,data=2"], "Can't read the mesh"),
        (["--topology", "local", "--mesh", "data=3"], "needs 3 devices"),
        (["--topology", "local", "--mesh", "data=8", "--batch", "12"], "batch_size=12"),
        (["--topology", "local", "--batch", "0"], "batch_size"),
        (["--topology", "v5e-4", "--utilisation", "2"], "--utilisation"),
        (["--topology", "local", "--slices", "2"], "--slices"),
        (["--topology", "v5e-4", "--host-memory", "nan"], "--host-memory"),
        (["--topology", "v5e-4", "--search", "--sample"], "leave out --sample"),
        (["--topology", "v5e-4", "--search", "--tries", "0"], "--tries"),
        (["--topology", "v5e-4", "--tries", "3"], "--search"),
    ],
)
def test_mistakes_are_sentences(options, said):
    assert said in sentence(*options)


def test_a_missing_compiler_is_a_sentence(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "[libtpu]" in sentence("--topology", "v5e-4")


def sentence(*options) -> str:
    """What a failing `cascade plan` says, after checking that it fails as promised."""
    result = CliRunner().invoke(main, ["plan", "--config", SMOKE, *options])
    assert result.exit_code == 2, (result.exit_code, result.output, result.exception)
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in result.output
    return line


def test_a_damaged_cache_is_made_again(tiny, home, monkeypatch):
    answer = json.loads(json.dumps(measured()._asdict()))
    monkeypatch.setattr(plan, "_ask_child", lambda *_: answer)
    first = plan.measure(tiny, "local", progress=False)
    (kept,) = (home / ".cache" / "cascade" / "plans").iterdir()
    for damaged in ("", "[]", "{}", '{"device_kind": 1}'):
        kept.write_text(damaged)
        assert plan.measure(tiny, "local", progress=False) == first
        assert json.loads(kept.read_text()) == answer

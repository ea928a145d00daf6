"""Plans for TPUs that aren't here, compiled for real; skipped where their compiler isn't."""

import pytest
from tiny_cascade import tiny_experiment

from cascade.errors import UserError
from cascade.parallel import plan
from cascade.parallel.estimate import estimate

pytest.importorskip("libtpu")


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A tiny experiment, and a home of its own for what is kept."""
    monkeypatch.setenv("HOME", str(tmp_path))
    return tiny_experiment()


def test_a_tpu_that_isnt_here_is_planned_for(tiny):
    tiny.mesh = {"data": 2, "fsdp": 2, "tensor": 1}
    found = plan.measure(tiny, "v5e-4", progress=False)
    assert (found.device_kind, found.devices) == ("TPU v5 lite", 4)
    assert 8 * found.parameters <= found.donated_bytes <= found.argument_bytes < found.peak_bytes
    assert sum(size for size, _ in found.sent.values()) > found.ideal_bytes
    result = estimate(found, 16, 0.4)
    assert result.fits and set(result.bounds) == {"arithmetic", "memory", "interconnect"}
    assert min(result.bounds.values()) > 0
    with pytest.raises(UserError, match="3"):
        tiny.mesh = {"data": 3, "fsdp": 1, "tensor": 1}
        plan.measure(tiny, "v5e-4", progress=False)


def test_machine_code_changes_nothing_but_its_own_size(tiny):
    tiny.mesh = {"data": 2, "fsdp": 2, "tensor": 1}
    until, whole = (
        plan.measure(tiny, "v5e-4", machine_code=code, progress=False) for code in (False, True)
    )
    assert until.code_bytes is None and whole.code_bytes > 0
    for name in ("argument_bytes", "donated_bytes", "result_bytes", "sent", "traffic_bytes"):
        assert getattr(until, name) == getattr(whole, name), name
    # Some kilobytes are added for the machine code's own use.
    assert until.temporary_bytes == pytest.approx(whole.temporary_bytes, rel=0.01)


def test_slices_reduce_over_the_network(tiny):
    tiny.mesh = {"data": 4, "fsdp": 3, "tensor": 1}
    with pytest.raises(UserError, match="3 slices"):
        plan.measure(tiny, "3xv5e-4", progress=False)
    tiny.mesh, tiny.train.microbatches = {"data": 2, "fsdp": 4, "tensor": 1}, 2
    found = plan.measure(tiny, "2xv5e-4", progress=False)
    # Of each gradient every chip of a slice sends its share to the other slice, and back.
    least = 2 * found.parameters / 4
    assert found.sent["between slices"][0] >= least
    assert "network" in estimate(found, 16, 0.4).bounds

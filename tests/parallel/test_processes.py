"""Real processes find one another, agree, fail, are killed: what each says, and when it ends."""

import json
import signal
import time

import pytest
from processes import Running, cluster, run_processes

# Joins, agrees, and sums over all processes until it is ended; misbehaves as told.
COMMAND = """
import json, os, sys, time
import click
from cascade.cli import main
from cascade.errors import UserError

@main.command("wait")
def wait():
    from cascade.parallel import roll
    from cascade.parallel.processes import agree, connect
    told = json.loads(os.environ["TOLD"])
    connect()
    import jax
    import numpy as np
    from jax.experimental import multihost_utils
    agree("config", told.get("config", {"train": {"steps": 3}}))
    print("joined", jax.process_index(), flush=True)
    if "late" in told:
        send = roll._send
        roll._send = lambda *what: (time.sleep(told["late"]), send(*what))
    for step in range(told.get("steps", 1000)):
        if step == told.get("fails_at"):
            raise {"user": UserError("no space"), "bug": KeyError("a bug")}[told["with"]]
        one = np.ones(1, np.float32)
        assert multihost_utils.process_allgather(one).sum() == jax.process_count()
        time.sleep(0.05)

main(["wait"])
"""

SHARES = """
import jax, numpy as np
from cascade.parallel.mesh import check_batch, make_mesh, process_share, put_batch, whole_on_host
from cascade.parallel.processes import connect

connect()
mixed = [jax.devices()[i] for i in (0, 2, 1, 3)]
for sizes, devices, count in [
    ((4, 1, 1), None, 2),
    ((1, 2, 2), None, 2),
    ((2, 1, 2), mixed, 1),  # each process has a half of the parameters, and of both halves' rows
    ((1, 1, 4), None, 1),
    ((4, 1, 1), mixed, 2),
]:
    mesh = make_mesh(**dict(zip(("data", "fsdp", "tensor"), sizes)), devices=devices)
    check_batch(sizes[0] * sizes[1], 1, mesh)  # of which some processes may hold the same
    index, shares = process_share(mesh)
    assert (index, shares) == (jax.process_index() if count == 2 else 0, count), (sizes, index)
    rows = np.arange(8.0).reshape(shares, -1)[index]
    whole = whole_on_host(put_batch({"rows": rows}, mesh)["rows"])
    assert sorted(whole) == list(range(8))
    if devices is None:
        assert list(whole) == list(range(8)), whole
print("shared")
"""


def joining(count, told=lambda index: {}):
    """What starts `count` processes; process i is told `told(i)`."""
    place = cluster(count)

    def environment(index):
        return {**place(index), "TOLD": json.dumps(told(index))}

    return dict(commands=[["-c", COMMAND]] * count, environment=environment)


def errors(outputs):
    """Of each process, the sentences that begin with "error"."""
    return [[x for x in o.err.splitlines() if x.startswith("error: ")] for o in outputs]


def joined(running):
    return lambda: all("joined" in output.out for output in running.outputs())


@pytest.mark.parametrize("late", [0, 1.5])  # seconds until process 0 passes the news on
def test_one_that_fails_says_why_and_the_others_that_it_did(late):
    told = {0: {"late": late}, 1: {"fails_at": 2, "with": "user"}, 2: {}}
    codes, outputs = run_processes(**joining(3, told.get))
    assert codes == [2, 2, 2]
    stopped = "Process 1 has failed, and its output tells of what; this one stops."
    assert errors(outputs) == [
        [f"error: process 0 of 3: {stopped}"],
        ["error: process 1 of 3: no space"],
        [f"error: process 2 of 3: {stopped}"],
    ]


def test_a_bug_on_the_first_process_is_traced_there_and_told_elsewhere():
    told = {"fails_at": 2, "with": "bug"}
    codes, outputs = run_processes(**joining(2, lambda i: told if i == 0 else {}))
    assert codes == [1, 1]
    assert "KeyError: 'a bug'" in outputs[0].err
    assert errors(outputs)[1] == [
        "error: process 1 of 2: Process 0 has failed, and its output tells of what; this one stops."
    ]


@pytest.mark.parametrize("victim", [0, 1])
def test_where_one_is_killed_the_others_say_so_and_stop(victim):
    with Running(**joining(3 if victim else 2)) as running:
        running.wait_for(joined(running))
        running.send(victim, signal.SIGKILL)
        killed = time.monotonic()
        codes, outputs = running.wait()
        assert time.monotonic() - killed < 30
    assert codes.pop(victim) == -signal.SIGKILL and set(codes) == {75}
    for index, said in enumerate(errors(outputs)):
        if index != victim:
            # jax may give up, which comes with a trace, before the news is here.
            assert "is gone" in said[-1] and "with the same command" in said[-1]
            assert said[-1].startswith(f"error: process {index} of {len(outputs)}: ")


def test_sigterm_ends_all_where_nothing_is_saved():
    with Running(**joining(2)) as running:
        running.wait_for(joined(running))
        running.send(1, signal.SIGTERM)
        codes, outputs = running.wait()
    assert codes == [143, 143]
    assert errors(outputs)[1] == ["error: process 1 of 2: Terminated."]


@pytest.mark.parametrize("words", [0, 70_000])
def test_settings_that_differ_are_found_before_anything_is_done(words):
    def told(index):
        train = {"steps": 4 if index == 2 else 3, "seed": 0}
        return {"config": {"train": train, "words": "w" * words}}

    codes, outputs = run_processes(**joining(3, told))
    assert codes == [2, 2, 2] and not any("joined" in output.out for output in outputs)
    for index, said in enumerate(errors(outputs)):
        assert f"process {index} of 3: Of 3 processes, 2 got another config than" in said[0]
    assert "here config.train.steps is 4, there 3" in errors(outputs)[2][0]


def test_all_end_well_together():
    codes, outputs = run_processes(**joining(2, lambda i: {"steps": 3}))
    assert codes == [0, 0] and errors(outputs) == [[], []]


def test_what_of_a_batch_each_process_loads():
    codes, outputs = run_processes([["-c", SHARES]] * 2, devices=2, environment=cluster(2))
    assert codes == [0, 0], outputs
    assert [output.out.splitlines()[-1] for output in outputs] == ["shared"] * 2


UNEQUAL = """
from cascade.errors import UserError
from cascade.parallel.mesh import make_mesh, process_share
from cascade.parallel.processes import connect

connect()
try:
    process_share(make_mesh(data=2, fsdp=1, tensor=3))
except UserError as error:
    print(error)
"""


def test_a_mesh_whose_rows_cut_through_a_process_is_refused():
    codes, outputs = run_processes([["-c", UNEQUAL]] * 3, devices=2, environment=cluster(3))
    assert codes == [0, 0, 0], outputs
    assert all("A batch can't be shared by 3 processes" in output.out for output in outputs)

"""Where schedulers say which process this is, and what is missing or contradictory."""

import http.server
import re
import socket
import threading

import pytest
from click.testing import CliRunner

from cascade.cli import main
from cascade.errors import UserError
from cascade.parallel import environments
from cascade.parallel.environments import first_host, place

SLURM = {
    "SLURM_JOB_ID": "4097",
    "SLURM_STEP_NODELIST": "node[001-002,7],other",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "0",
}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
}
GKE_TPU = {"TPU_WORKER_HOSTNAMES": "job-0-0.job,job-0-1.job", "TPU_WORKER_ID": "1"}
OURS = {"CASCADE_COORDINATOR": "a:1", "CASCADE_PROCESSES": "3", "CASCADE_PROCESS": "2"}


def told(environment, *options):
    found = place(*(options or (None, None, None)), environment)
    return found and tuple(found[:4])


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        (OURS, ("a:1", 3, 2, None)),
        (SLURM, ("node001:61441", 4, 3, None)),
        # Two nodes of two tasks: a GPU each, unless Slurm has shown each task only its own.
        (SLURM | {"SLURM_STEP_NUM_NODES": "2", "SLURM_LOCALID": "1"}, ("node001:61441", 4, 3, [1])),
        (
            SLURM | {"SLURM_STEP_NUM_NODES": "2", "SLURM_GPUS_PER_TASK": "1"},
            ("node001:61441", 4, 3, None),
        ),
        # The shell of salloc, a batch script, a job of one task.
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),
        ({k: v for k, v in SLURM.items() if "STEP" not in k} | {"SLURM_PROCID": "0"}, None),
        (SLURM | {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),
        (OPEN_MPI, (f"10.96.0.1:{1531576320 // 4096 % 4096 + 61440}", 4, 2, None)),
        (
            OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": "4096.0;tcp6://[fe80::1,fd00::2]:7"},
            ("[fe80::1]:61441", 4, 2, None),
        ),
        (
            OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "2"},
            (f"10.96.0.1:{1531576320 // 4096 % 4096 + 61440}", 4, 2, [2]),
        ),
        (GKE_TPU, ("job-0-0.job:8482", 2, 1, None)),
        (GKE_TPU | {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, None),
        (
            GKE_TPU
            | {
                "MEGASCALE_NUM_SLICES": "3",
                "MEGASCALE_SLICE_ID": "2",
                "MEGASCALE_COORDINATOR_ADDRESS": "first:8080",
            },
            ("first:8482", 6, 5, None),
        ),
        # An indexed Job's environment has the index alone; the manifest gives the rest, or the
        # pods have nothing to do with one another.
        ({"JOB_COMPLETION_INDEX": "5"}, None),
        (
            {"JOB_COMPLETION_INDEX": "5", "CASCADE_COORDINATOR": "x:9", "CASCADE_PROCESSES": "8"},
            ("x:9", 8, 5, None),
        ),
        # Open MPI 5 doesn't tell where process 0 is.
        (
            {
                "OMPI_COMM_WORLD_SIZE": "2",
                "OMPI_COMM_WORLD_RANK": "1",
                "CASCADE_COORDINATOR": "y:9",
            },
            ("y:9", 2, 1, None),
        ),
    ],
)
def test_what_is_found(environment, expected):
    assert told(environment) == expected


def test_options_come_before_all_else():
    assert told(SLURM | OURS, "b:2", 9, 8) == ("b:2", 9, 8, None)
    assert told(SLURM, "b:2", None, None) == ("b:2", 4, 3, None)
    assert told(SLURM, None, 1, 0) is None


@pytest.mark.parametrize(
    ("options", "environment", "said"),
    [
        (("a:1", None, None), {}, "--processes N and --process I are missing beside --coordinator"),
        ((None, 4, None), {}, "--coordinator HOST:PORT and --process I are missing"),
        ((None, None, 0), {}, "--coordinator HOST:PORT and --processes N are missing"),
        (("a:1", 4, None), {}, "--process I is missing"),
        (("a:1", 4, 4), {}, "Process 4 of 4 can't be; --process counts from 0 to 3"),
        (("a:1", 4, -1), {}, "Process -1 of 4"),
        (("a:1", 0, 0), {}, "--processes is 0"),
        (("a:1", 1, 1), {}, "Process 1 of 1"),
        (("host", 2, 0), {}, "should be HOST:PORT"),
        (("host:0", 2, 0), {}, "should be HOST:PORT"),
        (("host:99999", 2, 0), {}, "should be HOST:PORT"),
        ((None, None, None), {"CASCADE_PROCESSES": "two"}, "CASCADE_PROCESSES is 'two'"),
        (
            (None, None, None),
            {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"},
            "told by Open MPI",
        ),
        ((None, None, None), {"CASCADE_PROCESSES": "4"}, "beside --processes (told by CASCADE_PRO"),
        (("a:1", 2, None), {"CASCADE_PROCESS": "2"}, "Process 2 of 2 can't be (told by CASCADE_PR"),
        (("a:1", None, 0), {"CASCADE_PROCESSES": "0"}, "--processes is 0 (told by CASCADE_PROCES"),
        ((None, 2, 0), {"CASCADE_COORDINATOR": "x"}, "is 'x' (told by CASCADE_COORDINATOR)"),
        (("a:1", 2, None), {}, "beside --coordinator and --processes; several"),
        ((None, None, None), SLURM | {"SLURM_PROCID": "4"}, "Process 4 of 4 can't be (told by Slu"),
        # What isn't a number, of a Cloud TPU's too.
        ((None, None, None), GKE_TPU | {"TPU_WORKER_ID": "one"}, "TPU_WORKER_ID is 'one'"),
        ((None, None, None), GKE_TPU | {"TPU_WORKER_ID": "1" * 5000}, "TPU_WORKER_ID is '1111"),
        ((None, None, None), GKE_TPU | {"TPU_WORKER_ID": "7"}, "(told by Cloud TPU)"),
        ((None, None, None), GKE_TPU | {"MEGASCALE_NUM_SLICES": "2.0"}, "SLICES is '2.0'"),
        ((None, None, None), GKE_TPU | {"MEGASCALE_NUM_SLICES": "0"}, "--processes is 0"),
        ((None, None, None), GKE_TPU | {"MEGASCALE_SLICE_ID": "-9"}, "Process -17 of 2"),
        ((None, None, None), SLURM | {"SLURM_JOB_ID": "1_0"}, "'1_0'"),
    ],
)
def test_what_is_refused(options, environment, said):
    with pytest.raises(UserError, match=re.escape(said)):
        place(*options, environment)


def test_the_command_line_says_that_a_variable_told(monkeypatch, tmp_path):
    monkeypatch.setenv("CASCADE_PROCESSES", "4")
    words = ["train", "--config", "configs/emoji/demo_base.py:smoke", "--workdir", str(tmp_path)]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 2
    assert "beside --processes (told by CASCADE_PROCESSES)" in done.output


def test_node_lists():
    names = {"n1": "n1", "n1,n2": "n1", "n[1-3]": "n1", "n[01,5-7],m": "n01", "n[3-4]-ib": "n3-ib"}
    assert {nodes: first_host(nodes) for nodes in names} == names


@pytest.mark.parametrize("endpoints", ["10.0.0.1,10.0.0.2", "a:0:10.0.0.1,b:1:10.0.0.2"])
def test_a_tpu_vm_asks_its_metadata_server(endpoints):
    answers = {
        "worker-network-endpoints": endpoints,
        "agent-worker-number": "1",
        "tpu-env": "MEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'\nOTHER: 'x:y'\n",
    }

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            found = answers.get(self.path.rpartition("/")[2])
            known = found is not None and self.headers["Metadata-Flavor"] == "Google"
            self.send_response(200 if known else 404)
            self.end_headers()
            self.wfile.write((found or "").encode())

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("localhost", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environment = {"GCE_METADATA_HOST": f"localhost:{server.server_port}"}
        assert told(environment) == ("10.0.0.1:8482", 4, 3, None)
        assert told(environment | {"TPU_SKIP_MDS_QUERY": "1"}) is None
        del answers["tpu-env"]
        assert told(environment) == ("10.0.0.1:8482", 2, 1, None)
        del answers["agent-worker-number"]
        assert told(environment) is None
        server.shutdown()


def test_no_metadata_server_is_waited_for_once_and_told(monkeypatch, caplog):
    monkeypatch.setattr(environments, "METADATA_WAIT", 0.05)
    connections = []
    with socket.create_server(("localhost", 0)) as silent:  # it takes calls and says nothing
        silent.settimeout(0.2)
        environment = {"GCE_METADATA_HOST": f"localhost:{silent.getsockname()[1]}"}
        assert told(environment) is None
        with pytest.raises(TimeoutError):
            while True:
                connections.append(silent.accept())
    assert len(connections) == 1
    (record,) = caplog.records
    assert "No metadata server answers" in record.message
    for connection, _ in connections:
        connection.close()


@pytest.mark.parametrize("host", ["localhost:1", "no such host", "localhost:port"])
def test_where_no_metadata_server_can_be_nothing_is_said(host, caplog):
    assert told({"GCE_METADATA_HOST": host}) is None
    assert not caplog.records

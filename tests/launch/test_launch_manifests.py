"""Manifests are what JobSet's and Kubernetes' schemas allow, and say what they should."""

import json
import re
import subprocess
import sys

import jsonschema
import pytest
import yaml
from cases import AWKWARD, CASES, LAUNCH, ROOT, run
from hypothesis import given
from hypothesis import strategies as st

from cascade.parallel.topology import CHIPS, CORES, SHAPES

sys.path.insert(0, str(LAUNCH))

import gke
import tpu_names

SCHEMAS = ROOT / "tests" / "launch" / "schemas"
JOBSET, JOB = (
    jsonschema.Draft202012Validator(json.loads((SCHEMAS / f"{name}.json").read_text()))
    for name in ("jobset", "job")
)
# Labels and label values, as Kubernetes takes them; Kueue takes the name of a LocalQueue there.
LABEL = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")


def printed(*words: str) -> dict:
    """The manifest that `gke.py up --dry-run` prints for the shell."""
    done = run("gke.py", *words, "--dry-run", "--", *AWKWARD)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.split("\n")
    assert lines[0] == "kubectl apply --filename=- <<'MANIFEST'" and lines[-2:] == ["MANIFEST", ""]
    return yaml.safe_load("\n".join(lines[1:-2]))


def job_of(jobset: dict) -> dict:
    """The Job that JobSet's controller makes of its template."""
    (replicated,) = jobset["spec"]["replicatedJobs"]
    name = {"name": f"{jobset['metadata']['name']}-{replicated['name']}-0"}
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": name, **replicated["template"]}


def pod_of(jobset: dict) -> dict:
    return job_of(jobset)["spec"]["template"]["spec"]


@pytest.mark.parametrize("name", ["gke_tpu", "gke_gpu"])
def test_manifests_fit_the_schemas(name):
    jobset = printed(*CASES[name][1])
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    JOBSET.validate(jobset)
    JOB.validate(job_of(jobset))
    for label, value in jobset["metadata"]["labels"].items():
        assert label.startswith("kueue.x-k8s.io/") and LABEL.fullmatch(value)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "failurePolicy", "maxRestart"), 3),
        (("spec", "failurePolicy", "rules", 0, "action"), "Restart"),
        (("spec", "replicatedJobs", 0, "replicas"), "two"),
        (("spec", "replicatedJobs", 0, "template", "spec", "parallel"), 2),
        (("spec", "replicatedJobs", 0, "template", "spec", "template", "spec", "image"), "x"),
    ],
)
def test_the_schemas_refuse_what_isnt_theirs(path, value):
    jobset = printed(*CASES["gke_tpu"][1])
    node = jobset
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        JOBSET.validate(jobset)


def test_jobs_schema_refuses_what_isnt_its_own():
    job = job_of(printed(*CASES["gke_gpu"][1]))
    job["spec"]["template"]["spec"]["containers"][0]["commands"] = ["true"]
    with pytest.raises(jsonschema.ValidationError):
        JOB.validate(job)


def test_preemption_isnt_counted_and_failure_is():
    jobset = printed(*CASES["gke_gpu"][1])
    (rule,) = jobset["spec"]["failurePolicy"]["rules"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    job = job_of(jobset)["spec"]
    disrupted, saved = job["podFailurePolicy"]["rules"]
    assert disrupted["onPodConditions"][0]["type"] == "DisruptionTarget"
    # What gke_pod.sh ends with, and neither a user's mistake (2) nor another process lost (75).
    (code,) = saved["onExitCodes"]["values"]
    assert f"exit {code}\n" in (LAUNCH / "gke_pod.sh").read_text() and code not in (2, 75)
    assert job["template"]["spec"]["restartPolicy"] == "Never" and job["backoffLimit"] == 0


def test_the_pods_find_one_another():
    jobset = printed(*CASES["gke_gpu"][1])
    (container,) = pod_of(jobset)["containers"]
    environment = {entry["name"]: entry.get("value") for entry in container["env"]}
    # JobSet names hosts JOBSET-REPLICATEDJOB-JOB-POD, in a network of the JobSet's name.
    assert environment["CASCADE_COORDINATOR"].split(":")[0] == "base-train-0-0.base"
    assert int(environment["CASCADE_PROCESSES"]) == job_of(jobset)["spec"]["parallelism"] == 4


def test_secrets_are_referred_to_and_left_out_where_there_are_none():
    (container,) = pod_of(printed(*CASES["gke_tpu"][1]))["containers"]
    assert container["envFrom"] == [{"secretRef": {"name": "hf"}}]
    (container,) = pod_of(printed(*CASES["gke_gpu"][1]))["containers"]
    assert "envFrom" not in container


@pytest.mark.parametrize("generation", CHIPS)
def test_every_topology_has_hosts_for_all_chips(generation):
    for chips in SHAPES[generation]:
        topology = tpu_names.parse(f"{generation}-{chips * CORES[generation]}")
        count, each = tpu_names.hosts(topology)
        assert count * each == chips and each in (1, 4) and (each == 4 or chips == 1)
        sides = tpu_names.node_topology(topology).split("x")
        assert len(sides) == (2 if generation in ("v5e", "v6e") else 3)
        assert tpu_names.accelerator_type(topology).endswith(f"-{chips * CORES[generation]}")


def test_the_names_are_a_program_too():
    words = [sys.executable, str(LAUNCH / "tpu_names.py"), "2xv5e-256"]
    said = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert said == "v5litepod-256 v2-alpha-tpuv5-lite 2\n"


def expanded(word: str, variables: dict[str, str]) -> str:
    """An argument as Kubernetes hands it to the container.

    $(NAME) is a variable's value, itself where there is none; $$ is $. Source: "Define Dependent
    Environment Variables" and the API reference of Container.args.
    """
    pattern = re.compile(r"\$\$|\$\(([^)]*)\)")
    return pattern.sub(
        lambda found: "$" if found[0] == "$$" else variables.get(found[1], found[0]), word
    )


# All text but half characters, which no command line in UTF-8 holds, and NUL, which none does.
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"))
TRICKY = st.lists(
    TEXT
    | st.sampled_from(
        ["$", "$$", "$(HOME)", "${HOME}", "$((", "'", '"', "\\", "\n", "- a: b", "\x85", "\u2028"]
    )
).map("".join)


def test_what_some_reader_takes_for_no_text_is_in_quotes():
    for text in (
        "y",
        "0o14",
        "1_000",
        "0x1F",
        "1e3",
        "",
        "~",
        "null",
        "Yes",
        "12:30:00",
        "=",
        "\x85",
    ):
        assert gke.as_yaml({"key": text})[5:6] in ("'", '"'), text


@given(st.lists(TRICKY))
def test_any_words_arrive_in_the_container(words):
    overrides = [f"--config.a={word}" for word in words]
    settings = {
        "name": "base", "namespace": "default", "image": "i", "workdir": "gs://b/r", "claim": None,
        "topology": "v5e-4", "chips_per_host": None, "gpus": None, "nodes": None, "queue": None,
        "priority": None, "spot": False, "secret": None, "service_account": None, "restarts": 1,
    }  # fmt: skip
    text = gke.as_yaml(gke.manifest(settings, ("--config", "c.py", *overrides)))
    jobset = yaml.safe_load(text)
    JOBSET.validate(jobset)
    (container,) = pod_of(jobset)["containers"]
    handed = [expanded(word, {"HOME": "/root"}) for word in container["args"]]
    assert handed == ["/gcs/b/r", "--config", "c.py", *overrides]
    assert "MANIFEST" not in text.split("\n")

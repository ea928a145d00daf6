"""Makes jobset.json and job.json, the published schemas that manifests are checked against.

    pip install kubeflow-trainer-api==2.3.0 kubernetes-validate==1.37.0
    python tests/launch/schemas/vendor.py

JobSet's comes from the API models of kubeflow-trainer-api, which are generated from JobSet's own
OpenAPI document; Job's from kubernetes-validate, which packs Kubernetes' own. Descriptions are left
out, and a field that a schema doesn't name is refused. Where JobSet's words alone say which values
a field takes, they are added as an enumeration.
"""

import json
import pathlib
from importlib import resources

HERE = pathlib.Path(__file__).parent
VERSION = "v1.37.0"
# "Valid values are ..." in the descriptions of kubeflow-trainer-api 2.3.0.
ENUMERATIONS = {
    ("JobsetV1alpha2FailurePolicyRule", "action"): [
        "FailJobSet",
        "RestartJobSet",
        "RestartJobSetAndIgnoreMaxRestarts",
        "RestartJob",
        "RestartJobAndIgnoreMaxRestarts",
    ],
}


def closed(node):
    """The schema without descriptions, and with nothing allowed that it doesn't name."""
    if isinstance(node, list):
        return [closed(item) for item in node]
    if not isinstance(node, dict):
        return node
    kept = {
        key: closed(value)
        for key, value in node.items()
        if not (key in ("description", "title", "default") and not isinstance(value, dict))
    }
    if kept.get("properties") and "additionalProperties" not in kept:
        kept["additionalProperties"] = False
    return kept


def jobset() -> dict:
    """JobSet v1alpha2."""
    from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

    schema = closed(JobsetV1alpha2JobSet.model_json_schema(by_alias=True))
    definitions = schema["$defs"]
    for (definition, field), values in ENUMERATIONS.items():
        definitions[definition]["properties"][field] = {"enum": values}
    # Models of "a number or a text" say nothing that JSON Schema can: both are written plainly.
    definitions["IoK8sApimachineryPkgApiResourceQuantity"] = {"type": ["string", "number"]}
    definitions["IoK8sApimachineryPkgUtilIntstrIntOrString"] = {"type": ["string", "integer"]}
    return schema


def job() -> dict:
    """batch/v1's Job, with the definitions that it needs and no others."""
    package = resources.files("kubernetes_validate") / "kubernetes-json-schema"
    folder = package / f"{VERSION}-local-strict"
    everything = json.loads((folder / "_definitions.json").read_text())["$defs"]
    needed, waiting = {}, ["io.k8s.api.batch.v1.Job"]
    while waiting:
        name = waiting.pop()
        if name not in needed:
            needed[name] = closed(everything[name])
            waiting += [ref.rsplit("/", 1)[1] for ref in references(needed[name])]
    return {"$ref": "#/$defs/io.k8s.api.batch.v1.Job", "$defs": needed}


def references(node) -> list[str]:
    """Every "$ref" below a node."""
    if isinstance(node, dict):
        found = [node["$ref"]] if isinstance(node.get("$ref"), str) else []
        return found + [ref for value in node.values() for ref in references(value)]
    if isinstance(node, list):
        return [ref for item in node for ref in references(item)]
    return []


if __name__ == "__main__":
    for name, schema in (("jobset", jobset()), ("job", job())):
        text = json.dumps(schema, sort_keys=True, separators=(",", ":"))
        (HERE / f"{name}.json").write_text(text + "\n", encoding="utf-8")
        print(name, len(text))

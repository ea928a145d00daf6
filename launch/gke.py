#!/usr/bin/env python3
"""Trains on Google Kubernetes Engine: fills a JobSet's template, queued by Kueue, and applies it.

Needs pip install 'cascade-imagen[launch]' and, unless it only prints, kubectl.
"""

import itertools
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import click
import yaml

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE))

import tpu_names  # noqa: E402

from cascade.errors import UserError  # noqa: E402

NAME = re.compile(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?")  # the pods' host names are longer by 23
LABEL = re.compile(r"[a-z0-9]([-a-z0-9.]{0,61}[a-z0-9])?")
# Registry, path, tag and digest; what is wrong within them the registry says.
IMAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/:@-]*")
BUCKET = re.compile(r"gs://([a-z0-9._-]+)/([^/\x00-\x1f][^\x00-\x1f]*)")
PORT = 8476


def fill(node, values: dict):
    """A template's tree with each scalar "${key}" replaced by values[key], of whatever type.

    Where a value is None, its entry goes, and so does what is empty for want of it.

    Raises:
      KeyError: the template asks for what isn't there.
    """
    if isinstance(node, str) and (match := re.fullmatch(r"\$\{(\w+)\}", node)):
        return values[match[1]]
    if isinstance(node, dict):
        filled = {key: fill(value, values) for key, value in node.items()}
        return {k: v for k, v in filled.items() if v is not None} or (None if node else {})
    if isinstance(node, list):
        filled = [fill(item, values) for item in node]
        return [item for item in filled if item is not None] or (None if node else [])
    return node


def literal(word: str) -> str:
    """`word` as a container's argument: Kubernetes puts variables in for $(NAME), and $ for $$."""
    return word.replace("$", "$$")


def storage(workdir: str, claim: str | None) -> dict:
    """Where the run's folder is, of the template's values, and `folder`, as pods see it.

    Raises:
      UserError: it isn't on storage that all pods share.
    """
    if claim is None:
        match = BUCKET.fullmatch(workdir)
        if not match or ".." in workdir.split("/"):
            raise UserError(
                f"--workdir is {workdir!r}; give gs://BUCKET/PATH without '..', or a path in the "
                "volume claim that --claim names: all pods must share it."
            )
        mount = f"/gcs/{match[1]}"
        # Checkpoints are folders that are renamed when whole.
        options = {"bucketName": match[1], "mountOptions": "implicit-dirs,rename-dir-limit=200000"}
        volume = {"driver": "gcsfuse.csi.storage.gke.io", "volumeAttributes": options}
        return {
            "folder": f"{mount}/{match[2].rstrip('/')}",
            "mount": mount,
            "uses_bucket": "true",
            "bucket_volume": volume,
            "claim_volume": None,
        }
    path = pathlib.PurePosixPath(workdir)
    if not path.parts or path.is_absolute() or ".." in path.parts or workdir.startswith("gs:"):
        raise UserError(
            f"--workdir is {workdir!r}; with --claim, give a path in that volume, like runs/base."
        )
    return {
        "folder": f"/mnt/{claim}/{path}",
        "mount": f"/mnt/{claim}",
        "uses_bucket": None,
        "bucket_volume": None,
        "claim_volume": {"claimName": claim},
    }


def hardware(settings: dict) -> tuple[str, dict]:
    """The template's file name, and its values that say what it runs on.

    Raises:
      UserError: neither TPUs nor GPUs are named, both are, or they don't exist so.
    """
    topology, gpus, name = settings["topology"], settings["gpus"], settings["name"]
    if (topology is None) == (gpus is None):
        raise UserError("Name what to train on: --topology v5e-256, or --gpus nvidia-h100-80gb:8.")
    if topology is not None:
        if settings["nodes"] is not None:
            raise UserError("--nodes goes with --gpus; --topology tells how many hosts there are.")
        slices = tpu_names.parse(topology, rented=True)
        hosts, chips = tpu_names.hosts(slices, settings["chips_per_host"])
        return "gke_tpu.yaml", {
            "accelerator": tpu_names.NODE_LABELS[slices.generation],
            "topology": tpu_names.node_topology(slices),
            "slices": slices.slices,
            "hosts": hosts,
            "chips": chips,
        }
    if settings["chips_per_host"] is not None:
        raise UserError("--chips-per-host goes with --topology; --gpus tells how many a node has.")
    match = re.fullmatch(r"([a-z0-9-]+):([1-9][0-9]?)", gpus)
    if not match:
        raise UserError(f"--gpus is {gpus!r}; give a kind and the number on a node, like l4:1.")
    nodes = settings["nodes"] or 1
    return "gke_gpu.yaml", {
        "accelerator": match[1],
        "gpus": int(match[2]),
        "nodes": nodes,
        "processes": str(nodes),
        "coordinator": f"{name}-train-0-0.{name}:{PORT}",
    }


def names_config(words: tuple[str, ...]) -> bool:
    """Whether the words hold a --config with a value, which isn't the next option."""
    values = [after for word, after in itertools.pairwise(words) if word == "--config"]
    values += [word.removeprefix("--config=") for word in words if word.startswith("--config=")]
    return any(value.split(":")[0] and not value.startswith("--") for value in values)


def manifest(settings: dict, words: tuple[str, ...]) -> dict:
    """The JobSet that trains with `words`, which `cascade train` takes beyond --workdir.

    Args:
      settings: the options of `up`.

    Raises:
      UserError: as `storage` and `hardware`; no config among the words, or one isn't text.
    """
    for word in words:
        try:
            word.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{word!r} isn't text in UTF-8, which a manifest must be.") from error
        if re.match(r"--workdir(=|$)", word):
            raise UserError("--workdir is the launcher's; give it before the --.")
        if match := re.match(r"(--(coordinator|process|processes))(=|$)", word):
            raise UserError(
                f"{match[1]} is the launcher's to tell every process; leave it out after the --."
            )
    if not names_config(words):
        raise UserError("No config; end with '-- --config PATH' and its overrides.")
    template, values = hardware(settings)
    place = storage(settings["workdir"], settings["claim"])
    folder = place.pop("folder")
    spot = {"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true"}
    values |= place | {
        key: settings[key]
        for key in ("name", "namespace", "queue", "priority", "image", "secret", "service_account")
    }
    values["restarts"] = settings["restarts"]
    values["spot"] = "true" if settings["spot"] else None
    values["spot_toleration"] = spot | {"effect": "NoSchedule"} if settings["spot"] else None
    values["args"] = [literal(word) for word in (folder, *words)]
    return fill(yaml.safe_load((HERE / template).read_text(encoding="utf-8")), values)


class Dumper(yaml.SafeDumper):
    """Writes text in double quotes, but for plain words: YAML's readers differ in what they take
    for a number or a line's end."""


def _represent_text(dumper: Dumper, text: str):
    plain = re.fullmatch(r"[A-Za-z][\w./-]{2,}", text, re.ASCII)
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if plain else '"')


Dumper.add_representer(str, _represent_text)


def as_yaml(tree: dict) -> str:
    """YAML text, for people too: keys in their order, unicode as it is."""
    return yaml.dump(tree, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=float("inf"))


def kubectl(words: list[str], *, dry_run: bool, text: str | None = None):
    """Runs kubectl, or prints the command as it can be pasted.

    Args:
      text: for its standard input.

    Raises:
      UserError: it isn't installed, or failed.
    """
    if dry_run:
        document = "" if text is None else f" <<'MANIFEST'\n{text}MANIFEST"
        click.echo(f"{shlex.join(['kubectl', *words])}{document}")
        return
    if shutil.which("kubectl") is None:
        raise UserError(
            "kubectl isn't installed here; install it, or add --dry-run to see what would be run."
        )
    done = subprocess.run(["kubectl", *words], input=text, text=True, encoding="utf-8")
    if done.returncode:
        raise UserError(f"kubectl {words[0]} ended with code {done.returncode}; see above.")


def matching(pattern: re.Pattern, what: str):
    """A check for click: an option's value, where there is one, is what the pattern says."""

    def check(ctx, param, value):
        if value is not None and not pattern.fullmatch(value):
            raise click.BadParameter(f"{value!r}; give {what}.", ctx, param)
        return value

    return check


own_name = matching(NAME, "lower-case letters, digits and dashes, at most 40")
others_name = matching(LABEL, "the name of one, of lower-case letters, digits, dashes and dots")
image_name = matching(IMAGE, "an image's address, like us-docker.pkg.dev/p/r/cascade:tpu")
name_option = click.option("--name", required=True, callback=own_name, help="The JobSet's name.")
namespace_option = click.option(
    "--namespace", default="default", show_default=True, callback=others_name
)
dry_run_option = click.option("--dry-run", is_flag=True, help="Print what would be run.")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
def main():
    """Train on Google Kubernetes Engine.

    Example: launch/gke.py up --name base --queue tpus --topology v5e-16
    --image us-docker.pkg.dev/p/r/cascade:tpu --workdir gs://my-bucket/runs/base
    -- --config configs/imagen/base64_400m.py
    """


@main.command()
@name_option
@namespace_option
@dry_run_option
@click.option("--image", required=True, callback=image_name, help="Of launch/Dockerfile.")
@click.option("--workdir", required=True, help="gs://BUCKET/PATH, or with --claim a path in it.")
@click.option(
    "--claim",
    callback=others_name,
    help="A volume claim that all pods may write to, instead of a bucket.",
)
@click.option("--topology", help="TPU slices, like v5e-256; 2xv5e-256 is two of them.")
@click.option("--chips-per-host", type=click.Choice(["1", "4", "8"]), help="[default: 4]")
@click.option("--gpus", help="Kind of GPU and how many a node has, like nvidia-h100-80gb:8.")
@click.option("--nodes", type=click.IntRange(1), help="GPU nodes. [default: 1]")
@click.option(
    "--queue",
    callback=others_name,
    help="Kueue's LocalQueue to wait in. [default: none, start at once]",
)
@click.option("--priority", callback=others_name, help="Kueue's WorkloadPriorityClass.")
@click.option("--spot", is_flag=True, help="On spot nodes: cheaper, and may be preempted.")
@click.option(
    "--secret",
    callback=others_name,
    help="A Secret in the namespace, whose entries pods have as environment.",
)
@click.option("--service-account", callback=others_name, help="That may write to the bucket.")
@click.option("--restarts", type=click.IntRange(0), default=10, show_default=True)
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="-- --config CONFIG ...")
def up(words, dry_run, chips_per_host, **settings):
    """Start a training, or queue it. What follows -- goes to every `cascade train` unchanged.

    Failures restart it up to --restarts times; preemptions don't count.
    """
    settings["chips_per_host"] = None if chips_per_host is None else int(chips_per_host)
    text = as_yaml(manifest(settings, words))
    kubectl(["apply", "--filename=-"], dry_run=dry_run, text=text)


@main.command()
@name_option
@namespace_option
@dry_run_option
@click.option(
    "--lines", type=click.IntRange(1), default=100, show_default=True, help="Of each pod."
)
def logs(name, namespace, lines, dry_run):
    """Print the last lines of every pod's log."""
    pods = f"--selector=jobset.sigs.k8s.io/jobset-name={name}"
    words = ["logs", f"--namespace={namespace}", pods, "--container=train", "--prefix"]
    kubectl([*words, f"--tail={lines}"], dry_run=dry_run)


@main.command()
@name_option
@namespace_option
@dry_run_option
def delete(name, namespace, dry_run):
    """Delete the JobSet with its pods; the run's folder stays."""
    kubectl(["delete", "jobset", name, f"--namespace={namespace}"], dry_run=dry_run)


if __name__ == "__main__":
    try:
        main(standalone_mode=False)
    except (UserError, click.ClickException) as error:
        said = error.format_message() if isinstance(error, click.ClickException) else str(error)
        click.echo(f"error: {' '.join(said.split())}", err=True)
        sys.exit(2)

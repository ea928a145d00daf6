"""A `gcloud` whose cloud is the folder $CLOUD: TPU VMs with workers of their own, and buckets.

    state                what `describe` tells; no file: there are none
    buckets/NAME/...     what gs://NAME/... holds
    workers/I            worker I's home folder, gone with the TPU VMs
    calls                a line of JSON for each call
    outages              how many more calls of ssh fail, as a lost connection does
    full                 how many more calls to create fail for want of TPUs

Commands by ssh run through `bash -c`, as at the other end of a real one.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

CLOUD = Path(os.environ["CLOUD"])
WORKERS = 2


def local(place: str) -> Path:
    """The file or folder of a gs:// address or a local path."""
    return CLOUD / "buckets" / place[5:] if place.startswith("gs://") else Path(place)


def fails(name: str) -> bool:
    """Whether a call is one of those that the file of this name counts; counts it."""
    file = CLOUD / name
    if not file.exists():
        return False
    left = int(file.read_text()) - 1
    file.write_text(str(left)) if left else file.unlink()
    return True


def on_workers(action) -> int:
    """Calls an action with each worker's home; the highest code."""
    if not (CLOUD / "state").exists() or (CLOUD / "state").read_text() not in ("READY", "ACTIVE"):
        return 255
    return max(action(home) for home in sorted((CLOUD / "workers").iterdir()))


def ssh(words: list[str]) -> int:
    """Runs --command=... on all workers."""
    (command,) = (word[10:] for word in words if word.startswith("--command="))
    if fails("outages"):
        return 255

    def run(home: Path) -> int:
        environment = {**os.environ, "HOME": str(home)}
        return subprocess.run(["bash", "-c", command], cwd=home, env=environment).returncode

    return on_workers(run)


def scp(words: list[str]) -> int:
    """Copies a file to the home of all workers, its mode with -p."""
    source, target = [word for word in words if not word.startswith("-")][:2]

    def place(home: Path) -> int:
        copy = shutil.copy if "--scp-flag=-p" in words else shutil.copyfile
        copy(source, home / target.split(":")[1])
        return 0

    return on_workers(place)


def tpus(verb: str, kind: str, words: list[str]) -> int:
    """create, describe, delete."""
    state = CLOUD / "state"
    if verb == "create":
        if state.exists():
            print("ERROR: ALREADY_EXISTS", file=sys.stderr)
            return 1
        if fails("full"):
            print("ERROR: RESOURCE_EXHAUSTED", file=sys.stderr)
            return 1
        for index in range(WORKERS):
            (CLOUD / "workers" / str(index)).mkdir(parents=True)
        state.write_text("READY" if kind == "tpu-vm" else "ACTIVE")
    elif not state.exists():
        print(f"ERROR: (gcloud.compute.tpus.{kind}.{verb}) NOT_FOUND: no such", file=sys.stderr)
        return 1
    elif verb == "describe":
        print(state.read_text())
    else:
        assert "--quiet" in words and (kind == "tpu-vm" or "--force" in words)
        shutil.rmtree(CLOUD / "workers")
        state.unlink()
    return 0


def main(words: list[str]) -> int:
    """One call of gcloud."""
    with (CLOUD / "calls").open("a") as calls:
        calls.write(json.dumps(words) + "\n")
    if words[:2] == ["storage", "cp"]:
        target = local(words[3])
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(local(words[2]), target)
        return 0
    if words[:2] == ["storage", "ls"]:
        return 0 if local(words[2]).exists() else 1
    assert words[:2] == ["compute", "tpus"], words
    kind, verb, *rest = words[2:]
    if verb == "ssh":
        return ssh(rest)
    if verb == "scp":
        return scp(rest)
    return tpus(verb, kind, rest)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

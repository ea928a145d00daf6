"""Programs that stand in for a cloud's or a cluster's, in a folder for the front of PATH."""

import stat
import sys
from pathlib import Path

# Keeps its words, each ended by NUL, in a file of its own, and ends with what $ENDS_WITH says.
RECORDER = """#!/usr/bin/env bash
printf '%s\\0' "${0##*/}" "$@" >"$(mktemp "$RECORDS/XXXXXX")"
[[ -z ${MAKES:-} ]] || echo '{"step": 8}' >"$MAKES"
exit "${ENDS_WITH:-0}"
"""

# One step of a job: a process a task, told its place as Slurm tells it. SIGTERM kills the tasks.
SRUN = """#!/usr/bin/env bash
while [[ $1 == -* ]]; do shift; done
tasks=()
trap 'kill -KILL "${tasks[@]}"' TERM
for ((i = 0; i < SLURM_NTASKS; i++)); do
  SLURM_PROCID=$i SLURM_LOCALID=$i SLURM_STEP_NODELIST=localhost SLURM_STEP_NUM_NODES=1 \
    SLURM_STEP_NUM_TASKS=$SLURM_NTASKS "$@" >"$TASKS/$i.$SLURM_RESTART_COUNT" 2>&1 &
  tasks+=($!)
  echo $! >"$TASKS/$i.$SLURM_RESTART_COUNT.pid"
done
worst=0
for task in "${tasks[@]}"; do
  while kill -0 "$task" 2>/dev/null; do wait "$task"; done
  wait "$task" || code=$?
  ((${code:-0} <= worst)) || worst=$code
done
exit "$worst"
"""

# Runs the job here, again for as long as it has itself requeued.
SBATCH = """#!/usr/bin/env bash
for word in "$@"; do [[ $word == --ntasks-per-node=* ]] && tasks=${word#*=}; done
while [[ $1 == -* ]]; do shift; done
export SLURM_JOB_ID=$JOB SLURM_NTASKS=$tasks SLURM_RESTART_COUNT=0
cp "$1" "$TASKS/copy"
shift
while :; do
  rm -f "$TASKS/requeued"
  bash "$TASKS/copy" "$@" &
  echo $! >"$TASKS/batch"
  wait $!
  code=$?
  [[ -e $TASKS/requeued ]] || exit "$code"
  SLURM_RESTART_COUNT=$((SLURM_RESTART_COUNT + 1))
done
"""

# A signal for the tasks of a job, and not for its script.
SCANCEL = """#!/usr/bin/env bash
[[ $1 == --signal=TERM && $2 == "$SLURM_JOB_ID" ]] && kill -TERM $(cat "$TASKS"/*.pid)
rm "$TASKS"/*.pid
"""

SCONTROL = """#!/usr/bin/env bash
[[ $1 == requeue && $2 == "$SLURM_JOB_ID" ]] && touch "$TASKS/requeued"
"""

CASCADE = f"""#!/usr/bin/env bash
exec "{sys.executable}" -c 'from cascade.cli import main; main()' "$@"
"""


def install(folder: Path, **programs: str) -> Path:
    """Writes programs, by name, into a new folder and returns it."""
    folder.mkdir()
    for name, text in programs.items():
        path = folder / name
        path.write_text(text, encoding="utf-8")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return folder


def records(folder: Path) -> list[list[str]]:
    """The words of each call that RECORDER kept."""
    return [path.read_bytes().decode().split("\0")[:-1] for path in sorted(folder.iterdir())]

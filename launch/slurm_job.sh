#!/usr/bin/env bash
# What launch/slurm.sh submits: trains on the job's nodes, starts again what failed, and has Slurm
# requeue the job where it was stopped before the training was finished.
#
# Usage: slurm_job.sh LAUNCH_FOLDER WORKDIR RETRIES REQUEUES SECRETS_FILE COMMAND...
set -euo pipefail
# sbatch runs a copy of this file, so its neighbours are looked for where they were.
# shellcheck source=launch/common.sh
source "$1/common.sh"
workdir=$2 retries=$3 requeues=$4 secrets=$5
shift 5
[[ -z $secrets ]] || read_secrets "$secrets"

# USR1: the time limit is near (--signal), or preemption where Slurm is set to say so; TERM:
# preemption. The tasks have TERM then, save at the same step and end with 0. Not by way of srun,
# which takes TERM to mean that it is to kill them; scancel leaves this script alone.
stopping=no
# shellcheck disable=SC2329 # the trap calls it
stop() {
  stopping=yes
  scancel --signal=TERM "$SLURM_JOB_ID" || true
}
trap stop USR1 TERM

while [[ $stopping == no ]]; do
  began=$SECONDS code=0
  # Where a task is killed the others stop by themselves; those that don't are ended after 120 s.
  srun --kill-on-bad-exit=0 --wait=120 "$@" &
  wait_for 120 $! || code=$?
  [[ ! -e $workdir/finished.json ]] || exit "$code"
  [[ $code != 2 || $stopping == yes ]] || exit 2 # a mistake in the input stays one
  # All saved: the tasks had the signal themselves, and the nodes will be taken.
  ((code != 0)) || stopping=yes
  [[ $stopping == yes ]] || another_try $((SECONDS - began)) "$code" "$retries" 10 || exit "$code"
done
count=${SLURM_RESTART_COUNT:-0}
if ((count >= requeues)); then
  fail "stopped before the end after $count requeues; submit the same again."
fi
say "Stopped before the end; requeueing job $SLURM_JOB_ID, which goes on from what was saved."
scontrol requeue "$SLURM_JOB_ID"

#!/usr/bin/env bash
# Submits a training to Slurm as a job that saves and requeues itself when its time ends or it is
# preempted. What the job does on its nodes is slurm_job.sh.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/common.sh
source "$here/common.sh"

usage() {
  cat <<'HELP'
Usage: launch/slurm.sh --workdir DIR [options] -- --config CONFIG [--config.key=value ...]

Submits a training. What follows -- goes to every `cascade train` unchanged. Submit from the
environment that has cascade; the job inherits it. This checkout and DIR must be on storage that
all nodes share.

  --workdir DIR          the run's folder; the same command resumes what is in it
  --name NAME            the job's name [cascade]
  --nodes N              how many nodes [1]
  --tasks-per-node N     processes on each; a process takes all GPUs that its task sees [1]
  --gpus-per-node N      GPUs on each
  --time LIMIT           as sbatch takes it, like 04:00:00; the job goes on in a new one after it
  --grace SECONDS        before the limit, to save in [120]
  --sbatch OPTION        one more option for sbatch, like --sbatch=--partition=a100; repeatable
  --secrets FILE         NAME=value lines (HF_TOKEN=...), readable by you alone, for the tasks
  --retries N            give up after so many failed tries in a row [10]
  --requeues N           give up after so many requeues [100]
  --dry-run              print what would be run

Example:
  launch/slurm.sh --workdir /scratch/runs/base --nodes 4 --gpus-per-node 8 --time 04:00:00 \
    --sbatch=--partition=a100 -- --config configs/emoji/base64.py --config.train.batch_size=512

It logs to DIR/slurm-JOB.log. scancel JOB ends it for good.
HELP
}

workdir='' name=cascade nodes=1 tasks=1 gpus=0 limit='' grace=120 secrets='' retries=10 requeues=100
dry_run=no more=()
while (($#)); do
  [[ $1 != --?*=* ]] || set -- "${1%%=*}" "${1#*=}" "${@:2}" # --option=value
  case $1 in
    -h | --help) usage; exit 0 ;;
    --dry-run) dry_run=yes; shift ;;
    --) shift; break ;;
    --sbatch) handed_on "$@"; more+=("$2"); shift 2 ;;
    --workdir | --name | --nodes | --tasks-per-node | --gpus-per-node | --time | --grace | \
      --secrets | --retries | --requeues)
      value "$@"
      case $1 in
        --workdir) workdir=$2 ;;
        --name) name=$2 ;;
        --nodes) whole "$1" "$2" 1; nodes=$2 ;;
        --tasks-per-node) whole "$1" "$2" 1; tasks=$2 ;;
        --gpus-per-node) whole "$1" "$2" 1; gpus=$2 ;;
        --time) limit=$2 ;;
        --grace) whole "$1" "$2" 1 65535; grace=$2 ;; # sbatch takes no more
        --secrets) secrets=$2 ;;
        --retries) whole "$1" "$2" 0; retries=$2 ;;
        --requeues) whole "$1" "$2" 0; requeues=$2 ;;
      esac
      shift 2
      ;;
    *) fail "unknown option '$1'; what cascade train takes follows --, see --help." ;;
  esac
done
[[ -n $workdir ]] || fail "no --workdir; give a folder that all nodes share."
[[ $workdir != gs://* ]] || fail "--workdir is a bucket; give a folder that all nodes share."
[[ $workdir == /* ]] || workdir=$PWD/$workdir
[[ $name != *[[:cntrl:]]* ]] || fail "--name is '$name'; give one line of text."
[[ -z $limit || ${limit,,} =~ ^(unlimited|infinite)$ ||
  $limit =~ ^([0-9]+-)?[0-9]+(:[0-9]+){0,2}$ ]] ||
  fail "--time is '$limit'; give minutes, HOURS:MINUTES:SECONDS or DAYS-HOURS, like 04:00:00."
training "$@"
need sbatch "run this on a login node of a Slurm cluster"
need cascade "activate the environment that has it (pip install -e .)"
if [[ -n $secrets ]]; then
  [[ $secrets == /* ]] || secrets=$PWD/$secrets
  check_secrets "$secrets"
fi

options=(
  --job-name="$name" --nodes="$nodes" --ntasks-per-node="$tasks"
  --requeue --open-mode=append --signal="B:USR1@$grace" --output="${workdir//%/%%}/slurm-%j.log"
)
((gpus == 0)) || options+=(--gpus-per-node="$gpus")
[[ -z $limit ]] || options+=(--time="$limit")
run mkdir -p "$workdir"
run sbatch "${options[@]}" "${more[@]}" "$here/slurm_job.sh" \
  "$here" "$workdir" "$retries" "$requeues" "$secrets" cascade train --workdir "$workdir" "$@"

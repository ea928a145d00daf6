#!/usr/bin/env bash
# Trains with several processes on this machine, and starts them again where they were stopped.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/common.sh
source "$here/common.sh"

usage() {
  cat <<'HELP'
Usage: launch/local.sh --workdir DIR [options] -- --config CONFIG [--config.key=value ...]

Trains with N processes on this machine. What follows -- goes to every `cascade train` unchanged.

  --workdir DIR       the run's folder; the same command resumes what is in it
  --processes N       how many processes [2]
  --gpus-each K       give process i the GPUs i*K ... i*K+K-1; without it each sees them all
  --port P            of this machine, where they meet [8476]
  --secrets FILE      NAME=value lines (HF_TOKEN=...), readable by you alone, for their environment
  --retries N         give up after so many failed tries in a row [10]
  --backoff SECONDS   before the first new try; doubles up to 600 [10]
  --dry-run           print what would be run

Example:
  launch/local.sh --processes 2 --workdir runs/base -- \
    --config configs/emoji/base64.py:smoke --config.train.steps=8
HELP
}

workdir='' processes=2 gpus=0 port=8476 secrets='' retries=10 backoff=10 dry_run=no
while (($#)); do
  [[ $1 != --?*=* ]] || set -- "${1%%=*}" "${1#*=}" "${@:2}" # --option=value
  case $1 in
    -h | --help) usage; exit 0 ;;
    --dry-run) dry_run=yes; shift ;;
    --) shift; break ;;
    --workdir | --processes | --gpus-each | --port | --secrets | --retries | --backoff)
      value "$@"
      case $1 in
        --workdir) workdir=$2 ;;
        --processes) whole "$1" "$2" 1 1024; processes=$2 ;;
        --gpus-each) whole "$1" "$2" 1 64; gpus=$2 ;;
        --port) whole "$1" "$2" 1 65535; port=$2 ;;
        --secrets) secrets=$2 ;;
        --retries) whole "$1" "$2" 0; retries=$2 ;;
        --backoff) whole "$1" "$2" 0; backoff=$2 ;;
      esac
      shift 2
      ;;
    *) fail "unknown option '$1'; what cascade train takes follows --, see --help." ;;
  esac
done
[[ -n $workdir ]] || fail "no --workdir; give the run's folder."
[[ $workdir != gs://* ]] || fail "--workdir is a bucket; give a folder (mount the bucket, say)."
training "$@"
need cascade "activate the environment that has it (pip install -e .)"

# one_process I: sets `settings`, the environment by which process I finds the others.
one_process() {
  settings=(
    "CASCADE_COORDINATOR=localhost:$port" "CASCADE_PROCESSES=$processes" "CASCADE_PROCESS=$1"
  )
  if ((gpus)); then
    settings+=("CUDA_VISIBLE_DEVICES=$(seq -s, $((gpus * $1)) $((gpus * $1 + gpus - 1)))")
  fi
}

train=(cascade train --workdir "$workdir" "$@")
if [[ $dry_run == yes ]]; then
  [[ -z $secrets ]] || check_secrets "$secrets"
  [[ -z $secrets ]] || echo "# The NAME=value lines of $secrets are added to the environment."
  for ((i = 0; i < processes; i++)); do
    one_process "$i"
    echo "$(quoted env "${settings[@]}" "${train[@]}") &"
  done
  echo "wait"
  echo "# Until $(quoted "$workdir/finished.json") is there, again; at most $retries times in a row."
  exit 0
fi

[[ -z $secrets ]] || read_secrets "$secrets"
stopping=no running=()
# Processes started with & ignore Ctrl-C, so that too reaches them as SIGTERM: all save, then stop.
# shellcheck disable=SC2329 # the trap calls it
stop() {
  stopping=yes
  ((${#running[@]} == 0)) || kill -TERM "${running[@]}" 2>/dev/null || true
}
trap stop TERM INT

while [[ $stopping == no ]]; do
  began=$SECONDS code=0 pids=()
  for ((i = 0; i < processes; i++)); do
    one_process "$i"
    if ((i == 0)); then
      env "${settings[@]}" "${train[@]}" &
    else
      env "${settings[@]}" "${train[@]}" > >(
        trap '' INT TERM # it ends with the process that it reads from
        while IFS= read -r line; do printf '[process %s] %s\n' "$i" "$line"; done
      ) 2>&1 &
    fi
    pids+=($!)
    running=("${pids[@]}")
  done
  wait_for 120 "${pids[@]}" || code=$?
  [[ ! -e $workdir/finished.json ]] || exit "$code"
  [[ $code != 2 || $stopping == yes ]] || exit 2 # a mistake in the input stays one
  [[ $stopping == yes ]] || another_try $((SECONDS - began)) "$code" "$retries" "$backoff" ||
    exit $((code ? code : 1))
done
say "Stopped before the end; the same command goes on."
exit "${code:-0}"

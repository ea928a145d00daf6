#!/usr/bin/env bash
# Trains on Cloud TPU VMs: creates or queues them, installs this checkout on every worker, trains,
# creates them again when they were preempted, and deletes them in the end.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(dirname "$here")
# shellcheck source=launch/common.sh
source "$here/common.sh"

usage() {
  cat <<'HELP'
Usage: launch/tpu_vm.sh COMMAND --name NAME --zone ZONE [options] [-- --config CONFIG ...]

  train       all of it: create, bootstrap, run, watch; create again what was preempted; delete
  create      create the TPU VMs, or queue for them
  bootstrap   on every worker: mount the bucket, install this checkout's commit
  run         on every worker: start training, which goes on without this machine
  status      what each worker does: running, ended CODE or idle
  logs        the last lines of every worker's log
  delete      delete the TPU VMs, and the request for them

What follows -- goes to every `cascade train` unchanged (train and run need it).

  --name NAME         of the TPU VM
  --zone ZONE         and --project PROJECT [gcloud's own], where it is
  --topology T        v4-, v5e-, v5p- or v6e-SIZE such as v5p-512; 2xv5e-256 is two slices
  --workdir gs://B/P  the run's folder; workers see it as /gcs/B/P, and may write to it
  --queue             request it as a queued resource, and wait; several slices always are
  --spot              spot capacity: cheaper, and may be preempted
  --create OPTION     one more option for creating, like --create=--network=mine; repeatable
  --runtime VERSION   the image [the one that Google names for the generation]
  --secrets FILE      NAME=value lines (HF_TOKEN=...), readable by you alone: copied by scp
  --keep              train: leave the TPU VMs in the end; they go on costing
  --poll SECONDS      between looks at the workers [60]
  --retries N         train: give up after so many failed tries in a row [10]
  --backoff SECONDS   before the first new try; doubles up to 600 [30]
  --lines N           logs: how many [100]
  --dry-run           print what would be run

Example:
  launch/tpu_vm.sh train --name base --zone us-east5-a --topology v5p-512 --queue --spot \
    --workdir gs://my-bucket/runs/base -- --config configs/imagen/base64_2b.py \
    --config.text_cache.folder=/gcs/my-bucket/text_cache
HELP
}

name='' zone='' project='' topology='' workdir='' queue=no spot=no more=() runtime='' secrets=''
keep=no poll=60 retries=10 backoff=30 lines=100 dry_run=no
case ${1:-} in
  train | create | bootstrap | run | status | logs | delete) job=$1; shift ;;
  -h | --help) usage; exit 0 ;;
  *) fail "'${1:-}' isn't train, create, bootstrap, run, status, logs or delete; see --help." ;;
esac
while (($#)); do
  [[ $1 != --?*=* ]] || set -- "${1%%=*}" "${1#*=}" "${@:2}" # --option=value
  case $1 in
    -h | --help) usage; exit 0 ;;
    --dry-run) dry_run=yes; shift ;;
    --queue) queue=yes; shift ;;
    --spot) spot=yes; shift ;;
    --keep) keep=yes; shift ;;
    --create) handed_on "$@"; more+=("$2"); shift 2 ;;
    --) shift; break ;;
    --name | --zone | --project | --topology | --workdir | --runtime | --secrets | --poll | \
      --retries | --backoff | --lines)
      value "$@"
      case $1 in
        --name) name=$2 ;;
        --zone) zone=$2 ;;
        --project) project=$2 ;;
        --topology) topology=$2 ;;
        --workdir) workdir=${2%/} ;;
        --runtime) runtime=$2 ;;
        --secrets) secrets=$2 ;;
        --poll) whole "$1" "$2" 1; poll=$2 ;;
        --retries) whole "$1" "$2" 0; retries=$2 ;;
        --backoff) whole "$1" "$2" 0; backoff=$2 ;;
        --lines) whole "$1" "$2" 1; lines=$2 ;;
      esac
      shift 2
      ;;
    *) fail "unknown option '$1'; what cascade train takes follows --, see --help." ;;
  esac
done
[[ $name =~ ^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$ ]] ||
  fail "--name is '$name'; give one of lower-case letters, digits and dashes, at most 40."
[[ $zone =~ ^[a-z]+-[a-z0-9-]+$ ]] ||
  fail "--zone is '$zone'; give the one that the TPU is in, like us-east5-a."
[[ -z $project || $project =~ ^[a-z][a-z0-9.:-]*$ ]] ||
  fail "--project is '$project'; give a project's ID, like my-project-123."
need gcloud "install the Google Cloud CLI"

case $job in
  train | bootstrap | run)
    [[ $workdir =~ ^gs://[a-z0-9._-]+/[^/[:cntrl:]][^[:cntrl:]]*$ && $workdir/ != */../* ]] ||
      fail "--workdir is '$workdir'; give gs://BUCKET/PATH without '..', which all workers can" \
        "write to."
    ;;
esac
case $job in train | run) training "$@" ;; esac
accelerator='' slices=1
if [[ $job == train || $job == create || -n $topology ]]; then
  [[ -n $topology ]] || fail "no --topology; give the slice to rent, like v5p-512."
  names=$(python3 "$here/tpu_names.py" "$topology" 2>&1) || { say "$names"; exit 2; }
  read -r accelerator usual slices <<<"$names"
  runtime=${runtime:-$usual}
fi
((slices == 1)) || queue=yes

# Where everything is; the commands of both kinds are alike.
place=(--zone="$zone")
[[ -z $project ]] || place+=(--project="$project")
tpus=(gcloud compute tpus tpu-vm)
workers=(--worker=all)
state_of=state
if [[ $queue == yes ]]; then
  tpus=(gcloud compute tpus queued-resources)
  workers=(--node=all --worker=all)
  state_of=state.state
fi
archive=${XDG_CACHE_HOME:-$HOME/.cache}/cascade/launch/$name.tar.gz

create() {
  local options=(--accelerator-type="$accelerator")
  if [[ $queue == no ]]; then
    options+=(--version="$runtime")
  elif ((slices == 1)); then
    options+=(--runtime-version="$runtime" --node-id="$name")
  else
    options+=(--runtime-version="$runtime" --node-count="$slices" --node-prefix="$name")
  fi
  [[ $spot == no ]] || options+=(--spot)
  run "${tpus[@]}" create "$name" "${place[@]}" "${options[@]}" "${more[@]}"
}

# on_workers WORD...: runs these words there, quoted for the shell at the other end.
on_workers() {
  run "${tpus[@]}" ssh "$name" "${place[@]}" "${workers[@]}" --command="$(quoted "$@")"
}

# What is committed is what is trained: every worker has the same, and the log can say which.
pack() {
  if [[ $dry_run == no && -n ${config:-} ]]; then
    [[ -n $(git -C "$root" ls-tree HEAD -- "$config") ]] ||
      fail "$config isn't in this checkout's last commit, which workers install; commit it."
    [[ -z $(git -C "$root" status --porcelain --untracked-files=no) ]] ||
      say "Changes that aren't committed aren't trained with."
  fi
  run mkdir -p "${archive%/*}"
  run git -C "$root" archive --format=tar.gz --output="$archive" HEAD
}

bootstrap() {
  run gcloud storage cp "$archive" "$workdir/launch/source.tar.gz" &&
    run gcloud storage cp "$here/tpu_vm_host.sh" "$workdir/launch/tpu_vm_host.sh" || return
  if [[ -n $secrets ]]; then
    # -p keeps the file's mode: readable by its owner alone.
    run "${tpus[@]}" scp "$secrets" "$name:.cascade-secrets" "${place[@]}" "${workers[@]}" \
      --scp-flag=-p || return
  fi
  on_workers gcloud storage cp "$workdir/launch/tpu_vm_host.sh" tpu_vm_host.sh &&
    on_workers bash tpu_vm_host.sh bootstrap "$workdir"
}

start() { on_workers bash tpu_vm_host.sh run "$workdir" "$@"; }
status() { on_workers bash tpu_vm_host.sh status; }
logs() { on_workers bash tpu_vm_host.sh logs "$lines"; }
is_finished() { run gcloud storage ls "$workdir/finished.json" >/dev/null 2>&1; }

delete() {
  local force=()
  [[ $queue == no ]] || force=(--force)
  run "${tpus[@]}" delete "$name" "${place[@]}" "${force[@]}" --quiet
}

# What Google says of it; NONE where there is none, UNKNOWN where it can't be asked.
state() {
  local ask=("${tpus[@]}" describe "$name" "${place[@]}" --format="value($state_of)") told
  if "${ask[@]}" 2>/dev/null; then return; fi
  told=$("${ask[@]}" 2>&1 >/dev/null) || true
  case $told in
    *NOT_FOUND* | *"not found"*) echo NONE ;;
    *) say "$told"; echo UNKNOWN ;;
  esac
}

# watch: returns once no worker trains any more, or none can be reached: 0 finished, 2 a mistake in
# the input, else 1.
watch() {
  local told
  while told=$(status 2>&1); do
    if ! grep -qx running <<<"$told"; then
      is_finished && return 0
      grep -qx 'ended [0-9]*' <<<"$told" || return 1
      # Where all ended with 2 there is a mistake in the input, which another try won't mend.
      grep -x 'ended [0-9]*' <<<"$told" | grep -qvx 'ended 2' && return 1
      return 2
    fi
    sleep "$poll"
  done
  return 1
}

finish() {
  if [[ $keep == yes ]]; then
    say "Kept $name in $zone, which goes on costing; 'launch/tpu_vm.sh delete' ends that."
  else
    say "Deleting $name."
    delete || say "It couldn't be deleted and goes on costing; delete it by hand."
  fi
  exit "$1"
}

train() {
  local prepared=no code began
  pack
  trap 'say "$name goes on and costs; train again watches it, delete ends it."; exit 130' INT TERM
  while :; do
    began=$SECONDS code=1
    case $(state) in
      NONE)
        prepared=no
        create && continue
        ;;
      READY | ACTIVE)
        [[ $prepared == yes ]] || { bootstrap && prepared=yes; }
        if [[ $prepared == yes ]] && start "$@"; then
          code=0
          watch || code=$?
          ((code != 0)) || finish 0
          logs || true
          ((code != 2)) || finish 2
        fi
        ;;
      PREEMPTED | TERMINATED | STOPPED | SUSPENDED | FAILED)
        say "$name was preempted or failed; creating it again."
        prepared=no
        delete || true
        ;;
      UNKNOWN) ;; # what gcloud said is printed
      # It is being created, repaired or deleted, or waits in the queue.
      *) sleep "$poll"; continue ;;
    esac
    another_try $((SECONDS - began)) "$code" "$retries" "$backoff" || finish 1
  done
}

case $job in
  create) create ;;
  bootstrap) pack; bootstrap ;;
  run) start "$@" ;;
  status) status ;;
  logs) logs ;;
  delete) delete ;;
  train)
    [[ -z $secrets ]] || check_secrets "$secrets"
    if [[ $dry_run == no ]]; then train "$@"; fi
    pack
    create
    bootstrap
    start "$@"
    echo "# Every $poll s, until no worker is running any more:"
    status
    echo "# Finished, where this is there; else the same again, at most $retries times in a row:"
    run gcloud storage ls "$workdir/finished.json"
    echo "# Where $name was preempted: delete, create, and so on from the third command."
    if [[ $keep == no ]]; then
      echo "# In the end, finished or not:"
      delete
    fi
    ;;
esac

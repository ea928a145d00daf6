#!/usr/bin/env bash
# What launch/tpu_vm.sh runs on every worker of a TPU VM, where it lies in the home folder.
#
#   tpu_vm_host.sh bootstrap gs://BUCKET/WORKDIR   mount the bucket, install what was uploaded there
#   tpu_vm_host.sh run gs://BUCKET/WORKDIR WORD... start `cascade train` with these words, return
#   tpu_vm_host.sh status                          print "running", "ended CODE" or "idle"
#   tpu_vm_host.sh logs LINES                      print the last lines of its log
set -euo pipefail
home=$HOME/cascade
secrets=$HOME/.cascade-secrets
this=$(realpath "${BASH_SOURCE[0]}")

running() { [[ -e $home/pid ]] && kill -0 "$(<"$home/pid")" 2>/dev/null; }

# mounted gs://BUCKET/PATH: prints /gcs/BUCKET/PATH, where training sees it.
mounted() { printf '/gcs/%s\n' "${1#gs://}"; }

mount_bucket() {
  local bucket=$1
  if ! command -v gcsfuse >/dev/null; then
    curl -fsSL https://packages.cloud.google.com/apt/doc/apt-key.gpg |
      sudo tee /usr/share/keyrings/cloud.google.asc >/dev/null
    echo "deb [signed-by=/usr/share/keyrings/cloud.google.asc]" \
      "https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -c -s) main" |
      sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
    sudo apt-get update -qq
    sudo apt-get install -y -qq gcsfuse
  fi
  mountpoint -q "/gcs/$bucket" && return
  sudo mkdir -p "/gcs/$bucket"
  sudo chown "$(id -u):$(id -g)" "/gcs/$bucket"
  # Checkpoints are folders that are renamed when whole.
  gcsfuse --implicit-dirs --rename-dir-limit=200000 "$bucket" "/gcs/$bucket"
}

bootstrap() {
  local workdir=$1 bucket
  bucket=${workdir#gs://}
  bucket=${bucket%%/*}
  if running; then
    echo "training is running; it is left as it is"
    return
  fi
  mkdir -p "$home"
  [[ ! -e $secrets ]] || chmod 600 "$secrets"
  mount_bucket "$bucket"
  gcloud storage cp "$workdir/launch/source.tar.gz" "$home/source.tar.gz"
  rm -rf "$home/source"
  mkdir "$home/source"
  tar -xzf "$home/source.tar.gz" -C "$home/source"
  # The image's own Python is older than 3.11.
  command -v uv >/dev/null || python3 -m pip install --quiet --user uv
  PATH=$HOME/.local/bin:$PATH
  [[ -x $home/venv/bin/python ]] || uv venv --python 3.12 "$home/venv"
  uv pip install --quiet --python "$home/venv/bin/python" "$home/source[tpu,hub]"
  mountpoint -q "/gcs/$bucket" && echo "ready"
}

start() {
  local workdir line
  workdir=$(mounted "$1")
  shift
  if running; then
    echo "already running"
    return
  fi
  if [[ -e $secrets ]]; then
    while IFS= read -r line || [[ -n $line ]]; do
      [[ ! $line =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] || export "${line?}"
    done <"$secrets"
  fi
  rm -f "$home/ended"
  cd "$home/source"
  # A session of its own, which outlives the ssh that started it.
  setsid bash "$this" supervise "$home/venv/bin/cascade" train --workdir "$workdir" "$@" \
    >>"$home/train.log" 2>&1 </dev/null &
  echo $! >"$home/pid"
  echo "started"
}

supervise() {
  local code=0
  "$@" || code=$?
  echo "$code" >"$home/ended"
}

status() {
  if running; then
    echo "running"
  elif [[ -e $home/ended ]]; then
    echo "ended $(<"$home/ended")"
  else
    echo "idle"
  fi
}

case ${1:-} in
  bootstrap) bootstrap "$2" ;;
  run) start "${@:2}" ;;
  supervise) supervise "${@:2}" ;;
  status) status ;;
  logs) tail -n "$2" "$home/train.log" ;;
  *) echo "error: '${1:-}' isn't bootstrap, run, status or logs." >&2 && exit 2 ;;
esac

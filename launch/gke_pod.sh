#!/usr/bin/env bash
# What a pod of launch/gke.py runs: trains, and ends with 90 where it was stopped before the end;
# the JobSet starts again then.
#
# Usage: gke_pod.sh WORKDIR WORD...   the words are what `cascade train` takes beyond --workdir
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
workdir=$1
shift

running=() stopping=no code=0
# shellcheck disable=SC2329 # the trap calls it
stop() {
  stopping=yes
  ((${#running[@]} == 0)) || kill -TERM "${running[@]}" 2>/dev/null || true
}
trap stop TERM INT
cascade train --workdir "$workdir" "$@" &
running=($!)
wait_for 0 $! || code=$?
# Another pod writes the file, and this one sees it a little later.
for ((i = 0; i < ${SEEN_WITHIN:-30}; i++)); do
  [[ $code == 0 && $stopping == no && ! -e $workdir/finished.json ]] || break
  sleep 1
done
if [[ $code == 0 && ! -e $workdir/finished.json ]]; then
  say "Stopped before the end; the JobSet goes on from what was saved."
  exit 90
fi
exit "$code"

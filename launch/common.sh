# shellcheck shell=bash
# What the launchers share: sentences, quoting, dry runs, secrets, starting again. To be sourced.

if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
  echo "error: this needs bash 4.4 or newer and found $BASH_VERSION; install a newer one." >&2
  exit 2
fi

# A try that lasted this many seconds shows that nothing is wrong with the command: after it, tries
# are counted from the first again.
LASTING=${LASTING:-600}

say() { printf '%s\n' "$*" >&2; }

fail() {
  say "error: ${*//[[:cntrl:]]/ }"
  exit 2
}

# quoted WORD...: prints a line that any POSIX shell reads back as exactly these words.
quoted() {
  local LC_ALL=C word line="" apostrophe="'\\''"
  for word in "$@"; do
    if [[ -z $word || $word == *[!A-Za-z0-9_@%+=:,./-]* ]]; then
      word="'${word//"'"/"$apostrophe"}'"
    fi
    line+="${line:+ }$word"
  done
  printf '%s\n' "$line"
}

# run COMMAND...: runs it; with dry_run=yes, prints it instead, ready to be pasted.
run() {
  if [[ ${dry_run:-no} == yes ]]; then quoted "$@"; else "$@"; fi
}

# need TOOL HOW: fails unless the tool is installed; a dry run needs none.
need() {
  [[ ${dry_run:-no} == yes ]] || command -v "$1" >/dev/null ||
    fail "$1 isn't installed here; $2, or add --dry-run to see what would be run."
}

# value OPTION [VALUE ...]: fails where an option's value is missing, empty, or the next option.
value() { [[ -n ${2:-} && $2 != --* ]] || fail "$1 needs a value; see --help."; }

# handed_on OPTION [VALUE ...]: fails unless the value is one more option, for the tool behind it.
handed_on() {
  [[ ${2:-} =~ ^--?[A-Za-z] ]] ||
    fail "$1 is '${2:-}'; give an option with its value as one word, like $1=--name=value."
}

# whole OPTION VALUE LEAST [MOST]: fails unless the value is a whole number within these.
whole() {
  local most=${4:-999999999}
  [[ $2 =~ ^(0|[1-9][0-9]{0,8})$ && $2 -ge $3 && $2 -le $most ]] ||
    fail "$1 is '$2'; give a whole number of at least $3${4:+, at most $4}."
}

# training WORD...: sets `config` to the config's file among what `cascade train` takes, and fails
# where there is none or the words hold what is the launcher's.
training() {
  config=''
  while (($#)); do
    case $1 in
      --config) config=${2:-} ;;
      --config=*) config=${1#--config=} ;;
      --workdir | --workdir=*) fail "--workdir is the launcher's; give it before the --." ;;
      --coordinator | --coordinator=* | --processes | --processes=* | --process | --process=*)
        fail "${1%%=*} is the launcher's to tell every process; leave it out after the --."
        ;;
    esac
    shift
  done
  config=${config%%:*}
  [[ -n $config && $config != --* ]] ||
    fail "no config; end with '-- --config PATH' and its overrides, as cascade train takes them."
}

# read_secrets FILE: exports its NAME=value lines, as they stand: nothing in them is evaluated.
read_secrets() {
  local line mode
  [[ -f $1 && -r $1 ]] || fail "can't read the secrets file $1; give one of NAME=value lines."
  mode=$(stat -c %a "$1" 2>/dev/null || stat -f %Lp "$1")
  [[ $mode == ?00 ]] || fail "others may read $1 (mode $mode); chmod 600 it."
  while IFS= read -r line || [[ -n $line ]]; do
    [[ -z $line || $line == '#'* ]] && continue
    [[ $line =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] ||
      fail "$1 has a line that isn't NAME=value; mend it, quotes aren't needed."
    export "${line?}"
  done <"$1"
}

# check_secrets FILE: fails where read_secrets would; a dry run only says that there is no such file.
check_secrets() {
  if [[ ${dry_run:-no} == no ]]; then (read_secrets "$1"); return; fi
  [[ -f $1 && -r $1 ]] || say "note: the secrets file $1 can't be read here, so a real run would fail."
}

# wait_for GRACE PID...: returns once all have ended, with their highest exit code. Where one has
# failed, the others have GRACE seconds to stop by themselves, then are ended. Signals to this
# shell are handled meanwhile.
wait_for() {
  local grace=$1 worst=0 code pid alive deadline=0
  shift
  running=("$@")
  while ((${#running[@]})); do
    alive=()
    for pid in "${running[@]}"; do
      if kill -0 "$pid" 2>/dev/null; then
        alive+=("$pid")
        continue
      fi
      code=0
      wait "$pid" || code=$?
      ((code <= worst)) || worst=$code
    done
    running=("${alive[@]}")
    if ((worst && ${#running[@]})); then
      ((deadline)) || deadline=$((SECONDS + grace))
      ((SECONDS <= deadline)) || kill -KILL "${running[@]}" 2>/dev/null
    fi
    ((${#running[@]} == 0)) || sleep 0.5
  done
  return "$worst"
}

# another_try LASTED CODE RETRIES BACKOFF: counts a try that lasted so many seconds and ended before
# training was finished, says so and waits: BACKOFF seconds, doubling up to ten minutes. Returns 1
# once more than RETRIES in a row have failed.
failures=0
another_try() {
  local lasted=$1 code=$2 retries=$3 backoff=$4 pause
  ((lasted < LASTING)) || failures=0
  failures=$((failures + 1))
  if ((failures > retries)); then
    say "Ended with code $code, not finished, $failures times in a row; giving up."
    return 1
  fi
  pause=$((backoff * (1 << (failures < 10 ? failures - 1 : 9))))
  pause=$((pause < 600 ? pause : 600))
  say "Ended with code $code before the end; try $failures of $retries in $pause s."
  # Signals are handled while this waits, not after.
  sleep "$pause" &
  wait $! || true
}

#!/usr/bin/env bash
# Install what is missing, fetch what is missing, train.
#   ./run.sh [--nproc=N] [--name=value ...]   train: FineWeb on all GPUs, or the small sample where there is none
#   ./run.sh --record=NAME [...]              the same by a record's script, with its defaults
#   ./run.sh test [pytest arguments]          run the tests; SCRIPT=idea.py ./run.sh test: those of another script
#   ./run.sh record COMMAND ...               make, prove and draw records: records/record.py
set -euo pipefail
called_from=$PWD
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")"

die() { echo "run.sh: $*" >&2; exit 2; }

# once TEST COMMAND: the command, unless the test finds it done. Of two starts at once, one waits and tests again.
once() {
  $1 && return
  { mkdir -p .venv && touch .venv/lock; } 2>/dev/null || die "$PWD/.venv must be a folder that can be written"
  exec 9>.venv/lock
  flock -n 9 || { echo "run.sh: another start is at work in $PWD; waiting for it" >&2; flock 9; }
  $1 || $2
  exec 9>&-
}

# Whether .venv was made to its end: pip, which comes last, has its list of files.
have_venv() { [ -x .venv/bin/python ] && ls .venv/lib/python*/site-packages/pip-*.dist-info/RECORD >/dev/null 2>&1; }

# installed FILE, install FILE: its packages into .venv, unless just these were installed before.
installed() { [ -x .venv/bin/python ] && cmp -s "$1" ".venv/installed-${1//\//-}"; }
install() {
  if ! have_venv; then
    local python
    python=$(command -v python3) || die "python3 is not installed; install Python 3.11 or later"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || die "$("$python" --version) is too old; install Python 3.11 or later"
    rm -f .venv/installed-*
    "$python" -m venv .venv && have_venv \
      || die "$python cannot make a virtual environment; install its venv module, remove $PWD/.venv and start again"
  fi
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$1" \
    || die "pip could not install $1; the lines above say why"
  cp "$1" ".venv/installed-${1//\//-}"
}

have_sample() { ls data/sample/sample_{train_000001,train_000002,val_000000}.bin >/dev/null 2>&1; }
have_fineweb() { ls data/fineweb10B/fineweb_{val_000000,train_00000{1..9}}.bin >/dev/null 2>&1; }

case "${1:-}" in -h|--help)
  sed -n 's/^#   //p' run.sh
  installed requirements.txt || exit 0
esac
once "installed requirements.txt" "install requirements.txt"

if [ "${1:-}" = test ]; then
  shift
  if [ -n "${SCRIPT:-}" ]; then
    [[ $SCRIPT = /* ]] || SCRIPT=$called_from/$SCRIPT
    [ -f "$SCRIPT" ] || die "SCRIPT=$SCRIPT is no file; name the script to test"
    export SCRIPT
  fi
  once "installed records/requirements.txt" "install records/requirements.txt"
  once "installed tests/requirements.txt" "install tests/requirements.txt"
  # Two workers of one thread each: most tests use one core, and threads of several processes get in each other's way.
  OMP_NUM_THREADS=1 exec .venv/bin/python -m pytest -n 2 --dist=worksteal tests "$@"
fi

if [ "${1:-}" = record ]; then
  shift
  once "installed records/requirements.txt" "install records/requirements.txt"
  exec .venv/bin/python records/record.py "$@"
fi

script=train_gpt.py nproc= own_data= arguments=()
for argument in "$@"; do
  case "$argument" in
    --nproc=*)
      nproc=${argument#--nproc=}
      [[ $nproc =~ ^[1-9][0-9]{0,2}$ ]] || die "$argument: give a number of processes, at least 1 and at most 999" ;;
    --nproc) die "--nproc needs an equals sign before its number: --nproc=2" ;;
    --record=*)
      script=
      for folder in records/proxy records; do
        record=$folder/${argument#--record=}/train_gpt.py
        [[ $argument = */* || $argument = *=.* || ! -f $record ]] || script=$record
      done
      [ -n "$script" ] || die "$argument: there is no such record; records/README.md lists them" ;;
    --record) die "--record needs an equals sign before its name: --record=2026-11-29_small-batches" ;;
    *) arguments+=("$argument") ;;
  esac
  case "$argument" in
    --train_files*|--preset*|--help|-h) own_data=yes ;;
  esac
done

gpus=$(.venv/bin/python -c 'import torch; print(torch.cuda.device_count())') \
  || die "the torch in .venv does not work, as the lines above say; remove $PWD/.venv and start again"
if [ "$gpus" = 0 ]; then
  if [ -z "$own_data" ]; then
    echo "run.sh: no CUDA GPU found, so this trains the small sample model on the CPU"
    arguments=(--preset=sample ${arguments[@]+"${arguments[@]}"})
  fi
elif [ -n "$nproc" ] && [ "$nproc" -gt "$gpus" ]; then
  die "--nproc=$nproc, but this machine has $gpus GPUs; give at most $gpus"
elif [ -z "$own_data" ] && ! have_fineweb; then
  .venv/bin/python data/cached_fineweb10B.py
fi
case " ${arguments[*]-} " in
  *" --preset=sample "*) once have_sample ".venv/bin/python data/sample.py" ;;
esac

[ -n "$nproc" ] || nproc=$(( gpus > 1 ? gpus : 1 ))
if [ "$nproc" = 1 ]; then
  exec .venv/bin/python "$script" ${arguments[@]+"${arguments[@]}"}
fi
exec .venv/bin/python -m torch.distributed.run --standalone --nproc_per_node="$nproc" "$script" ${arguments[@]+"${arguments[@]}"}

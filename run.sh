#!/usr/bin/env bash
# Install what is missing, fetch what is missing, train.
#   ./run.sh [--nproc=N] [--name=value ...]   train: FineWeb on all GPUs, or the small sample where there is none
#   ./run.sh test [pytest arguments]          run the tests
#   ./run.sh record COMMAND ...               make, prove and draw records: records/record.py
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

die() { echo "run.sh: $*" >&2; exit 2; }

# install FILE: its packages into .venv, unless just these were installed before.
install() {
  local stamp=".venv/installed-${1//\//-}"
  cmp -s "$1" "$stamp" && return
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$1" \
    || die "pip could not install $1; the lines above say why"
  cp "$1" "$stamp"
}

if [ ! -x .venv/bin/python ]; then
  python=$(command -v python3) || die "python3 is not installed; install Python 3.11 or later"
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || die "$("$python" --version) is too old; install Python 3.11 or later"
  "$python" -m venv .venv || die "$python cannot make a virtual environment; install its venv module"
fi
install requirements.txt

if [ "${1:-}" = test ]; then
  shift
  install records/requirements.txt
  install tests/requirements.txt
  # Two workers of one thread each: most tests use one core, and threads of several processes get in each other's way.
  OMP_NUM_THREADS=1 exec .venv/bin/python -m pytest -n 2 --dist=worksteal tests "$@"
fi

if [ "${1:-}" = record ]; then
  shift
  install records/requirements.txt
  exec .venv/bin/python records/record.py "$@"
fi

nproc= own_data= arguments=()
for argument in "$@"; do
  case "$argument" in
    --nproc=*) nproc=${argument#--nproc=} ;;
    *) arguments+=("$argument") ;;
  esac
  case "$argument" in
    --train_files*|--preset*|--help|-h) own_data=yes ;;
  esac
done
case "$nproc" in *[!0-9]*|0) die "--nproc=$nproc: give a number of processes, at least 1" ;; esac

gpus=$(.venv/bin/python -c 'import torch; print(torch.cuda.device_count())')
if [ "$gpus" = 0 ]; then
  if [ -z "$own_data" ]; then
    echo "run.sh: no CUDA GPU found, so this trains the small sample model on the CPU"
    arguments=(--preset=sample ${arguments[@]+"${arguments[@]}"})
  fi
elif [ -n "$nproc" ] && [ "$nproc" -gt "$gpus" ]; then
  die "--nproc=$nproc, but this machine has $gpus GPUs; give at most $gpus"
elif [ -z "$own_data" ] && ! ls data/fineweb10B/fineweb_val_000000.bin data/fineweb10B/fineweb_train_000009.bin >/dev/null 2>&1; then
  .venv/bin/python data/cached_fineweb10B.py
fi
case " ${arguments[*]-} " in
  *" --preset=sample "*) [ -e data/sample/sample_val_000000.bin ] || .venv/bin/python data/sample.py ;;
esac

[ -n "$nproc" ] || nproc=$(( gpus > 1 ? gpus : 1 ))
if [ "$nproc" = 1 ]; then
  exec .venv/bin/python train_gpt.py ${arguments[@]+"${arguments[@]}"}
fi
exec .venv/bin/torchrun --standalone --nproc_per_node="$nproc" train_gpt.py ${arguments[@]+"${arguments[@]}"}

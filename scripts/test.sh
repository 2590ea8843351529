#!/usr/bin/env bash
# The whole test suite, from a fresh clone: bash scripts/test.sh [pytest arguments]
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/_env.sh" dev
cd "$ROOT"
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
workers=(-n 2 --dist worksteal) # neighbours share what their module sets up
for argument in "$@"; do
    case "$argument" in
    -n* | --numprocesses* | --dist* | --pdb | -s | no:xdist | -pno:xdist) workers=() ;; # the caller decides, or wants one process
    esac
done
cores="$("$VENV/bin/python" -c 'from mm_cb.core.provenance import available_cores; print(available_cores())')"
if [ "$cores" -lt 2 ]; then workers=(); fi
exec "$VENV/bin/python" -m pytest ${workers[@]+"${workers[@]}"} "$@"

#!/usr/bin/env bash
# The whole experiment on the miniature, from a fresh clone: bash scripts/demo.sh [--full] [--out DIR] [--seed N]
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/_env.sh" core
exec "$VENV/bin/mm-cb" demo "$@"

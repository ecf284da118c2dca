#!/usr/bin/env bash
# The speed of routed Llama-3-8B on one GPU, in at most eight minutes, with nothing installed but torch, transformers
# and accelerate; rehearsed on any machine with --shape tiny. PYTHON names the interpreter; arguments go to
# entrypoints/analysis/gpu_speed.py:
#   bash scripts/gpu_speed.sh --output figures/gpu_speed.jsonl
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
PYTHON="${PYTHON:-python3}"

if ! missing="$("$PYTHON" -c '
import importlib.util, sys
sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None
print(*(name for name in ("torch", "transformers", "accelerate") if importlib.util.find_spec(name) is None))')"; then
  exit 2
elif [[ -n "$missing" ]]; then
  echo "error: $PYTHON lacks $missing: install them, or name another interpreter with PYTHON=/path/to/python" >&2
  exit 2
fi

# utils/ is imported as router_tuning: an installation says so, here a link does.
packages="$(mktemp -d)"
trap 'rm -rf "$packages"' EXIT
ln -s "$ROOT/utils" "$packages/router_tuning"
export PYTHONPATH="$packages${PYTHONPATH:+:$PYTHONPATH}" PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
"$PYTHON" "$ROOT/entrypoints/analysis/gpu_speed.py" "$@"

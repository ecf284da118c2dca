#!/usr/bin/env bash
# The speed of routed Llama-3-8B on one GPU, in at most eight minutes, with nothing installed but torch, transformers
# and accelerate; a run that was cut goes on with the cells that its file lacks. Rehearsed on any machine with --shape
# tiny. PYTHON names the interpreter; arguments go to entrypoints/analysis/benchmark_speed.py:
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

# In the order of their worth: the published granularity first, then what has most to save.
granularities=attn_sequence,attn_token,mlp_token,block_sequence,attn_token+mlp_token,block_token,mlp_sequence
if [[ "$*" == *"--shape tiny"* ]]; then
  device=cpu
  granularities=attn_sequence,attn_token+mlp_token
  phases=prefill:2x8x2,decode:1x8x2,tune:2x8x2,decode:8x8x2,prefill:1x16x2,compiled:1x8x4,compiled:8x8x4
else
  device=cuda
  phases=prefill:4x2048x5,decode:1x2048x24,tune:8x2048x3,compiled:1x2048x32
  phases+=,prefill:1x8192x4,decode:32x2048x20,compiled:32x2048x32
fi

# utils/ is imported as router_tuning: an installation says so, here a link does.
packages="$(mktemp -d)"
trap 'rm -rf "$packages"' EXIT
ln -s "$ROOT/utils" "$packages/router_tuning"
export PYTHONPATH="$packages${PYTHONPATH:+:$PYTHONPATH}" PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
"$PYTHON" "$ROOT/entrypoints/analysis/benchmark_speed.py" --shape llama3-8b --device "$device" --phases "$phases" \
  --granularities "$granularities" --capacities 0.5,1 --skips zero,low_rank --builds 1 --profile --minutes 8 "$@"

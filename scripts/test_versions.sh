#!/usr/bin/env bash
# Do the tests of the model pass with the oldest and the newest transformers that pyproject.toml admits? Each in a
# throw-away folder in front of the environment of requirements.txt. Other versions, and arguments of pytest:
#   bash scripts/test_versions.sh
#   VERSIONS="5.18.0 5.20.2" bash scripts/test_versions.sh tests/model/test_cache.py
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
ensure_environment
cd "$ROOT"

folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
(( $# )) || set -- tests/model
for version in ${VERSIONS:-5.16.0 5.23.0}; do
  python -m pip install --quiet --target "$folder/$version" "transformers==$version"
  echo "transformers $version"
  PYTHONPATH="$folder/$version" HF_HUB_OFFLINE=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" python -m pytest "$@"
done

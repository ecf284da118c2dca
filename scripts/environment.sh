# shellcheck shell=bash
# Sourced by the other scripts: ROOT, and a virtual environment in .venv that holds requirements.txt.
# PYTHON=/path/to/python picks the interpreter, VENV=/path another environment.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${VENV:-$ROOT/.venv}"
# On Linux torch then asks for pages of 2 MB: tensors of logits no longer cost a page fault every 4 KB.
export THP_MEM_ALLOC_ENABLE="${THP_MEM_ALLOC_ENABLE:-1}"

fail() {
  echo "error: $*" >&2
  exit 2
}

find_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3 python3.13 python3.12 python3.11; do
    if [[ -n "$candidate" ]] && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  fail "no Python 3.11 or newer found ($(python3 --version 2>/dev/null || echo 'no python3')): transformers 5.23 needs" \
    "it; install it or name it with PYTHON=/path/to/python"
}

# Installs only when requirements.txt, pyproject.toml or the interpreter changed since the last complete install.
ensure_environment() {
  local python stamp wanted
  python="$(find_python)" || exit 2
  stamp="$VENV/.installed"
  wanted="$(cat "$ROOT/requirements.txt" "$ROOT/pyproject.toml" | sha256sum | cut -c1-64) $("$python" --version) $ROOT"
  if [[ ! -x "$VENV/bin/python" ]]; then
    echo "making the environment $VENV with $("$python" --version)"
    "$python" -m venv "$VENV" || fail "cannot make $VENV: install the venv module of $("$python" --version) (Debian: python3-venv)"
  fi
  if [[ ! -f "$stamp" || "$(cat "$stamp")" != "$wanted" ]]; then
    echo "installing requirements.txt into $VENV (about 2 GB, a few minutes)"
    rm -f "$stamp"
    (cd "$ROOT" && "$VENV/bin/python" -m pip install --disable-pip-version-check -r requirements.txt) \
      || fail "the installation failed, see above; run this again once the cause is mended"
    echo "$wanted" >"$stamp"
  fi
  export VIRTUAL_ENV="$VENV" PATH="$VENV/bin:$PATH"
  unset PYTHONPATH PYTHONHOME
}

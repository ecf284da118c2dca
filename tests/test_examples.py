"""The programs under examples/ run as they are, in a folder of their own, in at most sixty lines each."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
TELLS = {"sft_with_trl": "capacity 0.", "own_loop": "capacity 0.", "serve_export": "GHBIK"}
"""What each prints in the end: routers that skip something, an answer that is right."""


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_runs(path, tmp_path):
    done = subprocess.run([sys.executable, str(path)], cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert TELLS[path.stem] in done.stdout.splitlines()[-1]
    assert len(path.read_text().splitlines()) <= 60

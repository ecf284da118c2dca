"""The programs under examples/ run as they are, in a folder of their own, in at most sixty lines each."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
TELLS = {"sft_with_trl": "capacity 0.", "own_loop": "capacity 0.", "serve_export": "GHBIK"}
"""What each prints in the end: routers that skip something, an answer that is right."""


@pytest.mark.full
@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_runs(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(path)])
    runpy.run_path(str(path), run_name="__main__")
    assert TELLS[path.stem] in capsys.readouterr().out.splitlines()[-1]
    assert len(path.read_text().splitlines()) <= 60

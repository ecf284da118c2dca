"""A tiny base and a run on it, made once for the tests of this folder."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
from tiny_checkpoint import write_base, write_run


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    return write_base(tmp_path_factory.mktemp("checkpoints") / "base")


@pytest.fixture(scope="session")
def run(tmp_path_factory, base) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "run", base)


@pytest.fixture
def command(root, monkeypatch):
    """Run an entrypoint in this process; returns its exit code."""

    def call(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        try:
            runpy.run_path(str(root / "entrypoints" / script), run_name="__main__")
        except SystemExit as end:
            return end.code
        return 0

    return call

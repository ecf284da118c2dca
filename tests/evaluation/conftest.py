"""A tiny base and a run on it, made once for the tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_checkpoint import write_base, write_run


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    return write_base(tmp_path_factory.mktemp("checkpoints") / "base")


@pytest.fixture(scope="session")
def run(tmp_path_factory, base) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "run", base)

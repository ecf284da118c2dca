"""Conversion of one data set in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from router_tuning.data.reformat import Settings, reformat
from router_tuning.data.sources import source_of


@pytest.fixture
def convert(tmp_path: Path) -> Callable[..., Path]:
    """Convert one file or folder in this process; the folder of the result. Fails if nothing was published."""

    def run(name: str, place: Path, save_path: Path | None = None, **settings) -> Path:
        save_path = save_path or tmp_path / "reformatted"
        (outcome,) = reformat([source_of(name, place)], save_path, Settings(**settings))
        assert outcome.error is None, outcome.error
        return save_path / name

    return run

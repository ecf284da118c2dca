"""Conversion of one data set in this process."""

from collections.abc import Callable
from pathlib import Path

import pytest
from raw_data import outcome_of


@pytest.fixture
def convert(tmp_path: Path) -> Callable[..., Path]:
    """Convert a file or folder; the folder of the result. Fails if nothing was published."""

    def run(name: str, place: Path | str, save_path: Path = tmp_path / "reformatted", **settings) -> Path:
        outcome = outcome_of(name, place, save_path, **settings)
        assert outcome.error is None, outcome.error
        return save_path / name

    return run

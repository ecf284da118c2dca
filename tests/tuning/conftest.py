"""Tuning runs shared by the tests of this folder; nothing may write into them."""

from pathlib import Path

import pytest
import tiny_tuning


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch, tmp_path_factory):
    """Tests see neither a launcher's variables nor caches of other runs."""
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "ACCELERATE_USE_CPU", "ACCELERATE_USE_DEEPSPEED"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def parts(tmp_path_factory) -> dict[str, Path]:
    """Base, start routers and data."""
    return tiny_tuning.write_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="session")
def finished(tmp_path_factory, parts) -> Path:
    """Folder of an undisturbed run of six steps with a checkpoint after each."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    tiny_tuning.tune(parts, folder)
    return folder

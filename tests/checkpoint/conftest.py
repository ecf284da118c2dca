"""A tiny sharded base and runs on it, made once for the tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_checkpoint import tuned_run, write_base, write_run

from router_tuning.checkpoint.exporting import HOLDS


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    return write_base(tmp_path_factory.mktemp("checkpoints") / "base", max_shard_size="100KB")


@pytest.fixture(scope="session")
def run(tmp_path_factory, base) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "run", base)


@pytest.fixture(scope="session")
def tuned(tmp_path_factory, base) -> dict[str, tuple[Path, torch.Tensor]]:
    """Runs as the tuning entrypoint leaves them, by what they trained, each with its logits; only to be read."""
    folder = tmp_path_factory.mktemp("tuned")
    places = {what: folder / what.replace(" ", "_") for what in HOLDS}
    return {what: (place, tuned_run(place, base, what)) for what, place in places.items()}


@pytest.fixture(scope="session")
def lora_run(tuned) -> tuple[Path, torch.Tensor]:
    return tuned["routers and LoRA"]

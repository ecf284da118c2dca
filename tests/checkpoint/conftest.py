"""A tiny sharded base and runs on it, made once for the tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_checkpoint import tuned_run, write_base, write_run


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    return write_base(tmp_path_factory.mktemp("checkpoints") / "base", max_shard_size="100KB")


@pytest.fixture(scope="session")
def run(tmp_path_factory, base) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "run", base)


@pytest.fixture(scope="session")
def lora_run(tmp_path_factory, base):
    """A run with LoRA, as the tuning entrypoint leaves it: routers beside ``adapter/``; and its logits."""
    folder = tmp_path_factory.mktemp("lora") / "run"
    return folder, tuned_run(folder, base, "routers and LoRA")

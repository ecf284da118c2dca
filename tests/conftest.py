"""Fixtures and settings that all tests share: offline, seeded, tiny random models of every supported family."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
import pytest  # noqa: E402
import torch  # noqa: E402
from tiny_models import FAMILIES  # noqa: E402

QUICK = ("llama", "gemma3_text", "phi3", "mixtral")
"""Families of the default run: separate and fused projections, norms and windows, experts."""
TWINS = {"attn": "eager", "dtype": torch.float16}
"""Values of a test's parameters whose twins (``sdpa``, bfloat16) the default run has."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as ``full`` what is tested on a further family of the matrix, or also in another way."""
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        further = parameters.get("family") in set(FAMILIES) - set(QUICK)
        if further or any(name in parameters and parameters[name] == twin for name, twin in TWINS.items()):
            item.add_marker(pytest.mark.full)


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Bytes are named by their argument: a gzip header carries the clock, and workers must collect the same names."""
    return argname if isinstance(val, bytes) else None


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    disabled = not torch.is_grad_enabled()
    torch.set_grad_enabled(True)
    assert not disabled, "this test left autograd disabled; every later test in this process would train nothing"


@pytest.fixture
def root() -> Path:
    """The repository."""
    return Path(__file__).resolve().parents[1]

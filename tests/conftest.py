"""Fixtures and settings that all tests share: offline, seeded, tiny random models of every supported family."""

from __future__ import annotations

import os
import resource
import runpy
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
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
    items.sort(key=lambda item: "tuning" not in item.path.parts)  # files that take longest are not begun last


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


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture
def command(root: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run an entrypoint in this process, as its command line does; returns its exit code."""

    def call(script: str, *arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        try:
            runpy.run_path(str(root / "entrypoints" / script), run_name="__main__")
        except SystemExit as end:
            return end.code or 0
        return 0

    return call


@pytest.fixture
def full_disk() -> Callable[[int], AbstractContextManager[None]]:
    """``with full_disk(size)``: no file of this process grows beyond ``size`` bytes."""

    @contextmanager
    def limited(size: int) -> Iterator[None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limited

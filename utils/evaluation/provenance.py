"""Where a number comes from: commit, versions, machine and date."""

from __future__ import annotations

import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "transformers", "lm_eval", "peft", "datasets", "accelerate", "router-tuning")
ROOT = Path(__file__).resolve().parents[2]


def provenance() -> dict[str, Any]:
    """Commit of this repository, package versions, Python, device and the time (UTC) of the call."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "git_commit": git_commit(),
        "python": platform.python_version(),
        "device": device,
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
    }


def git_commit() -> str | None:
    """Commit of the checkout, with ``-dirty`` if tracked files differ from it; None outside a checkout."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None

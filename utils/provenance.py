"""Where a measured number comes from: commit, versions, machine and date."""

from __future__ import annotations

import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import distributions
from typing import Any

import torch

from router_tuning.places import CHECKOUT, ROOT

PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "peft", "datasets", "lm_eval", "router-tuning")


def provenance() -> dict[str, Any]:
    """Time (UTC) of the call, commit of this checkout, versions of what is installed, and the device."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "versions": {found.name: found.version for found in distributions() if found.name in PACKAGES},
        "device": device,
    }


def _git_commit() -> str | None:
    if not CHECKOUT:
        return None
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None

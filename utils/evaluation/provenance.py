"""Where a measured number comes from: commit, versions, machine and date."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import torch

from router_tuning.tuning import run_folder


def provenance() -> dict[str, Any]:
    """That of a tuning run, with the device and the version of lm-eval."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    found = run_folder.provenance()
    return {**found, "device": device, "versions": {**found["versions"], "lm_eval": version("lm_eval")}}

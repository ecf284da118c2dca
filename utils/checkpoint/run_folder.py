"""What a tuning run left behind: its arguments, its log, its base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from router_tuning.errors import UserError
from router_tuning.places import ROOT
from router_tuning.tuning.encoding import load_tokenizer
from router_tuning.tuning.run_folder import TEMPLATE

ADAPTER, MODEL = "adapter", "model"
"""Folders of a run that hold what peft saved, or all weights where all were tuned."""
PARTS = ("arguments", "base", "data", "tokenizer")
"""Entries of ``run.json`` that hold further entries."""


def read_run(run: Path) -> dict[str, Any]:
    """``run.json`` of a tuning run, or an empty dict where there is none; UserError if it is damaged."""
    path = run / "run.json"
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object")
    content = {name: value for name, value in content.items() if value is not None}
    if odd := [name for name in PARTS if not isinstance(content.get(name, {}), dict)]:
        raise UserError(f"{path}: expected JSON objects under {', '.join(odd)}")
    return content


def trained(run: Path) -> str:
    """What a run trained: ``routers``, ``routers and LoRA`` or ``all weights``."""
    if (run / ADAPTER).is_dir():
        return "routers and LoRA"
    return "all weights" if (run / MODEL).is_dir() else "routers"


def base_of(run: Path, given: Path | None = None) -> Path:
    """Folder of the base that a run was tuned on: ``given``, or the one that ``run.json`` names.

    Raises :class:`UserError` if neither is a folder with a ``config.json``.
    """
    record = read_run(run)
    named, folder_name = record.get("base", {}).get("path"), record.get("arguments", {}).get("folder_name")
    candidates = [given] if given else [Path(named)] if named else []
    # The repository may have moved since. A name with a path in it is none that this repository wrote.
    if not given and isinstance(folder_name, str) and Path(folder_name).name == folder_name != "..":
        candidates.append(ROOT / "ckpt" / folder_name)
    for folder in candidates:
        if (folder / "config.json").is_file():
            return folder
    where = ", ".join(map(str, candidates)) or "run.json names none"
    raise UserError(f"{run}: no checkpoint folder of its base ({where}); name it with --base")


def tokenizer_of(run: Path, base: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that a run was tuned with, rendering conversations as the run did.

    Args:
        base: folder of the run's base, whose tokenizer it is unless the run named another.
    """
    template = run / TEMPLATE
    place = read_run(run).get("tokenizer", {}).get("name") or base
    return load_tokenizer(place, template.read_text(encoding="utf-8") if template.is_file() else "auto")


def data_of(run: Path) -> Path | None:
    """JSONL file that a run was tuned on, if ``run.json`` names one."""
    path = read_run(run).get("data", {}).get("path")
    return Path(path) if path else None


def training_log(run: Path) -> list[dict[str, Any]]:
    """Log lines of the run, from ``metrics.jsonl``; empty where it wrote none."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]

"""What a tuning run left behind: its arguments, its log, its base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


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
    return content


def base_of(run: Path, given: Path | None = None) -> Path:
    """Folder of the base that a run was tuned on: ``given``, or the one that ``run.json`` names.

    Raises :class:`UserError` if neither is a folder with a ``config.json``.
    """
    arguments = read_run(run).get("arguments", {})
    candidates = [given] if given else []
    if not given and arguments.get("model_name_or_path"):
        candidates.append(Path(arguments["model_name_or_path"]))
    if not given and arguments.get("folder_name"):
        candidates.append(ROOT / "ckpt" / arguments["folder_name"])
    for folder in candidates:
        if (folder / "config.json").is_file():
            return folder
    named = ", ".join(map(str, candidates)) or "nothing"
    raise UserError(f"{run}: the base is named as {named}, which is no checkpoint folder here; name it with --base")


def training_log(run: Path) -> list[dict[str, Any]]:
    """Log lines of the run: of ``metrics.jsonl``, else of ``trainer_state.json``; empty if it has neither."""
    lines = run / "metrics.jsonl"
    if lines.is_file():
        return [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines() if line.strip()]
    states = sorted([*run.glob("trainer_state.json"), *run.glob("checkpoint-*/trainer_state.json")], key=_newest)
    return json.loads(states[-1].read_text(encoding="utf-8"))["log_history"] if states else []


def _newest(path: Path) -> tuple[int, float]:
    return int(path.parent == path.parents[1]), path.stat().st_mtime

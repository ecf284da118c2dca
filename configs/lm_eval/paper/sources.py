"""Where the rows of the paper's tasks come from: the hub, or local JSONL with the hub's columns.

``custom_dataset: !function sources.load`` in ``paper.yaml``. ``--metadata '{"data_root": "DIR"}'`` (stock lm_eval and
ours) or the environment variable ``MOD_EVAL_DATA`` names a folder with ``<name>/<split>.jsonl``; without either the
rows come from the hub. Depends on ``datasets`` alone, because stock lm-eval imports this file by its path.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import datasets

HUB = {
    "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge"),
    "boolq": ("aps/super_glue", "boolq"),
    "gsm8k": ("openai/gsm8k", "main"),
    "hellaswag": ("Rowan/hellaswag", None),
    "mmlu": ("cais/mmlu", None),
    "openbookqa": ("allenai/openbookqa", "main"),
    "piqa": ("baber/piqa", None),
    "rte": ("nyu-mll/glue", "rte"),
    "winogrande": ("allenai/winogrande", "winogrande_xl"),
}
SPLITS = ("train", "validation", "test", "dev")
SHOTS_HELD_BACK = 64


def load(name: str, data_root: str | None = None, config_source: str = "", **_: object) -> dict[str, datasets.Dataset]:
    """``{split: Dataset}`` of one task; of MMLU the subject that the task's own file is named after.

    Raises FileNotFoundError, with the folder, for a local root that lacks the task.
    """
    root = data_root or os.environ.get("MOD_EVAL_DATA")
    subject = Path(config_source).stem.removeprefix("mmlu_") if name == "mmlu" else None
    if not root:
        path, config = HUB[name]
        return datasets.load_dataset(path, subject or config)
    folder = Path(root).expanduser() / name
    splits = {split: _read(folder / f"{split}.jsonl", subject) for split in SPLITS}
    splits = {split: rows for split, rows in splits.items() if rows}
    if not splits:
        raise FileNotFoundError(
            f"{folder}: no rows of {subject or name}; expected <split>.jsonl with the hub's columns"
        )
    return {split: datasets.Dataset.from_list(rows) for split, rows in with_train(splits, name).items()}


def with_train(splits: dict[str, list[dict]], name: str) -> dict[str, list[dict]]:
    """Give a local copy without ``train`` a split for its few-shot examples that is never scored.

    The validation rows where another split is scored (ARC); else the first rows of the scored split, which it loses.
    """
    if "train" in splits or name == "mmlu":
        return splits
    if "test" in splits and "validation" in splits:
        return {**splits, "train": splits["validation"]}
    scored = "validation" if "validation" in splits else "test"
    rows = splits[scored]
    return {**splits, "train": rows[:SHOTS_HELD_BACK], scored: rows[SHOTS_HELD_BACK:]}


def _read(path: Path, subject: str | None) -> list[dict]:
    if not path.is_file():
        return []
    with path.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines if line.strip()]
    return [row for row in rows if subject is None or row["subject"] == subject]

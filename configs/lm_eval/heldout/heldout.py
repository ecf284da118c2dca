"""Loader of the held-out tasks for lm-eval: ``custom_dataset: !function heldout.load``.

Stock ``lm_eval`` imports this file by its path, where the repository need not be installed, so it depends on
``datasets`` alone. The rows come from ``data/sample/heldout/<task>.jsonl`` of the repository that this file lies
in, from any working directory; ``--metadata '{"heldout_dir": "..."}'`` reads another folder.
"""

from __future__ import annotations

import json
from pathlib import Path

from datasets import Dataset

HELDOUT_DIR = Path(__file__).resolve().parents[3] / "data" / "sample" / "heldout"


def load(task: str, heldout_dir: str | None = None, eos: str = "</s>", **_: object) -> dict[str, Dataset]:
    """Return ``{"test": Dataset}`` with columns ``text, prompt, answer, choices, gold``.

    A row of the file is ``{"messages": [...], "answer": str, "choices": [str, ...], "gold": int}``. ``prompt`` is the
    rendered conversation up to the answer, ``text`` the bare answer (running text, where the task is free),
    ``choices[gold]`` the right answer.
    Raises FileNotFoundError, with the file, if the task has none there.
    """
    path = Path(heldout_dir or HELDOUT_DIR).expanduser() / f"{task}.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no held-out rows for task {task!r}; point heldout_dir at their folder")
    with path.open(encoding="utf-8") as lines:
        return {"test": Dataset.from_list([_document(json.loads(line), eos) for line in lines if line.strip()])}


def _document(row: dict, eos: str) -> dict:
    return {
        "text": row["answer"],
        "prompt": render(row["messages"][:-1], eos) + "<|assistant|>\n",
        "answer": row["answer"],
        "choices": row["choices"],
        "gold": row["gold"],
    }


def render(messages: list[dict], eos: str) -> str:
    """Text of a conversation in the template of training (a test holds the two equal)."""
    ends = {"system": "\n", "user": "\n", "assistant": f"{eos}\n"}
    return "".join(f"<|{turn['role']}|>\n{turn['content'].strip()}{ends[turn['role']]}" for turn in messages)

"""Made-up rows of the paper's tasks in the hub's columns, as files: ``<task>/<split>.jsonl``."""

from __future__ import annotations

import json
import random
from pathlib import Path

WORDS = "red blue green cat dog sun moon tree house river stone bread milk chair seven nine".split()


def write_rows(root: Path, subjects: list[str], rows: int = 3) -> Path:
    """``rows`` scored rows per task (per subject of MMLU), and enough to draw its examples from."""
    rng = random.Random(0)

    def text(length: int = 6) -> str:
        return " ".join(rng.choices(WORDS, k=length))

    def letters() -> dict:
        return {"choices": {"text": [text(2) for _ in "ABCD"], "label": list("ABCD")}, "answerKey": rng.choice("ABCD")}

    def mmlu(subject: str) -> dict:
        choices = [text(2) for _ in "ABCD"]
        return {"question": f"{text()}?", "subject": subject, "choices": choices, "answer": rng.randrange(4)}

    make = {
        "arc_challenge": lambda: {"id": "x", "question": f"{text()}?", **letters()},
        "boolq": lambda: {"question": text(), "passage": text(12), "label": rng.randrange(2), "idx": 0},
        "gsm8k": lambda: {"question": f"{text()}?", "answer": f"{text()}\n#### {rng.randrange(99)}"},
        "hellaswag": lambda: {
            "ind": 0, "activity_label": text(2), "ctx_a": text(), "ctx_b": text(3), "ctx": text(),
            "endings": [text(4) for _ in range(4)], "label": str(rng.randrange(4)),
        },
        "openbookqa": lambda: {"id": "x", "question_stem": text(), **letters()},
        "piqa": lambda: {"goal": text(4), "sol1": text(), "sol2": text(), "label": rng.randrange(2)},
        "rte": lambda: {"sentence1": text(), "sentence2": text(4), "label": rng.randrange(2), "idx": 0},
        "winogrande": lambda: {
            "sentence": f"{text(4)} _ {text(3)}.", "option1": text(1), "option2": text(1), "answer": rng.choice("12"),
        },
    }  # fmt: skip
    scored = {"arc_challenge": "test", "gsm8k": "test", "openbookqa": "test"}
    for task, row in make.items():
        _write(root / task, scored.get(task, "validation"), [row() for _ in range(rows)])
        _write(root / task, "train", [row() for _ in range(30)])
    _write(root / "mmlu", "test", [mmlu(subject) for subject in subjects for _ in range(rows)])
    _write(root / "mmlu", "dev", [mmlu(subject) for subject in subjects for _ in range(5)])
    return root


def _write(folder: Path, split: str, rows: list[dict]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

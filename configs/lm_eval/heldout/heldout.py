"""Loader of the held-out tasks for lm-eval: ``custom_dataset: !function heldout.load``.

Stock ``lm_eval`` imports this file by its path, where the repository need not be installed, so it depends on
``datasets`` and ``transformers`` alone. The rows come from ``data/sample/heldout/<task>.jsonl`` of the repository that
this file lies in, from any working directory; ``--metadata '{"heldout_dir": "..."}'`` reads another folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from datasets import Dataset
from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

ROOT = Path(__file__).resolve().parents[3]
HELDOUT_DIR = ROOT / "data" / "sample" / "heldout"
PUBLISHED = ROOT / "utils" / "tuning" / "published_template.jinja"


def load(
    task: str,
    heldout_dir: str | None = None,
    chat_template: str | None = None,
    special_tokens: Mapping[str, str] | None = None,
    pretrained: str | None = None,
    **_: object,
) -> dict[str, Dataset]:
    """Return ``{"test": Dataset}`` with columns ``text, prompt, answer, choices, gold``.

    A row of the file is ``{"messages": [...], "answer": str, "choices": [str, ...], "gold": int}``. ``prompt`` is the
    rendered conversation up to the answer, ``text`` the bare answer (running text, where the task is free),
    ``choices[gold]`` the right answer. Rendered is in ``chat_template``; else in that of the checkpoint
    ``pretrained``, which stock lm-eval passes; else in the published one.
    Raises FileNotFoundError, with the file, if the task has none there.
    """
    path = Path(heldout_dir or HELDOUT_DIR).expanduser() / f"{task}.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no held-out rows for task {task!r}; point heldout_dir at their folder")
    if chat_template is None and isinstance(pretrained, str):
        tokenizer = AutoTokenizer.from_pretrained(pretrained)
        chat_template, special_tokens = tokenizer.chat_template, tokenizer.special_tokens_map
    template = chat_template or PUBLISHED.read_text(encoding="utf-8")
    tokens = dict(special_tokens or {"eos_token": "</s>"})
    with path.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines if line.strip()]
    asked = [row["messages"][:-1] for row in rows]
    prompts, _ = render_jinja_template(asked, chat_template=template, add_generation_prompt=True, **tokens)
    return {"test": Dataset.from_list([_document(row, prompt) for row, prompt in zip(rows, prompts, strict=True)])}


def _document(row: dict, prompt: str) -> dict:
    fields = {name: row[name] for name in ("answer", "choices", "gold")}
    return {"text": row["answer"], "prompt": prompt, **fields}

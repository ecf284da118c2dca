"""The held-out tasks: rendered as in training, and complete; test_stock_tools loads them without this repository."""

from __future__ import annotations

import json

import pytest
from lm_eval.tasks import TaskManager

from router_tuning.embedded.sample_tasks import FREE_TASKS, TASKS
from router_tuning.evaluation.tasks import TASK_CONFIGS

TEXTS = {"system": " Be brief. ", "user": "Hi\nthere", "assistant": "Yes."}
CONVERSATION = [{"role": role, "content": text} for role, text in TEXTS.items()]
CONVERSATION += [{"role": "user", "content": "And?"}, {"role": "assistant", "content": "No."}]
PROMPT = "<|system|>\nBe brief.\n<|user|>\nHi\nthere\n<|assistant|>\nYes.</s>\n<|user|>\nAnd?\n<|assistant|>\n"


def test_documents_of_a_file(tmp_path, base, task_code):
    heldout = task_code("heldout/heldout.py")
    with pytest.raises(FileNotFoundError, match=str(tmp_path / "toy.jsonl")):
        heldout.load("toy", heldout_dir=str(tmp_path))
    row = {"messages": CONVERSATION, "answer": "No.", "choices": ["So.", "No."], "gold": 1}
    (tmp_path / "toy.jsonl").write_text(json.dumps(row) + "\n\n")

    def load(**metadata):
        [doc] = heldout.load("toy", heldout_dir=str(tmp_path), version=1.0, **metadata)["test"]
        return doc

    doc = load()
    assert doc["prompt"] == PROMPT and doc["choices"][doc["gold"]] == doc["answer"] == "No."
    assert load(pretrained=str(base))["prompt"] == PROMPT, "stock lm-eval names the checkpoint"
    own = {"chat_template": "{{ bos_token }}{{ messages[3].content }}", "special_tokens": {"bos_token": "<s>"}}
    assert load(**own, pretrained=str(base))["prompt"] == "<s>And?", "our harness gives the run's own template"


def test_every_task_has_its_forms():
    names = set(TaskManager(include_path=str(TASK_CONFIGS), include_defaults=False).all_subtasks)
    expected = {f"mod_{task}_mc" for task in TASKS} | {f"mod_{task}_text" for task in FREE_TASKS}
    assert expected | {f"mod_{task}_gen" for task in TASKS if task not in FREE_TASKS} <= names

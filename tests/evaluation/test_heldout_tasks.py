"""The held-out tasks: rendered as in training, complete, and loadable without this repository."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from lm_eval.tasks import TaskManager

from router_tuning.embedded.sample_tasks import FREE_TASKS, TASKS
from router_tuning.evaluation.harness import TASK_CONFIGS
from router_tuning.tuning.encoding import render, render_prompt

HELDOUT = TASK_CONFIGS / "heldout"


def load_module():
    import importlib.util

    spec = importlib.util.spec_from_file_location("heldout_under_test", HELDOUT / "heldout.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CONVERSATION = [
    {"role": "system", "content": " Be brief. "},
    {"role": "user", "content": "Hi\nthere"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "No."},
]


def test_template_is_that_of_training():
    module = load_module()
    assert module.render(CONVERSATION, "</s>") == render(CONVERSATION, "</s>")
    assert module.render(CONVERSATION[:-1], "</s>") + "<|assistant|>\n" == render_prompt(CONVERSATION[:-1], "</s>")


def test_documents_of_a_file(tmp_path):
    row = {"messages": CONVERSATION, "answer": "No.", "choices": ["So.", "No."], "gold": 1}
    (tmp_path / "toy.jsonl").write_text(json.dumps(row) + "\n\n")
    [doc] = load_module().load("toy", heldout_dir=str(tmp_path), version=1.0)["test"]
    assert doc["prompt"].endswith("And?\n<|assistant|>\n") and doc["choices"][doc["gold"]] == doc["answer"] == "No."


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=str(tmp_path / "toy.jsonl")):
        load_module().load("toy", heldout_dir=str(tmp_path))


def test_every_task_has_its_forms():
    names = set(TaskManager(include_path=str(TASK_CONFIGS), include_defaults=False).all_subtasks)
    expected = {f"mod_{task}_mc" for task in TASKS} | {f"mod_{task}_text" for task in FREE_TASKS}
    expected |= {f"mod_{task}_gen" for task in TASKS if task not in FREE_TASKS}
    assert expected <= names


def test_yaml_names_the_file_it_reads():
    for path in sorted(HELDOUT.glob("*_*.yaml")):
        config = yaml.load(path.read_text().replace("!function", ""), Loader=yaml.SafeLoader)
        if "dataset_kwargs" in config:
            kind, _, task = path.stem.partition("_")
            assert config["task"] == f"mod_{task}_{kind}" and config["dataset_kwargs"] == {"task": task}


def test_loads_from_any_directory_without_the_repository(tmp_path):
    code = (
        "import sys; from lm_eval.tasks import TaskManager;"
        f"manager = TaskManager(include_path={str(TASK_CONFIGS)!r}, include_defaults=False);"
        "task = manager.load(['mod_math_gen'])['tasks']['mod_math_gen'];"
        "doc = task.eval_docs[0];"
        "assert 'router_tuning' not in sys.modules, 'the repository was imported';"
        "print(task.doc_to_text(doc) + task.doc_to_target(doc))"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=120
    )
    first = json.loads((Path(HELDOUT).parents[2] / "data/sample/heldout/math.jsonl").read_text().split("\n")[0])
    assert done.stdout.strip() == render_prompt(first["messages"][:-1], "</s>") + first["answer"]

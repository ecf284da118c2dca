"""The paper's tasks from local files: complete, never scoring a few-shot row, equal to stock lm-eval."""

from __future__ import annotations

import importlib.util
import json

import pytest
import yaml
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from transformers import AutoTokenizer, LlamaForCausalLM

from utils.evaluation.harness import TASK_CONFIGS, evaluate, task_manager
from utils.evaluation.models import load_dense

PAPER = TASK_CONFIGS / "paper"
SHOTS = {
    "arc_challenge": 25,
    "boolq": 0,
    "hellaswag": 10,
    "mmlu": 5,
    "openbookqa": 0,
    "piqa": 0,
    "rte": 0,
    "winogrande": 5,
    "gsm8k": 5,
}


@pytest.fixture(scope="module")
def sources():
    spec = importlib.util.spec_from_file_location("sources_under_test", PAPER / "sources.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def eval_data():
    folder = TASK_CONFIGS.parents[2] / "shared" / "data" / "eval"
    if not folder.is_dir():
        pytest.skip("no local copies of the paper's tasks beside the repository")
    return folder


def write(folder, split, rows):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_tasks_and_shots_are_those_of_the_paper(sources):
    config = yaml.load((PAPER / "paper.yaml").read_text().replace("!function", ""), Loader=yaml.SafeLoader)
    found = {member.get("task", member.get("group")): member["num_fewshot"] for member in config["task"]}
    assert found == SHOTS and set(sources.HUB) == set(SHOTS)
    assert all(member["dataset_kwargs"]["name"] == name for name, member in zip(SHOTS, config["task"], strict=True))


def test_local_rows_by_split_and_subject(sources, tmp_path):
    write(tmp_path / "mmlu", "test", [{"subject": "anatomy", "n": 1}, {"subject": "law", "n": 2}])
    write(tmp_path / "mmlu", "dev", [{"subject": "anatomy", "n": 3}])
    found = sources.load("mmlu", str(tmp_path), config_source="/x/mmlu_anatomy.yaml", version=1)
    assert {split: rows["n"] for split, rows in found.items()} == {"test": [1], "dev": [3]}
    with pytest.raises(FileNotFoundError, match="boolq"):
        sources.load("boolq", str(tmp_path))


def test_a_few_shot_row_is_never_scored(sources, tmp_path, monkeypatch):
    rows = [{"n": n} for n in range(70)]
    write(tmp_path / "winogrande", "validation", rows)
    write(tmp_path / "arc_challenge", "validation", rows[:5])
    write(tmp_path / "arc_challenge", "test", rows[5:9])
    monkeypatch.setenv("MOD_EVAL_DATA", str(tmp_path))
    found = sources.load("winogrande")
    assert set(found["train"]["n"]).isdisjoint(found["validation"]["n"]) and len(found["validation"]) == 6
    found = sources.load("arc_challenge")
    assert found["train"]["n"] == [0, 1, 2, 3, 4] and found["test"]["n"] == [5, 6, 7, 8]


def test_dense_scores_equal_stock_lm_eval_on_the_unrouted_base(base, eval_data):
    metadata = {"data_root": str(eval_data)}
    ours = evaluate(load_dense(base), AutoTokenizer.from_pretrained(base), ["mod_paper"], limit=1, metadata=metadata)
    lm = HFLM(pretrained=LlamaForCausalLM.from_pretrained(base), tokenizer=AutoTokenizer.from_pretrained(base))
    manager = task_manager(["mod_paper"], TASK_CONFIGS, metadata)
    stock = simple_evaluate(model=lm, tasks=["mod_paper"], limit=1, task_manager=manager, bootstrap_iters=0)
    tasks = [name for name in stock["results"] if name in stock["n-samples"]]
    assert len(tasks) == 8 + 57 and set(ours["samples"]) == set(tasks)
    for name in tasks:
        for key, value in ours["scores"][name].items():
            if "stderr" not in key:
                assert value == pytest.approx(stock["results"][name][key], nan_ok=True), (name, key)
    assert ours["scores"]["mmlu"]["acc,none"] == pytest.approx(stock["results"]["mmlu"]["acc,none"])

"""Task files: held-out ones rendered as in training; the paper's complete, never scoring an example, as in stock."""

import json
import os
from pathlib import Path

import datasets
import lm_eval.tasks
import pytest
import yaml
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from paper_rows import write_rows
from transformers import LlamaForCausalLM

from router_tuning.checkpoint.loading import load_dense
from router_tuning.embedded.sample_tasks import FREE_TASKS, TASKS
from router_tuning.evaluation.tasks import TASK_CONFIGS, evaluate

TEXTS = {"system": " Be brief. ", "user": "Hi\nthere", "assistant": "Yes."}
CONVERSATION = [{"role": role, "content": text} for role, text in TEXTS.items()]
CONVERSATION += [{"role": "user", "content": "And?"}, {"role": "assistant", "content": "No."}]
PROMPT = "<|system|>\nBe brief.\n<|user|>\nHi\nthere\n<|assistant|>\nYes.</s>\n<|user|>\nAnd?\n<|assistant|>\n"
PAPER = TASK_CONFIGS / "paper"
SHOTS = dict.fromkeys(("boolq", "openbookqa", "piqa", "rte"), 0) | dict.fromkeys(("mmlu", "winogrande", "gsm8k"), 5)
SHOTS |= {"arc_challenge": 25, "hellaswag": 10}
ZERO_SHOT = {name: 0 for name in SHOTS if name != "gsm8k"}


@pytest.fixture
def sources(task_code):
    return task_code("paper/sources.py")


def mmlu_subjects():
    """As lm-eval names them, one file each."""
    folder = Path(lm_eval.tasks.__file__).parent / "mmlu" / "default"
    return sorted(path.stem.removeprefix("mmlu_") for path in folder.glob("mmlu_*.yaml"))


@pytest.fixture(scope="module")
def eval_data(tmp_path_factory):
    """Rows in the hub's columns: those of ``MOD_EVAL_DATA``, where it names a copy of the real ones, else made up."""
    given = os.environ.get("MOD_EVAL_DATA")
    return Path(given) if given else write_rows(tmp_path_factory.mktemp("eval"), mmlu_subjects())


def write(folder, split, rows):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("group, shots", [("paper", SHOTS), ("zero_shot", ZERO_SHOT)])
def test_tasks_and_shots_are_those_of_the_paper(sources, group, shots):
    config = yaml.load((PAPER / f"{group}.yaml").read_text().replace("!function", ""), Loader=yaml.SafeLoader)
    found = {member.get("task", member.get("group")): member["num_fewshot"] for member in config["task"]}
    assert found == shots and set(sources.HUB) == set(SHOTS)
    names = [member["dataset_kwargs"]["name"] for member in config["task"]]
    assert names == [member.get("task", member.get("group")) for member in config["task"]]


def test_a_few_shot_row_is_never_scored(sources, tmp_path, monkeypatch):
    """Of local rows, by split, and of MMLU by subject."""
    write(tmp_path / "winogrande", "validation", [{"n": n} for n in range(70)])
    for task, splits in {"arc_challenge": ("validation", "test"), "mmlu": ("dev", "test")}.items():
        for first, split in zip((0, 5), splits, strict=True):
            rows = [{"n": n, "subject": "anatomy" if n % 5 < 4 else "law"} for n in range(first, first + 5)]
            write(tmp_path / task, split, rows)
    monkeypatch.setenv("MOD_EVAL_DATA", str(tmp_path))
    found = sources.load("winogrande")
    assert set(found["train"]["n"]).isdisjoint(found["validation"]["n"]) and len(found["validation"]) == 6
    found = sources.load("arc_challenge")
    assert found["train"]["n"] == [0, 1, 2, 3, 4] and found["test"]["n"] == [5, 6, 7, 8, 9]
    found = sources.load("mmlu", config_source="/x/mmlu_anatomy.yaml", version=1)
    assert {split: rows["n"] for split, rows in found.items()} == {"dev": [0, 1, 2, 3], "test": [5, 6, 7, 8]}
    with pytest.raises(FileNotFoundError, match="boolq"):
        sources.load("boolq")


@pytest.mark.parametrize(
    "group, shots", [("mod_zero_shot", ZERO_SHOT), pytest.param("mod_paper", SHOTS, marks=pytest.mark.full)]
)
def test_dense_scores_equal_stock_lm_eval(base, tokenizer, eval_data, sources, monkeypatch, group, shots):
    """The stock side asks for lm-eval's own tasks by their names, and gets the same rows where it asks the hub."""
    monkeypatch.setenv("MOD_EVAL_DATA", str(eval_data))
    limit = int(os.environ.get("MOD_EVAL_LIMIT", 1))
    found = evaluate(load_dense(base), tokenizer, [group], limit=limit)
    ours, asked = found["tasks"], []

    def from_the_hub(path, name=None, **_):
        task = next(task for task, (repo, config) in sources.HUB.items() if repo == path and config in (name, None))
        asked.append(task)
        return sources.load(task, config_source=f"mmlu_{name}.yaml")

    monkeypatch.setattr(datasets, "load_dataset", from_the_hub)
    lm = HFLM(pretrained=LlamaForCausalLM.from_pretrained(base), tokenizer=tokenizer)
    manager = TaskManager()
    loaded = manager.load([*shots])["tasks"]
    for name, task in loaded.items():
        task.set_config("num_fewshot", shots["mmlu" if name.startswith("mmlu_") else name])
    asked_for = dict(tasks=list(loaded.values()), limit=limit, task_manager=manager)
    stock = simple_evaluate(model=lm, **asked_for, bootstrap_iters=0)
    assert set(asked) == set(shots) and set(ours) == set(loaded)
    for name in loaded:
        for key, value in ours[name]["scores"].items():
            if "stderr" not in key:
                assert value == pytest.approx(stock["results"][name][key], nan_ok=True), (name, key)
    if sizes := {name: ours[name]["samples"] for name in loaded if name.startswith("mmlu_")}:
        mean = sum(stock["results"][name]["acc,none"] * size for name, size in sizes.items()) / sum(sizes.values())
        assert len(sizes) == 57 and found["groups"]["mmlu"]["acc,none"] == pytest.approx(mean)


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

"""Exports in an environment without this repository: stock lm-eval, logits, greedy text, pipelines."""

from __future__ import annotations

import json

import pytest
import torch
from isolated_environment import IsolatedPython
from transformers import AutoModelForCausalLM, AutoTokenizer

from utils.checkpoint.export_full import export_full
from utils.evaluation.harness import TASK_CONFIGS, evaluate
from utils.model import load_routers

TASKS = ["mod_copy_gen", "mod_math_mc", "mod_story_text"]
PROMPTS = [
    "<|user|>\nAdd 12 and 3.\n<|assistant|>\n",
    "<|user|>\nHi\n<|assistant|>\n",
    "<|user|>\nSort.\nInput: CAB\n",
]

SCORES = """
import json, sys
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
folder, configs, tasks = sys.argv[1], sys.argv[2], sys.argv[3].split(",")
found = {}
for size in (1, 16):
    result = simple_evaluate(
        model="hf", model_args=f"pretrained={folder},trust_remote_code=True,dtype=float32", tasks=tasks, limit=6,
        batch_size=size, device="cpu", bootstrap_iters=0,
        task_manager=TaskManager(include_path=configs, include_defaults=False),
    )
    found[size] = result["results"]
print("RESULT" + json.dumps(found, default=str))
"""

MODEL = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
folder, prompts = sys.argv[1], torch.load(sys.argv[2])
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
batch = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
logits = [model(**tokenizer(p, return_tensors="pt", return_token_type_ids=False)).logits.detach() for p in prompts]
greedy = model.generate(**batch, do_sample=False, max_new_tokens=12)
talk = pipeline("text-generation", model=model, tokenizer=tokenizer)
chat = talk([{"role": "user", "content": "Add 12 and 3."}], do_sample=False, max_new_tokens=6)
torch.save({"logits": logits, "greedy": greedy, "chat": chat[0]["generated_text"][-1]["content"]}, sys.argv[3])
"""


@pytest.fixture(scope="module")
def outside(tmp_path_factory):
    return IsolatedPython(tmp_path_factory.mktemp("outside"))


@pytest.fixture(scope="module")
def export(tmp_path_factory, run, base):
    folder = tmp_path_factory.mktemp("exports") / "full"
    export_full(run, base, folder, "card")
    return folder


@pytest.fixture(scope="module")
def routed(base, run):
    return load_routers(AutoModelForCausalLM.from_pretrained(base), run).eval()


@pytest.fixture(scope="module")
def in_process(base, routed):
    result = evaluate(routed, AutoTokenizer.from_pretrained(base), TASKS, batch_size=4, limit=6)
    capacity = result["meter"]["mod_math_mc"]["capacity"]["total"]
    assert 0 < capacity < 1, "the routers must skip something, or the comparison shows nothing"
    return {task: result["scores"][task] for task in TASKS}


def plain(scores):
    return {key: value for key, value in scores.items() if "," in key and "stderr" not in key}


def test_the_repository_is_absent_there(outside, tmp_path):
    code = (
        "import importlib.util as u; import lm_eval, transformers; "
        "assert u.find_spec('utils') is None and u.find_spec('entrypoints') is None"
    )
    outside.run("-c", code, cwd=tmp_path)


def test_stock_command_line_gives_the_scores_of_the_process(outside, export, in_process, tmp_path):
    arguments = ["-m", "lm_eval", "--model", "hf", "--tasks", ",".join(TASKS), "--limit", "6", "--device", "cpu"]
    arguments += ["--model_args", f"pretrained={export},trust_remote_code=True,dtype=float32", "--batch_size", "4"]
    arguments += ["--include_path", str(TASK_CONFIGS), "--output_path", str(tmp_path / "out")]
    outside.run(*arguments, cwd=tmp_path)
    [path] = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(path.read_text())["results"]
    for task in TASKS:
        assert plain(found[task]) == pytest.approx(plain(in_process[task]), rel=1e-5)


def test_scores_do_not_depend_on_the_batch_size(outside, export, in_process, tmp_path):
    (tmp_path / "scores.py").write_text(SCORES)
    out = outside.run("scores.py", str(export), str(TASK_CONFIGS), ",".join(TASKS), cwd=tmp_path)
    found = json.loads(out.split("RESULT")[1])
    for size in ("1", "16"):
        for task in TASKS:
            assert plain(found[size][task]) == pytest.approx(plain(in_process[task]), rel=1e-5)


@torch.no_grad()
def test_logits_and_greedy_text_equal_those_of_the_process(outside, export, routed, base, tmp_path):
    (tmp_path / "model.py").write_text(MODEL)
    torch.save(PROMPTS, tmp_path / "prompts.pt")
    outside.run("model.py", str(export), "prompts.pt", "out.pt", cwd=tmp_path)
    found = torch.load(tmp_path / "out.pt")
    tokenizer = AutoTokenizer.from_pretrained(base)
    for prompt, logits in zip(PROMPTS, found["logits"], strict=True):
        torch.testing.assert_close(routed(**tokenizer(prompt, return_tensors="pt")).logits, logits, atol=1e-5, rtol=0)
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    assert torch.equal(routed.generate(**batch, do_sample=False, max_new_tokens=12), found["greedy"])
    first = tokenizer(PROMPTS[0], return_tensors="pt")
    answer = routed.generate(**first, do_sample=False, max_new_tokens=6)[0, first["input_ids"].shape[1] :]
    assert found["chat"] == tokenizer.decode(answer, skip_special_tokens=True)

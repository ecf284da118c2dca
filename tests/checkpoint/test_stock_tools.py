"""Exports in an environment without this repository: stock lm-eval, logits, greedy text, pipelines."""

from __future__ import annotations

import json

import pytest
import torch
from isolated_environment import IsolatedPython
from tiny_checkpoint import write_base, write_run
from transformers import AutoTokenizer

from router_tuning.checkpoint.exporting import export
from router_tuning.checkpoint.loading import load_tuned
from router_tuning.evaluation.tasks import TASK_CONFIGS, evaluate

FAMILIES = ("gemma3_text", "mixtral")
"""Whose full exports are loaded, beside the forms of a Llama."""
TASKS = ["mod_copy_gen", "mod_math_mc", "mod_story_text"]
PROMPTS = [
    "<|user|>\nAdd 12 and 3.\n<|assistant|>\n",
    "<|user|>\nHi\n<|assistant|>\n",
    "<|user|>\nSort.\nInput: CAB\n",
]

OUTSIDE = """
import importlib.util, json, sys, torch
foreign = [name for name in ("router_tuning", "entrypoints", "deepspeed", "orjson") if importlib.util.find_spec(name)]
assert not foreign, foreign
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, pipeline
forms, prompts, configs, tasks, target = json.loads(sys.argv[1]), torch.load(sys.argv[2]), *sys.argv[3:6]
found = {}
for form, (folder, adapter) in forms.items():
    AutoTokenizer.from_pretrained(folder), AutoConfig.from_pretrained(folder)
    try:
        AutoModelForCausalLM.from_pretrained(folder)
    except ValueError as error:
        assert form == "merged" or "routed model: pass trust_remote_code=True" in str(error), error
    else:
        raise AssertionError("loaded as a dense model")
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules"), type(model)
    model = PeftModel.from_pretrained(model, adapter).eval() if adapter else model.eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    one = [tokenizer(p, return_tensors="pt", return_token_type_ids=False) for p in prompts]
    batch = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
    talk = pipeline("text-generation", model=model, tokenizer=tokenizer)
    chat = talk([{"role": "user", "content": "Add 12 and 3."}], do_sample=False, max_new_tokens=6)
    found[form] = {
        "logits": [model(**row).logits.detach() for row in one],
        "greedy": model.generate(**batch, do_sample=False, max_new_tokens=12),
        "chat": chat[0]["generated_text"][-1]["content"],
        "scores": {},
    }
    for size, chosen in ((1, tasks.split(",")), (4, ["mod_copy_gen"])) if form in ("full", "peft", "merged") else ():
        options = f"pretrained={folder},trust_remote_code=True,dtype=float32" + (f",peft={adapter}" if adapter else "")
        result = simple_evaluate(
            model="hf", model_args=options, tasks=chosen, limit=6, batch_size=size, device="cpu",
            bootstrap_iters=0, task_manager=TaskManager(include_path=configs, include_defaults=False),
        )
        found[form]["scores"][size] = json.dumps(result["results"], default=str)
assert "router_tuning" not in sys.modules
torch.save(found, target)
"""


@pytest.fixture(scope="module")
def outside(tmp_path_factory):
    return IsolatedPython(tmp_path_factory.mktemp("outside"), ["torch", "transformers", "peft", "lm-eval[hf]"])


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    """Base and run of each family."""
    folder = tmp_path_factory.mktemp("families")
    bases = {family: write_base(folder / family, family) for family in FAMILIES}
    return {family: (base, write_run(folder / f"{family}-run", base)) for family, base in bases.items()}


@pytest.fixture(scope="module")
def forms(tmp_path_factory, run, lora_run, base, families):
    """``{form: (folder of the weights, folder of the adapter or None)}``: all that stock tools can load."""
    folder = tmp_path_factory.mktemp("exports")
    for family, (other, tuned) in families.items():
        export(tuned, other, folder / family)
    export(run, base, folder / "full")
    export(lora_run[0], base, folder / "peft", "peft")
    export(lora_run[0], base, folder / "merged", "merged")
    paths = {"full": ("full", None), "peft": ("peft/base", "peft"), "merged": ("merged", None)}
    paths |= {family: (family, None) for family in families}
    return {form: [part and str(folder / part) for part in parts] for form, parts in paths.items()}


@pytest.fixture(scope="module")
def inside(base, run, lora_run, families):
    """The same models in this process."""
    tuned = load_tuned(base, lora_run[0])
    others = {family: load_tuned(*places) for family, places in families.items()}
    return {"full": load_tuned(base, run), "peft": tuned, "merged": tuned, **others}


@pytest.fixture(scope="module")
def scores(base, inside):
    """In process, batch size 3: ``{form: {task: {metric: value}}}``."""
    found = {}
    for form in ("full", "peft", "merged"):
        result = evaluate(inside[form], AutoTokenizer.from_pretrained(base), TASKS, batch_size=3, limit=6)["tasks"]
        assert result["mod_math_mc"]["share"] < 1, "the routers must skip something, or the comparison shows nothing"
        found[form] = {task: result[task]["scores"] for task in TASKS}
    return found


@pytest.fixture(scope="module")
def found(outside, forms, tmp_path_factory):
    """What the environment without this repository computes from every form, in one process."""
    folder = tmp_path_factory.mktemp("found")
    (folder / "outside.py").write_text(OUTSIDE)
    torch.save(PROMPTS, folder / "prompts.pt")
    arguments = [json.dumps(forms), "prompts.pt", str(TASK_CONFIGS), ",".join(TASKS), "out.pt"]
    outside.run("outside.py", *arguments, cwd=folder)
    return torch.load(folder / "out.pt")


def plain(scores):
    return {key: value for key, value in scores.items() if "," in key and "stderr" not in key}


@pytest.mark.parametrize("form", ["full", "peft", "merged"])
def test_stock_scores_are_those_of_the_process(found, scores, form):
    """Scoring in batches, stock lm-eval pads without a mask: what decides per sequence takes that for text."""
    for size, tasks in ((1, TASKS), (4, ["mod_copy_gen"])):
        there = json.loads(found[form]["scores"][size])
        for task in tasks:
            assert plain(there[task]) == pytest.approx(plain(scores[form][task]), rel=1e-5), (size, task)


@torch.no_grad()
@pytest.mark.parametrize("form", ["full", "peft", "merged", *FAMILIES])
def test_logits_and_greedy_text_equal_those_of_the_process(found, inside, form, base):
    there, here, tokenizer = found[form], inside[form], AutoTokenizer.from_pretrained(base)
    for prompt, logits in zip(PROMPTS, there["logits"], strict=True):
        torch.testing.assert_close(here(**tokenizer(prompt, return_tensors="pt")).logits, logits, atol=1e-5, rtol=0)
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    assert torch.equal(here.generate(**batch, do_sample=False, max_new_tokens=12), there["greedy"])
    first = tokenizer(PROMPTS[0], return_tensors="pt")
    answer = here.generate(**first, do_sample=False, max_new_tokens=6)[0, first["input_ids"].shape[1] :]
    assert there["chat"] == tokenizer.decode(answer, skip_special_tokens=True)

"""Exports in an environment without this repository: stock lm-eval, logits, greedy text, pipelines."""

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
    if not (adapter or form == "full"):  # saved by code that came along, it takes that code along
        model.save_pretrained("again " + form)
        model = AutoModelForCausalLM.from_pretrained("again " + form, trust_remote_code=True)
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
def forms(tmp_path_factory, run, lora_run, base):
    """``{form: (folder of the weights, folder of the adapter or None, the model in this process)}``."""
    folder, lora, made = tmp_path_factory.mktemp("exports"), lora_run[0], {}
    parts = [("full", run, "full", None), ("peft", lora, "peft/base", "peft"), ("merged", lora, "merged", None)]
    for form, tuned, weights, adapter in parts:
        export(tuned, base, folder / form, form)
        made[form] = folder / weights, adapter and folder / adapter, load_tuned(base, tuned)
    for family in FAMILIES:
        other = write_base(folder / f"{family}-base", family)
        tuned = write_run(folder / f"{family}-run", other)
        export(tuned, other, folder / family)
        made[family] = folder / family, None, load_tuned(other, tuned)
    return made


@pytest.fixture(scope="module")
def found(forms, tmp_path_factory):
    """What an environment without this repository computes from every form, in one process."""
    folder = tmp_path_factory.mktemp("found")
    outside = IsolatedPython(folder / "outside", ["torch", "transformers", "peft", "lm-eval[hf]"])
    (folder / "outside.py").write_text(OUTSIDE)
    torch.save(PROMPTS, folder / "prompts.pt")
    places = {form: (str(weights), adapter and str(adapter)) for form, (weights, adapter, _) in forms.items()}
    arguments = [json.dumps(places), "prompts.pt", str(TASK_CONFIGS), ",".join(TASKS), "out.pt"]
    outside.run("outside.py", *arguments, cwd=folder)
    return torch.load(folder / "out.pt")


@pytest.mark.parametrize("form", ["full", "peft", "merged"])
def test_stock_scores_are_those_of_the_process(found, forms, base, form):
    """Scoring in batches, stock lm-eval pads without a mask: what decides per sequence takes that for text."""
    here = evaluate(forms[form][2], AutoTokenizer.from_pretrained(base), TASKS, batch_size=3, limit=6)["tasks"]
    assert here["mod_math_mc"]["share"] < 1, "the routers must skip something, or the comparison shows nothing"
    for size, tasks in ((1, TASKS), (4, ["mod_copy_gen"])):
        there = json.loads(found[form]["scores"][size])
        for task in tasks:
            assert plain(there[task]) == pytest.approx(plain(here[task]["scores"]), rel=1e-5), (size, task)


def plain(scores):
    return {key: value for key, value in scores.items() if "," in key and "stderr" not in key}


@torch.no_grad()
@pytest.mark.parametrize("form", ["full", "peft", "merged", *FAMILIES])
def test_logits_and_greedy_text_equal_those_of_the_process(found, forms, form, base):
    there, here, tokenizer = found[form], forms[form][2], AutoTokenizer.from_pretrained(base)
    for prompt, logits in zip(PROMPTS, there["logits"], strict=True):
        torch.testing.assert_close(here(**tokenizer(prompt, return_tensors="pt")).logits, logits, atol=1e-5, rtol=0)
    batch, first = tokenizer(PROMPTS, return_tensors="pt", padding=True), tokenizer(PROMPTS[0], return_tensors="pt")
    assert torch.equal(here.generate(**batch, do_sample=False, max_new_tokens=12), there["greedy"])
    answer = here.generate(**first, do_sample=False, max_new_tokens=6)[0, first["input_ids"].shape[1] :]
    assert there["chat"] == tokenizer.decode(answer, skip_special_tokens=True)

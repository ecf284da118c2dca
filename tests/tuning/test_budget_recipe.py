"""``--recipe budget`` from a command line to files: the requested capacity is reached and the dial is stored."""

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import tiny_checkpoint
import tiny_tuning
import torch
from safetensors.torch import load_file
from tiny_tuning import record, routers, tune
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from router_tuning.errors import UserError
from router_tuning.model import force_routing, load_routers, record_routing
from router_tuning.tuning.batching import generated_from
from router_tuning.tuning.encoding import encode_row, render_prompt

SETTINGS = {
    "recipe": "budget",
    "granularity": "attn_token",
    "router_dir": None,
    "skip_rank": 4,
    "gradient_scale": None,
}
KINDS = {
    "sequence": ("llama", "attn_sequence", 2),
    "token": ("llama", "attn_token+mlp_token", 2),
    "closed form": ("llama", "attn_token+mlp_token", 0),
    "experts": ("mixtral", "expert_token", 2),
    "experts in closed form": ("mixtral", "expert_token", 0),
}


@pytest.fixture(scope="module", params=KINDS)
def tuned(request, tmp_path_factory) -> tuple[Path, Path, str]:
    """Base and folder of a run that was asked for a capacity of 0.4, and its granularity."""
    family, granularity, epochs = KINDS[request.param]
    folder = tmp_path_factory.mktemp("run")
    data = tiny_tuning.write_conversations(folder / "rows.jsonl", rows=64)
    base = tiny_checkpoint.write_base(folder / "base", family)
    if family == "llama":  # of small weights: where nothing is sure, second order holds
        LlamaForCausalLM(LlamaConfig.from_pretrained(base)).save_pretrained(base)
    settings = SETTINGS | {"granularity": granularity, "num_train_epochs": epochs, "global_batch_size": 16}
    if granularity == "expert_token":
        settings["skip_rank"] = None
    tune({"base": base, "start": None, "data": data}, folder / "run", **settings)
    return base, folder / "run", granularity


def model_of(base: Path, run: Path | None = None, capacity: float | None = None) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    return load_routers(model, run, capacity=capacity) if run else model


def test_the_requested_capacity_is_reached_and_the_dial_turns(tuned):
    base, run, granularity = tuned
    assert record(run)["reached_capacity"] == pytest.approx(0.4, abs=0.05)
    dial = record(run, "router_config")["dial"]
    assert dial["capacity"][0] < 0.12 and dial["capacity"][-1] == 1  # first tokens always run where there is a path
    tokenizer, sequence = AutoTokenizer.from_pretrained(base), granularity == "attn_sequence"
    rows = [json.loads(line) for line in (run.parent / "rows.jsonl").read_text().splitlines()]
    for capacity in (None, 0.2, 0.7):
        model = model_of(base, run, capacity)
        with record_routing(model) as log, torch.no_grad():
            for row in rows:
                ids = tokenizer(render_prompt(row, tokenizer))["input_ids"] if sequence else encode_row(row, tokenizer)
                model(torch.tensor([ids if sequence else ids["input_ids"][:-1]]), use_cache=False)
        assert log.capacity()["total"] == pytest.approx(capacity or 0.4, abs=0.05)


def test_routers_know_better_than_chance_what_to_skip(tuned):
    """On answers that none has seen."""
    base, run, granularity = tuned
    if granularity == "attn_sequence":
        pytest.skip("answers of random words differ too little for whole sequences to be told apart")
    dense, model, tokenizer = model_of(base), model_of(base, run), AutoTokenizer.from_pretrained(base)
    apart, generator = {"routers": 0.0, "chance": 0.0}, torch.Generator().manual_seed(0)
    for line in tiny_tuning.write_conversations(run.parent / "other.jsonl", rows=12, seed=1).read_text().splitlines():
        row = encode_row(json.loads(line), tokenizer)
        ids, learnt = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"][1:]) != -100
        with torch.no_grad(), record_routing(model) as log:
            model(ids, use_cache=False)
        share = log.capacity()["total"]
        chance = lambda *args, share=share: torch.rand(args[2], generator=generator) < share  # noqa: E731
        for name, under in {"routers": nullcontext(), "chance": force_routing(model, chance)}.items():
            with torch.no_grad(), under:
                ours, theirs = (m(ids, use_cache=False).logits[0, :-1][learnt].log_softmax(-1) for m in (model, dense))
            apart[name] += float((theirs.exp() * (theirs - ours)).sum(-1).mean())
    assert apart["routers"] < 0.8 * apart["chance"]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"lora": True, "num_train_epochs": 0}, "the run has no step"),
        ({"skip_rank": 33}, "--skip_rank 33 must be at most the base's hidden size, 32"),
        ({"granularity": "attn_sequence", "max_train_samples": 9}, "9 decisions are too few to fit a router on"),
        ({"lowest_budget": 0.97}, "--lowest_budget 0.97 and --highest_budget 0.95"),
    ],
)
def test_what_it_would_not_do_is_refused(parts, tmp_path, flags, told):
    with pytest.raises(UserError, match=told):
        tune(parts, tmp_path / "run", **SETTINGS | flags)


@pytest.mark.parametrize(
    ("labels", "prompt", "kept"),
    [
        ([-100, -100, 7, 8], 2, 3),  # the last answer token predicts nothing
        ([-100, -100, 7, 8, -100], 2, 3),  # nor does the template behind it
        ([5, 6, 7, 8], 1, 3),
        ([-100, -100, -100, -100], 4, 4),  # nothing learnt: all of it
        ([5], 1, 1),
    ],
)
def test_routers_are_calibrated_on_what_generation_runs(labels, prompt, kept):
    row = {"input_ids": list(range(len(labels))), "labels": labels}
    assert [len(generated_from(row, level)["input_ids"]) for level in (True, False)] == [prompt, kept]


def test_a_resumed_run_ends_with_the_same_bits(parts, tmp_path):
    whole, settings = tmp_path / "whole", {**SETTINGS, "granularity": "attn_sequence+mlp_token"}
    tune(parts, whole, **settings)
    run = tiny_tuning.resume(parts, whole, 4, tmp_path / "run", **settings)
    assert (run / "router.safetensors").read_bytes() == (whole / "router.safetensors").read_bytes()


def test_training_runs_at_the_drawn_budgets_and_paths_move_where_they_train(parts, tmp_path):
    runs = {"high": {"lowest_budget": 0.9}, "low": {"lowest_budget": 0.1, "highest_budget": 0.3, "train_skip": False}}
    for name, further in runs.items():
        tune(parts, tmp_path / name, **SETTINGS | further)
    high, low = ([line["capacity"] for line in tiny_tuning.history(tmp_path / name)] for name in runs)
    assert min(high) > 0.8 and 0.5 > max(low)
    fitted = tune(parts, tmp_path / "fitted", num_train_epochs=0, **SETTINGS).weights
    moved, fixed = (routers(tmp_path / name) for name in runs)
    for name in (name for name in fixed if "mod_skip" in name):
        assert torch.equal(fixed[name], fitted[name]) and not torch.equal(moved[name], fitted[name])


@pytest.mark.parametrize(
    ("granularity", "trains"), [("attn_sequence", {"router_only": False}), ("attn_token", {"lora": True, "lora_r": 2})]
)
def test_routers_train_beside_adapters_or_the_base(parts, tmp_path, trains, granularity):
    """peft trains a copy of every router: that copy is what is fitted, stepped and saved."""
    settings, run = {**SETTINGS, "granularity": granularity}, tmp_path / "trained"
    tune(parts, tmp_path / "start", num_train_epochs=0, **settings)
    tune(parts, run, **trains, **settings)
    start, end = routers(tmp_path / "start"), routers(run)
    assert start.keys() == end.keys()
    for name in (name for name in start if "mod_router" in name):
        assert not torch.equal(end[name], start[name]) and end[name].isfinite().all()
    if "lora" in trains:
        saved = load_file(run / "adapter" / "adapter_model.safetensors")
        assert all(value.abs().max() > 0 for name, value in saved.items() if "lora_B" in name)
    else:
        before, after = (load_file(place / "model.safetensors") for place in (parts["base"], run / "model"))
        assert not torch.equal(*(state["model.layers.4.mlp.up_proj.weight"] for state in (before, after)))

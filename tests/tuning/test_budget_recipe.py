"""``--recipe budget`` from a command line to files: the requested capacity is reached and the dial is stored."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext

import pytest
import tiny_checkpoint
import tiny_tuning
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from router_tuning.embedded.base_training import build_tokenizer
from router_tuning.embedded.sample_tasks import generate
from router_tuning.errors import UserError
from router_tuning.model import force_routing, load_routers, record_routing
from router_tuning.tuning.batching import predicting_part_of, prompt_of
from router_tuning.tuning.command.command_line import parse_command
from router_tuning.tuning.encoding import encode_row, render_prompt
from router_tuning.tuning.run import Run
from router_tuning.tuning.tuning import run_tuning

TASKS = ("copy", "max", "count")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    tokenizer = build_tokenizer(320, 20)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 5, "num_attention_heads": 4}
    special = {"vocab_size": len(tokenizer), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    LlamaForCausalLM(LlamaConfig(**shape, **special, num_key_value_heads=2)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    rows = [{"messages": generate(task, n, "train").messages} for n in range(40) for task in TASKS]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def tune(base, folder, *flags):
    argv = ["--model_name_or_path", base, "--train_file", base / "rows.jsonl", "--max_train_samples", 0, "--mod_n", 3]
    argv += ["--output_dir", folder, "--report_to", "none", "--save_strategy", "no", "--recipe", "budget"]
    argv += ["--global_batch_size", 20, *flags]
    return run_tuning(Run(parse_command([str(part) for part in argv])))


@pytest.mark.parametrize(
    ("granularity", "epochs"), [("attn_sequence", 3), ("attn_token+mlp_token", 3), ("attn_token", 0)]
)
def test_the_requested_capacity_is_reached_and_the_dial_turns(base, tmp_path, granularity, epochs):
    folder = tmp_path / "run"
    tune(base, folder, "--granularity", granularity, "--target_capacity", 0.4, "--num_train_epochs", epochs)
    record = json.loads((folder / "run.json").read_text())
    assert abs(record["reached_capacity"] - 0.4) <= 0.03
    dial = json.loads((folder / "router_config.json").read_text())["dial"]
    assert dial["capacity"][0] < 0.05 and dial["capacity"][-1] == 1  # first tokens always run where there is a path
    tokenizer = build_tokenizer(320, 20)
    prompts = [
        render_prompt({"messages": generate(t, n, "train").messages}, tokenizer) for n in range(40) for t in TASKS
    ]
    for capacity in (None, 0.2, 0.7):
        model = load_routers(LlamaForCausalLM.from_pretrained(base).eval(), folder, capacity=capacity)
        with record_routing(model) as log, torch.no_grad():
            for prompt in prompts:
                model(**tokenizer(prompt, return_tensors="pt"), use_cache=False)
        # Token level was calibrated on whole conversations, these are their prompts.
        slack = 0.04 if granularity.endswith("sequence") else 0.15
        assert abs(log.capacity()["total"] - (capacity or 0.4)) <= slack


@pytest.mark.parametrize("epochs", [0, 3])
def test_routers_know_better_than_chance_what_to_skip(base, tmp_path, epochs):
    """On answers that none has seen; attention is worth far more than MLPs here, as closed form finds at once."""
    flags = ("--granularity", "attn_token+mlp_token", "--target_capacity", 0.4, "--num_train_epochs", epochs)
    tune(base, tmp_path / "run", *flags)
    dense, tokenizer = LlamaForCausalLM.from_pretrained(base).eval(), build_tokenizer(320, 20)
    model = load_routers(LlamaForCausalLM.from_pretrained(base).eval(), tmp_path / "run")
    apart, generator = {"routers": 0.0, "chance": 0.0}, torch.Generator().manual_seed(0)

    def chance(layer, part, shape, past):
        return torch.rand(shape, generator=generator) < 0.4

    for messages in (generate(task, number, "train").messages for number in range(40, 50) for task in TASKS):
        row = encode_row({"messages": messages}, tokenizer)
        ids, learnt = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"][1:]) != -100
        for name, under in {"routers": nullcontext(), "chance": force_routing(model, chance)}.items():
            with torch.no_grad(), under:
                ours, theirs = (m(ids, use_cache=False).logits[0, :-1][learnt].log_softmax(-1) for m in (model, dense))
            apart[name] += float((theirs.exp() * (theirs - ours)).sum(-1).mean())
    assert apart["routers"] < 0.5 * apart["chance"]
    damage = json.loads((tmp_path / "run" / "router_config.json").read_text())["damage"]
    assert max(v for k, v in damage.items() if "mlp" in k) < min(v for k, v in damage.items() if "attn" in k)


def test_recipe_defaults_give_way_to_flags():
    plain, ours = parse_command([]), parse_command(["--recipe", "budget"])
    assert (plain.training.learning_rate, plain.routing.router_pooling) == (1e-5, "sequence")
    assert (plain.routing.skip, ours.routing.skip) == ("zero", "low_rank")
    assert [round(ours.budget.lowest(target, 0.8), 3) for target in (0.2, 0.5, 0.8)] == [0.15, 0.45, 0.65]
    assert (ours.training.learning_rate, ours.routing.router_pooling) == (6e-3, "prompt")
    given = parse_command(["--recipe=budget", "--learning_rate", "0.5", "--router_pooling", "sequence"])
    assert (given.training.learning_rate, given.routing.router_pooling) == (0.5, "sequence")
    assert parse_command(["--recipe", "budget", "--granularity", "expert_token"]).routing.skip == "zero"


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--granularity", "attn_token", "--lora", "true", "--num_train_epochs", 0], "the run has no step"),
        (["--recipe", "paper", "--label_tokens", 9], "--label_tokens is a setting of --recipe budget"),
        (["--skip_rank", 33], "--skip_rank 33 must be at most the base's hidden size, 32"),
        (
            ["--granularity", "attn_token", "--gradient_checkpointing", "true"],
            "leave out fp16 and activation checkpoint",
        ),
        (["--lowest_budget", 0.97], "--lowest_budget 0.97 and --highest_budget 0.95"),
    ],
)
def test_what_it_would_not_do_is_refused(base, tmp_path, flags, told):
    with pytest.raises(UserError, match=told):
        tune(base, tmp_path / "run", *flags)


def test_prompt_ends_where_loss_begins():
    row = {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}
    assert prompt_of(row)["input_ids"] == [5, 6]
    assert prompt_of({"input_ids": [5, 6], "labels": [5, 6]})["input_ids"] == [5]


@pytest.mark.parametrize(
    ("labels", "kept"),
    [
        ([-100, -100, 7, 8], 3),  # the last answer token predicts nothing
        ([-100, -100, 7, 8, -100], 3),  # nor does the template behind it
        ([-100, 6, -100, 8], 3),
        ([5, 6, 7, 8], 3),
        ([-100, -100, -100, -100], 4),  # nothing learnt: all of it
        ([5], 1),
    ],
)
def test_token_level_is_calibrated_on_what_generation_runs(labels, kept):
    ids = list(range(len(labels)))
    assert predicting_part_of({"input_ids": ids, "labels": labels})["input_ids"] == ids[:kept]


SETTINGS = {"recipe": "budget", "granularity": "attn_token", "router_dir": None, "skip_rank": 4}


@pytest.mark.parametrize("granularity", ["attn_token", "attn_sequence+mlp_token"])
def test_training_runs_at_the_drawn_budgets_and_resumes_with_the_same_bits(parts, tmp_path, granularity):
    whole, run = tmp_path / "whole", tmp_path / "run"
    settings = {**SETTINGS, "granularity": granularity}
    tiny_tuning.tune(parts, whole, **settings)
    later = [line["capacity"] for line in tiny_tuning.history(whole)[1:]]
    assert later and all(0.0 <= capacity <= 1.0 for capacity in later)
    run.mkdir()
    shutil.copytree(whole / "checkpoint-4", run / "checkpoint-4")
    tiny_tuning.tune(parts, run, resume_from_checkpoint="auto", **settings)
    assert (run / "router.safetensors").read_bytes() == (whole / "router.safetensors").read_bytes()


def test_settings_are_those_of_the_command_line(parts, tmp_path):
    """Budgets from 0.9 on: nearly everything runs. Paths that train move, and others stay as they were fitted."""
    runs = {"high": {"lowest_budget": 0.9}, "low": {"lowest_budget": 0.1, "highest_budget": 0.3}}
    for name, further in {**runs, "paths": {"train_skip": True}}.items():
        tiny_tuning.tune(parts, tmp_path / name, **{**SETTINGS, "train_skip": False, **further})
    high, low = ([line["capacity"] for line in tiny_tuning.history(tmp_path / name)] for name in ("high", "low"))
    assert min(high) > 0.8 and 0.5 > max(low)
    fixed, also, moved = (load_file(tmp_path / name / "router.safetensors") for name in ("high", "low", "paths"))
    for name in (name for name in fixed if "mod_skip" in name):
        assert torch.equal(fixed[name], also[name]) and not torch.equal(fixed[name], moved[name])


@pytest.mark.parametrize(
    ("granularity", "trains"), [("attn_sequence", {"router_only": False}), ("attn_token", {"lora": True, "lora_r": 2})]
)
def test_routers_train_beside_adapters_or_the_base(parts, tmp_path, trains, granularity):
    """peft trains a copy of every router: that copy is what is fitted, stepped and saved."""
    settings, runs = {**SETTINGS, "granularity": granularity}, {name: tmp_path / name for name in ("start", "trained")}
    tiny_tuning.tune(parts, runs["start"], num_train_epochs=0, **settings)
    tiny_tuning.tune(parts, runs["trained"], **trains, **settings)
    start, end = (load_file(run / "router.safetensors") for run in runs.values())
    assert start.keys() == end.keys()
    moved = [name for name, value in start.items() if not torch.equal(end[name], value)]
    assert all(name in moved and end[name].isfinite().all() for name in start if "mod_router" in name)
    if "lora" in trains:
        saved = load_file(runs["trained"] / "adapter" / "adapter_model.safetensors")
        assert all(value.abs().max() > 0 for name, value in saved.items() if "lora_B" in name)
    else:
        name, base = "model.layers.4.mlp.up_proj.weight", load_file(parts["base"] / "model.safetensors")
        assert not torch.equal(load_file(runs["trained"] / "model" / "model.safetensors")[name], base[name])


@pytest.mark.parametrize("epochs", [0, 2])
def test_routers_of_experts_know_better_than_chance_which_assignments_to_skip(tmp_path, epochs):
    data = tiny_tuning.write_conversations(tmp_path / "rows.jsonl", rows=48)
    base = tiny_checkpoint.write_base(tmp_path / "base", "mixtral")
    settings = {
        **SETTINGS,
        "granularity": "expert_token",
        "num_train_epochs": epochs,
        "label_tokens": 1500,
        "global_batch_size": 16,
    }
    tiny_tuning.tune({"base": base, "start": None, "data": data}, tmp_path / "run", **settings)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["reached_capacity"] == pytest.approx(0.4, abs=0.05)
    dense = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    model = load_routers(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval(), tmp_path / "run")
    other = tiny_tuning.write_conversations(tmp_path / "other.jsonl", rows=12, seed=1)
    tokenizer, generator = AutoTokenizer.from_pretrained(base), torch.Generator().manual_seed(0)
    apart = {"routers": 0.0, "chance": 0.0}
    for line in other.read_text().splitlines():
        row = encode_row(json.loads(line), tokenizer)
        ids, learnt = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"][1:]) != -100
        with torch.no_grad(), record_routing(model) as log:
            ours, theirs = (m(ids, use_cache=False).logits[0, :-1][learnt].log_softmax(-1) for m in (model, dense))
        share = log.capacity()["total"]
        chance = lambda *args, share=share: torch.rand(args[2], generator=generator) < share  # noqa: E731
        with torch.no_grad(), force_routing(model, chance):
            blind = model(ids, use_cache=False).logits[0, :-1][learnt].log_softmax(-1)
        for name, found in {"routers": ours, "chance": blind}.items():
            apart[name] += float((theirs.exp() * (theirs - found)).sum(-1).mean())
    assert apart["routers"] < 0.8 * apart["chance"]

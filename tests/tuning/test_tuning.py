"""Whole runs in one process: what they write, what they refuse, the three things that can train."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from pathlib import Path

import pytest
import tiny_checkpoint
import tiny_tuning
import torch
from peft import PeftModel
from refused import refused
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from router_tuning.errors import UserError
from router_tuning.model import load_routers, route
from router_tuning.tuning.command.command_line import parse_command
from router_tuning.tuning.run import Run
from router_tuning.tuning.run_folder import RESULTS, base_of, default_folder


def logits(model, parts):
    tokenizer = AutoTokenizer.from_pretrained(parts["base"])
    batch = tokenizer(["red blue", "one two three four five"], return_tensors="pt", padding=True)
    with torch.no_grad():
        return model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def test_a_finished_run_leaves_routers_record_and_history(parts, finished):
    run = json.loads((finished / "run.json").read_text())
    assert run["arguments"]["learning_rate"] == 0.02 and run["arguments"]["granularity"] == "attn_sequence"
    assert run["world_size"] == 1 and run["steps"] == 6 and run["seed"] == 7
    assert run["data"]["rows"] == tiny_tuning.ROWS and len(run["data"]["sha256"]) == 64
    assert {"torch", "transformers"} <= set(run["versions"]) and run["git_commit"]
    assert [line["step"] for line in tiny_tuning.history(finished)] == [1, 2, 3, 4, 5, 6]
    written = {path.name for path in finished.iterdir() if not path.name.startswith("checkpoint-")}
    assert written <= set(RESULTS), "what is cleared for the next run"
    for name in ("router.safetensors", "checkpoint-6/trainable.safetensors"):
        assert (finished / name).stat().st_mode & 0o044 == 0o044, "readable like any other file"
    model = load_routers(AutoModelForCausalLM.from_pretrained(parts["base"]), finished)
    assert model.config.mod_layers == tiny_checkpoint.LAYERS


def test_an_earlier_run_is_kept_unless_told_otherwise(parts, tmp_path):
    run = tmp_path / "run"
    tiny_tuning.tune(parts, run, num_train_epochs=1)
    (run / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds an earlier run .* or start again with --overwrite_output_dir"):
        tiny_tuning.tune(parts, run)
    tiny_tuning.tune(parts, run, num_train_epochs=1, overwrite_output_dir=True, save_strategy="no")
    assert (run / "notes.txt").read_text() == "mine" and not list(run.glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"granularity": "attn_token", "router_dir": None}, "granularity was 'attn_sequence' and is 'attn_token'"),
        ({"mod_layers": "1,2", "router_dir": None}, "mod_layers was '1,2,3' and is '1,2'"),
        ({"seed": 8}, "seed was 7 and is 8"),
        ({"neftune_noise_alpha": 5}, "neftune_noise_alpha was None and is 5.0"),
        ({"router_dir": None}, "router_dir was '"),
        ({"tokenizer_name": "other tokenizer"}, "tokenizer was '"),
        ({"model_name_or_path": "other base", "router_dir": None}, "base was '"),
        ({"train_file": "other.jsonl"}, "data was '26 rows, sha256"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(parts, finished, tmp_path, change, named):
    tiny_checkpoint.write_base(tmp_path / "other base", seed=1)
    tiny_tuning.write_conversations(tmp_path / "other.jsonl", seed=5)
    AutoTokenizer.from_pretrained(parts["base"], eos_token="<pad>").save_pretrained(tmp_path / "other tokenizer")
    change = {name: tmp_path / value if "other" in str(value) else value for name, value in change.items()}
    resume = {"resume_from_checkpoint": finished / "checkpoint-3"}
    for further in ({}, {"check_inputs": True}):  # also before several are launched
        with refused(re.escape(named), UserError):
            Run(tiny_tuning.command(parts, tmp_path / "run", **resume, **further, **change))


def test_what_changes_nothing_that_is_learnt_may_change(parts, finished, tmp_path):
    moved = shutil.copytree(parts["base"], tmp_path / "moved")
    resume = {"resume_from_checkpoint": finished / "checkpoint-3", "logging_steps": 2, "save_total_limit": 1}
    command = tiny_tuning.command({**parts, "base": moved}, tmp_path / "run", **resume, dataloader_num_workers=1)
    Run(command)


def test_what_was_trained_is_saved_before_it_is_measured(parts, tmp_path, monkeypatch):
    def fails(run, tuned):
        raise ValueError("all scores are alike")

    monkeypatch.setattr("router_tuning.tuning.recipes.paper.measure", fails)
    run = tmp_path / "run"
    with refused(r"all scores are alike; .* calibrate them with python \S+calibrate.py --run \S+ ", UserError):
        tiny_tuning.tune(parts, run, max_steps=1)
    assert base_of(run) == parts["base"] and json.loads((run / "run.json").read_text())["steps"] == 1
    load_routers(AutoModelForCausalLM.from_pretrained(parts["base"]), run)


def test_a_record_is_read_from_everywhere_and_names_the_hub_id_of_the_base(parts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base, data = Path(shutil.copytree(parts["base"], "base")), Path(shutil.copy(parts["data"], "data.jsonl"))
    config = json.loads((base / "config.json").read_text()) | {"mod_base": "someone/tiny"}
    (base / "config.json").write_text(json.dumps(config))
    relative = {"base": base, "start": parts["start"], "data": data}
    at_home = f"~/{os.path.relpath(parts['base'], Path.home())}"
    tiny_tuning.tune(relative, Path("run"), max_steps=1, tokenizer_name=at_home)
    record = json.loads(Path("run/run.json").read_text())
    named = [record["base"]["path"], record["data"]["path"], record["tokenizer"]["name"]]
    named += [record["arguments"][name] for name in ("model_name_or_path", "router_dir", "train_file", "output_dir")]
    assert all(Path(path).is_absolute() for path in named), named
    assert json.loads(Path("run/router_config.json").read_text())["base"]["name_or_path"] == "someone/tiny"


def test_nothing_is_written_when_the_input_is_wrong(parts, tmp_path):
    run, bad, empty = tmp_path / "run", tmp_path / "bad.jsonl", tmp_path / "empty"
    bad.write_text(parts["data"].read_text() + "{\n")
    empty.mkdir()
    (empty / "config.json").write_text((parts["base"] / "config.json").read_text())
    wrong = [
        ({"mod_layers": None, "mod_n": 6, "router_dir": None}, "--mod_n 6"),
        ({"mod_layers": "1,9", "router_dir": None}, "mod_layers"),
        ({"train_file": bad, "max_train_samples": 0}, "bad.jsonl:27"),
        ({"train_file": tmp_path / "none.jsonl"}, "none.jsonl is missing"),
        ({"model_name_or_path": tmp_path / "nowhere"}, "no base at"),
        ({"model_name_or_path": empty}, r"prepare_base.py --folder_name \S+ --source <hub id or local folder>"),
        ({"global_batch_size": 64}, "do not fill one step"),
    ]
    for change, told in wrong:
        with refused(told, UserError):
            Run(tiny_tuning.command(parts, run, **change))
    assert not run.exists()


def test_half_of_the_layers_by_default_and_a_folder_that_names_what_is_given(parts, tmp_path):
    run = Run(tiny_tuning.command(parts, tmp_path / "run", mod_layers=None, router_dir=None))
    assert run.routing.mod_n == run.config.num_hidden_layers // 2
    path = default_folder(tiny_tuning.command(parts, "", output_dir=None, mod_n=3, mod_layers=None, lora=True))
    assert path.parts[-4:-1] == ("trained_models", "base", "data")
    assert path.name.startswith("attn_sequence__global_batch_size_8__gradient_scale_0.7__learning_rate_0.02__lora_")
    assert default_folder(parse_command([])).parts[-3:] == ("tiny-llama-mod", "alpaca", "attn_sequence")
    assert default_folder(parse_command(["--recipe", "budget"])).name == "attn_sequence__recipe_budget"


def test_what_a_user_may_not_have_meant_is_told(parts, tmp_path, caplog):
    logging.getLogger("router_tuning").propagate = True
    long = {"messages": [{"role": "user", "content": "red"}, {"role": "assistant", "content": "blue " * 600}]}
    data = tmp_path / "data.jsonl"
    data.write_text(parts["data"].read_text() + json.dumps(long) + "\n")
    with caplog.at_level(logging.WARNING, logger="router_tuning"):
        settings = {"target_capacity": 0.95, "max_steps": 1, "max_seq_length": 4096}
        tiny_tuning.tune({**parts, "data": data}, tmp_path / "run", **settings)
    told = [record.getMessage() for record in caplog.records if record.name.startswith("router_tuning")]
    assert len(told) == 3 and told[0] == "the base has 512 positions: 1 longer conversations were cut"
    assert told[1].startswith("1 steps are few") and told[2].startswith("reached capacity 0.")
    assert "target 0.95" in told[2] and "--recipe budget (RECIPE=budget)" in told[2]


def test_a_tokenizer_of_another_base_is_refused_before_the_base_is_loaded(parts, tmp_path, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(parts["base"])
    tokenizer.add_tokens(["red"])
    tokenizer.save_pretrained(tmp_path / "larger")
    monkeypatch.setattr("router_tuning.tuning.run.load_base", None)
    size = len(tokenizer) - 1
    with pytest.raises(UserError, match=f"larger: its ids reach {size} in the data, .* vocab_size {size}: "):
        tiny_tuning.tune(parts, tmp_path / "run", tokenizer_name=tmp_path / "larger")


def test_lora_trains_and_saves_adapters_with_the_routers(parts, tmp_path):
    run = tmp_path / "run"
    tuned = tiny_tuning.tune(parts, run, lora=True, lora_r=2)
    saved = load_file(run / "adapter" / "adapter_model.safetensors")
    assert sum("mod_router" in name for name in saved) == len(tiny_checkpoint.LAYERS)
    assert all(value.abs().max() > 0 for name, value in saved.items() if "lora_B" in name), "every adapter moved"
    base = AutoModelForCausalLM.from_pretrained(parts["base"], dtype=torch.float32)
    reloaded = PeftModel.from_pretrained(route(base, mod_layers=tiny_checkpoint.LAYERS), run / "adapter")
    assert torch.equal(logits(reloaded, parts), logits(tuned.trainer.model, parts))
    routers, inside = load_file(run / "router.safetensors"), {k: v for k, v in saved.items() if "mod_router" in k}
    assert {v.flatten()[0].item() for v in routers.values()} == {v.flatten()[0].item() for v in inside.values()}


def test_full_tuning_trains_and_saves_the_whole_model(parts, tmp_path):
    run = tmp_path / "run"
    tuned = tiny_tuning.tune(parts, run, router_only=False, learning_rate=1e-3)
    start = load_file(parts["base"] / "model.safetensors")
    for name, parameter in tuned.trainer.model.named_parameters():
        assert name not in start or not torch.equal(parameter, start[name]), f"{name} did not train"
    reloaded = AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32)
    assert torch.equal(logits(reloaded, parts), logits(tuned.trainer.model, parts))


def test_a_bfloat16_base_keeps_float32_routers(parts, tmp_path):
    tuned = tiny_tuning.tune(parts, tmp_path / "run", bf16=True)
    kinds = {name: p.dtype for name, p in tuned.trainer.model.named_parameters()}
    assert {kind for name, kind in kinds.items() if "mod_router" not in name} == {torch.bfloat16}
    saved = load_file(tmp_path / "run" / "router.safetensors")
    start = load_file(parts["start"] / "router.safetensors")
    for name, value in saved.items():
        assert value.dtype == torch.float32 and not torch.equal(value, start[name])
        assert not torch.equal(value, value.bfloat16().float()), "finer than bfloat16"


def test_skip_paths_are_fitted_before_training_saved_and_resumed(parts, tmp_path, monkeypatch):
    settings = {"granularity": "attn_token", "router_dir": None, "skip_rank": 4, "skip": "low_rank"}
    tuned = tiny_tuning.tune(parts, tmp_path / "whole", **settings)
    saved = load_file(tmp_path / "whole" / "router.safetensors")
    assert sum("mod_skip.down" in name for name in saved) == len(tiny_checkpoint.LAYERS)
    explained = json.loads((tmp_path / "whole" / "run.json").read_text())["skip_explained"]
    assert set(explained) == {"1.attn", "2.attn", "3.attn"} and all(0.05 < share < 1 for share in explained.values())
    base = AutoModelForCausalLM.from_pretrained(parts["base"], dtype=torch.float32)
    assert torch.equal(logits(load_routers(base, tmp_path / "whole"), parts), logits(tuned.model.eval(), parts))
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "run" / "checkpoint-3")
    monkeypatch.setattr("router_tuning.tuning.run.fit_paths", None)
    tiny_tuning.tune(parts, tmp_path / "run", resume_from_checkpoint="auto", **settings)
    again = load_file(tmp_path / "run" / "router.safetensors")
    assert set(again) == set(saved) and all(torch.equal(again[name], value) for name, value in saved.items())


def test_layers_chosen_by_a_run_are_a_plain_list_in_all_it_leaves(parts, tmp_path, monkeypatch):
    settings = {"granularity": "attn_token+mlp_token", "router_dir": None, "mod_layers": "auto", "mod_n": 2}
    tiny_tuning.tune(parts, tmp_path / "whole", **settings)
    listed = json.loads((tmp_path / "whole" / "run.json").read_text())["arguments"]["mod_layers"]
    layers = json.loads((tmp_path / "whole" / "router_config.json").read_text())["mod_layers"]
    assert listed == "+".join(f"{part}:{','.join(map(str, layers[part]))}" for part in ("attn", "mlp"))
    assert sum(map(len, layers.values())) == 4 and 0 not in layers["mlp"]
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "run" / "checkpoint-3")
    monkeypatch.setattr("router_tuning.tuning.run.choose", None)
    tiny_tuning.tune(parts, tmp_path / "run", resume_from_checkpoint="auto", **settings)
    further = {"router_dir": tmp_path / "whole", "max_steps": 1}
    tiny_tuning.tune(parts, tmp_path / "further", **{**settings, **further})
    for name in ("run", "further"):
        assert json.loads((tmp_path / name / "router_config.json").read_text())["mod_layers"] == layers

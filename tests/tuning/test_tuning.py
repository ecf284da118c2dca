"""Whole runs in one process: what they write, what they refuse, the three things that can train."""

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
from refused import refused
from safetensors.torch import load_file
from tiny_tuning import record, routers, tune
from transformers import AutoModelForCausalLM, AutoTokenizer

from router_tuning.errors import UserError
from router_tuning.model import load_routers
from router_tuning.tuning.command.command_line import parse_command
from router_tuning.tuning.run import Run
from router_tuning.tuning.run_folder import RESULTS, base_of, default_folder

FRESH = {"router_dir": None}


def base_model(parts):
    return AutoModelForCausalLM.from_pretrained(parts["base"], dtype=torch.float32)


def assert_same_model(loaded, trained):
    assert torch.equal(tiny_checkpoint.tiny_logits(loaded), tiny_checkpoint.tiny_logits(trained))


def test_a_finished_run_leaves_routers_record_and_history(parts, finished):
    run = record(finished)
    assert run["arguments"]["learning_rate"] == 0.02 and run["arguments"]["granularity"] == "attn_sequence"
    assert run["world_size"] == 1 and run["steps"] == 6 and run["seed"] == 7
    assert run["data"]["rows"] == tiny_tuning.ROWS and len(run["data"]["sha256"]) == 64
    assert {"torch", "transformers"} <= set(run["versions"]) and run["git_commit"]
    assert [line["step"] for line in tiny_tuning.history(finished)] == [1, 2, 3, 4, 5, 6]
    written = {path.name for path in finished.iterdir() if not path.name.startswith("checkpoint-")}
    assert written <= set(RESULTS), "what is cleared for the next run"
    for name in ("router.safetensors", "checkpoint-6/trainable.safetensors"):
        assert (finished / name).stat().st_mode & 0o044 == 0o044, "readable like any other file"
    assert load_routers(base_model(parts), finished).config.mod_layers == tiny_checkpoint.LAYERS


def test_an_earlier_run_is_kept_unless_told_otherwise(parts, tmp_path):
    run = tmp_path / "run"
    tune(parts, run, max_steps=1)
    (run / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds an earlier run .* or start again with --overwrite_output_dir"):
        tune(parts, run)
    tune(parts, run, max_steps=1, overwrite_output_dir=True, save_strategy="no")
    assert (run / "notes.txt").read_text() == "mine" and not list(run.glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"granularity": "attn_token", **FRESH}, "granularity was 'attn_sequence' and is 'attn_token'"),
        ({"mod_layers": "1,2", **FRESH}, "mod_layers was '1,2,3' and is '1,2'"),
        ({"seed": 8}, "seed was 7 and is 8"),
        ({"neftune_noise_alpha": 5}, "neftune_noise_alpha was None and is 5.0"),
        (FRESH, "router_dir was '"),
        ({"tokenizer_name": "other tokenizer"}, "tokenizer was '"),
        ({"model_name_or_path": "other base", **FRESH}, "base was '"),
        ({"train_file": "other.jsonl"}, "data was '26 rows, sha256"),
        (
            {"model_name_or_path": "moved", "logging_steps": 2, "save_total_limit": 1, "dataloader_num_workers": 1},
            None,
        ),
    ],
)
def test_a_checkpoint_is_refused_where_other_things_are_learnt(parts, finished, tmp_path, change, named):
    tiny_checkpoint.write_base(tmp_path / "other base", seed=1)
    shutil.copytree(parts["base"], tmp_path / "moved")
    tiny_tuning.write_conversations(tmp_path / "other.jsonl", seed=5)
    AutoTokenizer.from_pretrained(parts["base"], eos_token="<pad>").save_pretrained(tmp_path / "other tokenizer")
    made = [path.name for path in tmp_path.iterdir()]
    change = {name: tmp_path / value if value in made else value for name, value in change.items()}
    resume = {"resume_from_checkpoint": finished / "checkpoint-3"}
    for further in ({}, {"check_inputs": True}):  # also before several are launched
        command = tiny_tuning.command(parts, tmp_path / "run", **resume, **further, **change)
        if named is None:
            Run(command)
            continue
        with refused(re.escape(named), UserError):
            Run(command)


def test_what_was_trained_is_saved_before_it_is_measured(parts, tmp_path, monkeypatch):
    def fails(run, tuned):
        raise ValueError("all scores are alike")

    monkeypatch.setattr("router_tuning.tuning.recipes.paper.measure", fails)
    run = tmp_path / "run"
    with refused(r"all scores are alike; .* calibrate them with python \S+calibrate.py --run \S+ ", UserError):
        tune(parts, run, max_steps=1)
    assert base_of(run) == parts["base"] and record(run)["steps"] == 1
    load_routers(base_model(parts), run)


def test_a_record_is_read_from_everywhere_and_names_the_hub_id_of_the_base(parts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base, data = Path(shutil.copytree(parts["base"], "base")), Path(shutil.copy(parts["data"], "data.jsonl"))
    (base / "config.json").write_text(json.dumps(record(base, "config") | {"mod_base": "someone/tiny"}))
    at_home = f"~/{os.path.relpath(parts['base'], Path.home())}"
    tune({"base": base, "start": parts["start"], "data": data}, Path("run"), max_steps=1, tokenizer_name=at_home)
    run = record(Path("run"))
    named = [run["base"]["path"], run["data"]["path"], run["tokenizer"]["name"]]
    named += [run["arguments"][name] for name in ("model_name_or_path", "router_dir", "train_file", "output_dir")]
    assert all(Path(path).is_absolute() for path in named), named
    assert record(Path("run"), "router_config")["base"]["name_or_path"] == "someone/tiny"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"mod_layers": None, "mod_n": 6, **FRESH}, "--mod_n 6 must lie in 1…4: the base has 5 layers"),
        ({"mod_layers": "1,9", **FRESH}, "mod_layers"),
        ({"train_file": "bad.jsonl", "max_train_samples": 0}, "bad.jsonl:27"),
        ({"train_file": "none.jsonl"}, "none.jsonl is missing"),
        ({"model_name_or_path": "./nowhere"}, "no base at"),
        ({"model_name_or_path": "empty/nowhere"}, "no base at"),
        ({"model_name_or_path": "empty"}, r"prepare_base.py --folder_name \S+ --source <hub id or local folder>"),
        ({"global_batch_size": 64}, "26 rows do not fill one step of 64 sequences: set --global_batch_size"),
        ({"tokenizer_name": "larger"}, r"larger: its ids reach (\d+) in the data, .* vocab_size \1: "),
    ],
)
def test_nothing_is_loaded_or_written_when_the_input_is_wrong(parts, tmp_path, monkeypatch, change, told):
    monkeypatch.chdir(tmp_path)
    Path("bad.jsonl").write_text(parts["data"].read_text() + "{\n")
    Path("empty").mkdir()
    shutil.copy(parts["base"] / "config.json", "empty")
    tokenizer = AutoTokenizer.from_pretrained(parts["base"])
    tokenizer.add_tokens(["red"])
    tokenizer.save_pretrained("larger")
    with refused(told, UserError):
        Run(tiny_tuning.command(parts, tmp_path / "run", **change)).encode()
    assert not Path("run").exists()


def test_half_of_the_layers_by_default_and_a_folder_that_names_what_is_given(parts, tmp_path):
    run = Run(tiny_tuning.command(parts, tmp_path / "run", mod_layers=None, **FRESH))
    assert run.routing.mod_n == run.config.num_hidden_layers // 2
    path = default_folder(tiny_tuning.command(parts, "", output_dir=None, mod_n=3, mod_layers=None, lora=True))
    assert path.parts[-4:-1] == ("trained_models", "base", "data")
    assert path.name.startswith("attn_sequence__global_batch_size_8__gradient_scale_0.7__learning_rate_0.02__lora_")
    assert default_folder(parse_command([])).parts[-3:] == ("tiny-llama-mod", "alpaca", "attn_sequence")
    names = {(): "", ("--num_train_epochs", "1"): "num_train_epochs_1.0__", ("--num_train_epochs", "3"): ""}
    for flags, name in names.items():  # one epoch is the default of the other recipe
        path = default_folder(parse_command(["--recipe", "budget", *flags]))
        assert path.name == f"attn_sequence__{name}recipe_budget"


def test_what_a_user_may_not_have_meant_is_told(parts, tmp_path, caplog):
    logging.getLogger("router_tuning").propagate = True
    long = {"messages": [{"role": "user", "content": "red"}, {"role": "assistant", "content": "blue " * 600}]}
    data = tmp_path / "data.jsonl"
    data.write_text(parts["data"].read_text() + json.dumps(long) + "\n")
    with caplog.at_level(logging.WARNING, logger="router_tuning"):
        tune({**parts, "data": data}, tmp_path / "run", target_capacity=0.95, max_steps=1, max_seq_length=4096)
    told = [entry.getMessage() for entry in caplog.records if entry.name.startswith("router_tuning")]
    wanted = ("has 512 positions: 1 longer", "1 steps are few", r"reached capacity 0\..*target 0.95.*RECIPE=budget")
    assert len(told) == 3 and all(map(re.search, wanted, told)), told


def test_full_tuning_trains_and_saves_the_whole_model(parts, tmp_path):
    tuned = tune(parts, tmp_path, router_only=False, learning_rate=1e-3)
    start = load_file(parts["base"] / "model.safetensors")
    for name, parameter in tuned.trainer.model.named_parameters():
        assert name not in start or not torch.equal(parameter, start[name]), f"{name} did not train"
    assert_same_model(AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32), tuned.model)


def test_skip_paths_are_fitted_before_training_saved_and_resumed(parts, tmp_path, monkeypatch):
    settings = {"granularity": "attn_token", "skip_rank": 4, "skip": "low_rank", **FRESH}
    whole = tmp_path / "whole"
    tuned = tune(parts, whole, **settings)
    saved, explained = routers(whole), record(whole)["skip_explained"]
    assert sum("mod_skip.down" in name for name in saved) == len(tiny_checkpoint.LAYERS)
    assert set(explained) == {"1.attn", "2.attn", "3.attn"} and all(0.05 < share < 1 for share in explained.values())
    assert_same_model(load_routers(base_model(parts), whole), tuned.model)
    monkeypatch.setattr("router_tuning.tuning.run.fit_paths", None)
    again = routers(tiny_tuning.resume(parts, whole, 3, tmp_path / "run", **settings))
    assert set(again) == set(saved) and all(torch.equal(again[name], value) for name, value in saved.items())


def test_layers_chosen_by_a_run_are_a_plain_list_in_all_it_leaves(parts, tmp_path, monkeypatch):
    settings = {"granularity": "attn_token+mlp_token", "mod_layers": "auto", "mod_n": 2, **FRESH}
    whole = tmp_path / "whole"
    tune(parts, whole, **settings)
    layers = record(whole, "router_config")["mod_layers"]
    listed = "+".join(f"{part}:{','.join(map(str, layers[part]))}" for part in ("attn", "mlp"))
    assert record(whole)["arguments"]["mod_layers"] == listed
    assert sum(map(len, layers.values())) == 4 and 0 not in layers["mlp"]
    monkeypatch.setattr("router_tuning.tuning.run.choose", None)
    tiny_tuning.resume(parts, whole, 3, tmp_path / "run", **settings)
    tune(parts, tmp_path / "further", **{**settings, "router_dir": whole, "max_steps": 1})
    for name in ("run", "further"):
        assert record(tmp_path / name, "router_config")["mod_layers"] == layers

"""Command lines: the published one is understood, mistakes are named together, nothing is guessed or ignored."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from refused import refused

from router_tuning.errors import UserError
from router_tuning.tuning.command.command_line import parse_command
from router_tuning.tuning.tuning_model import cpu_dtype

ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = """--model_name_or_path ckpt/x --tokenizer_name ckpt/x --use_fast_tokenizer False --train_file d.jsonl
--max_seq_length 2048 --per_device_train_batch_size 1 --gradient_accumulation_steps 64 --learning_rate 1e-5
--lr_scheduler_type cosine --warmup_ratio 0.03 --weight_decay 0. --evaluation_strategy no --logging_steps 10
--save_strategy steps --save_steps 100000 --save_total_limit 1 --num_train_epochs 1 --preprocessing_num_workers 64
--output_dir out --router_only True --bf16 --tf32 True --report_to tensorboard --granularity attn_sequence
--mindskip_n 16 --gradient_scale 0.0 --trust_remote_code True --overwrite_output_dir --max_train_samples 1000
--use_flash_attn --do_train""".split()


def test_the_published_command_line_is_understood():
    command = parse_command(PUBLISHED)
    training = command.training
    assert command.model.base == "ckpt/x" and command.model.tokenizer_name == "ckpt/x"
    assert command.routing.mod_n == 16 and command.routing.gradient_scale == 0.0
    assert training.warmup_steps == 0.03 and training.eval_strategy == "no" and training.overwrite_output_dir
    assert (training.gradient_accumulation_steps, training.global_batch_size) == (64, 64)
    told = (
        "--warmup_ratio is now --warmup_steps",
        "--mindskip_n is now --mod_n",
        "--use_flash_attn (",
        "--do_train (",
    )
    assert all(note in "\n".join(command.notes) for note in told) and len(command.notes) <= 3


def test_defaults_are_the_published_recipe():
    command = parse_command([])
    training, routing, data = command.training, command.routing, command.data
    assert command.model.name == "tiny-llama-mod"
    assert data.path.as_posix().endswith("data/reformatted/alpaca/data.jsonl")
    assert parse_command(["--data_type", "mixed"]).data.path.as_posix().endswith("data/mixed/data.jsonl")
    assert (routing.granularity, routing.router_only, routing.target_capacity) == ("attn_sequence", True, 0.5)
    assert (training.learning_rate, training.weight_decay, training.num_train_epochs) == (1e-5, 0.0, 1.0)
    assert (training.lr_scheduler_type, training.warmup_steps, training.global_batch_size) == ("cosine", 0.03, 64)
    assert (data.max_train_samples, data.max_seq_length, routing.mod_n) == (1000, 2048, None)


def test_all_problems_are_named_at_once():
    wrong = """--granularity attn_sequnce --mod_n 0 --target_capacity 1.5 --max_seq_length 1 --leraning_rate 3 --mod 1
    --learning_rate fast --lora --router_only False --lr_scheduler_type circle""".split()
    with pytest.raises(UserError) as caught:
        parse_command(wrong)
    message = str(caught.value)
    assert "\n" not in message
    for part in ("attn_sequnce", "--mod_n 0", "1.5", "--max_seq_length 1", "fast", "--lora", "circle"):
        assert part in message, part
    assert "unknown argument --leraning_rate (did you mean --learning_rate?)" in message
    assert "unknown argument --mod " in message, "no abbreviations"


WRONG = """
--eval_strategy steps
--eval_on_start True
--gradient_checkpointing_kwargs {"use_reentrant":true}
--deepspeed {"zero_optimization":{"stage":2}}
--deepspeed {"optimizer":{"type":"AdamW","params":{"lr":1.0}},"scheduler":{}}
--recipe magic
--threshold 2
--router_pooling mean
--kv_policy some
--gradient_scale -1
--mod_layers 1;2
--folder_name a --model_name_or_path b
--train_file data.csv
--max_train_samples -5
--push_to_hub
stray
--num_processes 4
--dtype float8
--chat_template chatml
--learning_rate nan
--per_device_train_batch_size 0
--save_strategy best
--report_to comet_ml
--optim adamw_bnb_8bit
--optim_args foo
--seed 5000000000
--lr_scheduler_type warmup_stable_decay
--lr_scheduler_kwargs {bad
--accelerator_config nowhere.json
--dataloader_num_workers -1
"""  # the last eight would be found by Trainer, optimizer, schedule, a package or numpy once the base is loaded


@pytest.mark.parametrize("line", WRONG.strip().splitlines())
def test_each_bad_value_is_refused_with_its_flag(line):
    wrong = line.split()
    with refused(wrong[0].lstrip("-"), UserError) as caught:
        parse_command(wrong)
    assert wrong[-1].lstrip("-") in str(caught.value) or wrong[-1].endswith("}")


def test_the_global_batch_fixes_the_accumulation(monkeypatch):
    assert parse_command(["--per_device_train_batch_size", "8"]).training.gradient_accumulation_steps == 8
    plan = ["--dry_run", "True", "--num_processes", "4"]
    assert parse_command(plan).training.gradient_accumulation_steps == 4
    with pytest.raises(UserError, match="no multiple of 3 processes x --per_device_train_batch_size 4"):
        parse_command(["--dry_run", "--num_processes", "3"])


def test_old_names_with_equals_and_hyphens_and_the_chat_template_that_was_a_boolean():
    command = parse_command(["--warmup-ratio=0.1", "--use_flash_attn=True", "--num_epochs", "2", "--chat_template"])
    assert (command.training.warmup_steps, command.training.num_train_epochs) == (0.1, 2)
    assert len(command.notes) == 2 and command.data.chat_template == "own"
    assert parse_command(["--chat_template=false"]).data.chat_template == "published"


@pytest.mark.parametrize(
    ("given", "dtype", "autocast"),
    [
        ("--bf16 True", "bfloat16", False),
        ("--bf16 True --router_only False", "float32", True),
        ("--dtype float32", "float32", False),
    ],
)
def test_a_frozen_base_needs_no_autocast_and_a_trained_one_does(given, dtype, autocast):
    command = parse_command(given.split())
    assert (command.model.dtype, command.training.bf16) == (dtype, autocast)


@pytest.mark.parametrize(
    ("native", "size", "dtype"), [(True, 6e7, "bfloat16"), (True, 4e7, "float32"), (False, 6e7, "float32")]
)
def test_a_frozen_base_is_in_bfloat16_where_that_is_faster(monkeypatch, native, size, dtype):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert parse_command([]).model.dtype == "auto", "until the base is known"
    assert cpu_dtype(int(size)) == dtype


def test_secrets_are_not_recorded():
    assert "hf_secret" not in str(parse_command(["--token", "hf_secret"]).values())


PLACES = ("model_name_or_path", "train_file")  # recorded as they read from everywhere
RUNS = sorted((ROOT / "configs/runs").glob("*.yaml"))


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_a_run_of_the_repository_says_what_it_is_and_is_understood(path):
    lines = path.read_text().splitlines()
    told = [line.split(":")[0] for line in lines if line.startswith("# ") and not line.startswith("#  ")]
    assert told == ["# Purpose", "# Cost", "# Launch"]
    assert f"# Launch: RUN=configs/runs/{path.name} bash scripts/finetune_mod.sh" in lines
    command = parse_command(["--config", str(path)])
    asked = {name: value for name, value in yaml.safe_load(path.read_text()).items() if name not in ("bf16", *PLACES)}
    assert {name: command.values()[name] for name in asked} == asked


def test_what_is_given_behind_a_file_counts_more(tmp_path):
    path = tmp_path / "run.yaml"
    settings = {"folder_name": "a", "recipe": "budget", "seed": 3, "label_names": ["x", "y"], "num_epochs": 2}
    path.write_text(yaml.safe_dump(settings | {"train_file": "d.jsonl"}))
    plain = parse_command(["--config", str(path)])
    assert (plain.model.folder_name, plain.training.seed, plain.training.label_names) == ("a", 3, ["x", "y"])
    assert plain.training.learning_rate == 6e-3 and plain.training.num_train_epochs == 2, "default, and an old name"
    given = f"--model_name_or_path org/b --seed 4 --data_type c --config={path} --recipe paper"
    command = parse_command(given.split())
    assert (command.model.folder_name, command.model.base, command.training.seed) == (None, "org/b", 4)
    assert (command.data.name, command.routing.recipe, command.training.learning_rate) == ("c", "paper", 1e-5)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "cannot be read"),
        ("a: [", "cannot be read"),
        ("just words", "must hold lines"),
        ("sede: 3", "unknown argument sede"),
        ("mod_n: half", "--mod_n: "),
    ],
)
def test_a_file_that_is_no_run_is_refused(tmp_path, text, told):
    path = tmp_path / "run.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=told):
        parse_command(["--config", str(path)])

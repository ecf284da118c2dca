"""Command lines: the published one is understood, mistakes are named together, nothing is guessed or ignored."""

import json
import re

import pytest
import torch
import yaml
from refused import refused

from router_tuning.errors import UserError
from router_tuning.places import ROOT
from router_tuning.tuning.command.arguments import PARTS
from router_tuning.tuning.command.command_line import parse_command, settings_file
from router_tuning.tuning.command.parser import VARIABLES
from router_tuning.tuning.trainer.checkpoints import NEUTRAL
from router_tuning.tuning.tuning_model import cpu_dtype

RUNS = sorted((ROOT / "configs/runs").glob("*.yaml"))
PUBLISHED = """--model_name_or_path ckpt/x --tokenizer_name ckpt/x --use_fast_tokenizer False --train_file d.jsonl
--max_seq_length 2048 --per_device_train_batch_size 1 --gradient_accumulation_steps 64 --learning_rate 1e-5
--lr_scheduler_type cosine --warmup_ratio 0.03 --weight_decay 0. --evaluation_strategy no --logging_steps 10
--save_strategy steps --save_steps 100000 --save_total_limit 1 --num_train_epochs 1 --preprocessing_num_workers 64
--output_dir out --router_only True --bf16 --tf32 True --report_to tensorboard --granularity attn_sequence
--mindskip_n 16 --gradient_scale 0.0 --trust_remote_code True --overwrite_output_dir --max_train_samples 1000
--use_flash_attn --do_train"""


def parsed(line: str):
    """The command, and its values by name."""
    command = parse_command(line.split())
    values = command.values() | {"base": command.model.base, "name": command.model.name, "data": command.data.path}
    return command, values | {"accumulated": command.training.gradient_accumulation_steps}


PAPER = {"granularity": "attn_sequence", "router_only": True, "target_capacity": 0.5, "mod_n": None, "skip": "zero"}
PAPER |= {"learning_rate": 1e-5, "weight_decay": 0.0, "num_train_epochs": 1.0, "lr_scheduler_type": "cosine"}
PAPER |= {"warmup_steps": 0.03, "max_train_samples": 1000, "max_seq_length": 2048, "global_batch_size": 64}
PAPER |= {"router_pooling": "sequence", "name": "tiny-llama-mod", "data": ROOT / "data/reformatted/alpaca/data.jsonl"}
BUDGET = {"learning_rate": 6e-3, "router_pooling": "prompt", "skip": "low_rank"}
GIVEN = {"base": "ckpt/x", "tokenizer_name": "ckpt/x", "mod_n": 16, "gradient_scale": 0.0, "warmup_steps": 0.03}
GIVEN |= {"eval_strategy": "no", "overwrite_output_dir": True, "accumulated": 64, "global_batch_size": 64}
OLD = {"warmup_steps": 0.1, "num_train_epochs": 2, "chat_template": "own"}


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        (PUBLISHED, GIVEN),
        ("", PAPER | {"dtype": "auto"}),  # until the base is known
        ("--recipe budget", BUDGET),
        ("--recipe=budget --learning_rate 0.5 --skip mean", BUDGET | {"learning_rate": 0.5, "skip": "mean"}),
        ("--recipe budget --granularity expert_token", {"skip": "zero"}),
        ("--per_device_train_batch_size 8", {"accumulated": 8}),  # the global batch fixes it
        ("--dry_run True --num_processes 2", {"accumulated": 8}),
        ("--warmup-ratio=0.1 --use_flash_attn=True --num_epochs 2 --chat_template", OLD),
        ("--chat_template=false", {"chat_template": "published"}),  # it was a boolean
        ("--bf16 True", {"dtype": "bfloat16", "bf16": False}),  # a frozen base needs no autocast
        ("--bf16 True --router_only False", {"dtype": "float32", "bf16": True}),
        ("--dtype float32", {"dtype": "float32", "bf16": False}),
    ],
)
def test_what_a_command_line_means(line, wanted):
    values = parsed(line)[1]
    assert {name: values[name] for name in wanted} == wanted


def test_what_is_called_otherwise_now_or_has_no_effect_is_noted():
    notes = parsed(PUBLISHED)[0].notes
    told = (
        "--warmup_ratio is now --warmup_steps",
        "--mindskip_n is now --mod_n",
        "--use_flash_attn (",
        "--do_train (",
    )
    assert all(note in "\n".join(notes) for note in told) and len(notes) <= 3


def test_lowest_budgets_lie_below_the_target_or_at_a_share_of_the_decoder():
    budget = parsed("--recipe budget")[0].budget
    assert [round(budget.lowest(target, 0.8), 3) for target in (0.2, 0.5, 0.8)] == [0.15, 0.45, 0.65]


def test_all_problems_are_named_at_once():
    wrong = """--granularity attn_sequnce --mod_n 0 --target_capacity 1.5 --max_seq_length 1 --leraning_rate 3 --mod 1
    --learning_rate fast --lora --router_only False --lr_scheduler_type circle"""
    with refused("attn_sequnce", UserError) as caught:
        parsed(wrong)
    parts = ("--mod_n 0", "1.5", "--max_seq_length 1", "fast", "--lora", "circle", "unknown argument --mod ")
    parts += ("unknown argument --leraning_rate (did you mean --learning_rate?)",)
    assert [part for part in parts if part not in str(caught.value)] == []


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
--per_device_train_batch_size 4 --dry_run True --num_processes 3
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
--data_seed 3
--train_sampling_strategy sequential
"""  # eight of the last ten would be found by Trainer, optimizer, schedule, a package or numpy once the base is loaded


@pytest.mark.parametrize("line", WRONG.strip().splitlines())
def test_each_bad_value_is_refused_with_its_flag(line):
    wrong = line.split()
    with refused(wrong[0].lstrip("-"), UserError) as caught:
        parse_command(wrong)
    assert wrong[-1].lstrip("-") in str(caught.value) or wrong[-1].endswith("}")


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("--label_tokens 9", "--label_tokens is a setting of --recipe budget"),
        ("--recipe budget --gradient_scale 1", "--gradient_scale is a setting of --recipe paper"),
        ("--recipe budget --threshold 0.4", "--threshold is"),
        ("--recipe budget --label_smoothing_factor 0.1", "--label_smoothing_factor is"),
        ("--recipe budget --gradient_checkpointing True", "--activation_checkpointing is"),
        ("--lora_r 16", "--lora_r is a setting of --lora True"),
        ("--skip mean --skip_rank 16", "--skip_rank is a setting of --skip low_rank"),
    ],
)
def test_what_nothing_would_read_is_refused(line, told):
    with refused(f"^{told}", UserError):
        parsed(line)


@pytest.mark.parametrize(
    ("native", "size", "dtype"), [(True, 6e7, "bfloat16"), (True, 4e7, "float32"), (False, 6e7, "float32")]
)
def test_a_frozen_base_is_in_bfloat16_where_that_is_faster(monkeypatch, native, size, dtype):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert cpu_dtype(int(size)) == dtype


def test_secrets_are_not_recorded():
    assert "hf_secret" not in str(parsed("--token hf_secret")[1])


@pytest.mark.parametrize("flag", ["--help", "--help_all"])
def test_help_names_our_options_with_their_variables_and_help_all_those_of_the_trainer_too(capsys, flag):
    with pytest.raises(SystemExit, match="0"):
        parse_command(["--mod_n", "3", flag])
    text = capsys.readouterr().out
    names = set(re.findall(r"^  --(\w+)", text, re.MULTILINE))
    assert {name for part in PARTS for name in part.__annotations__} | set(VARIABLES) <= names
    assert ("adam_beta1" in names) == (flag == "--help_all") and all(told in text for told in VARIABLES.values())


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_a_run_of_the_repository_says_what_it_is_and_is_understood(path):
    lines = path.read_text().splitlines()
    told = [line.split(":")[0] for line in lines if line.startswith("# ") and not line.startswith("#  ")]
    assert told == ["# Purpose", "# Cost", "# Launch"]
    assert f"# Launch: RUN=configs/runs/{path.name} bash scripts/finetune_mod.sh" in lines
    aside = {"bf16", "model_name_or_path", "train_file"}  # the last two are recorded as they read from everywhere
    asked = {name: value for name, value in yaml.safe_load(path.read_text()).items() if name not in aside}
    assert {name: parsed(f"--config {path}")[1][name] for name in asked} == asked


def test_what_is_given_behind_a_file_counts_more(tmp_path):
    path = tmp_path / "run.yaml"
    settings = {"folder_name": "a", "recipe": "budget", "seed": 3, "label_names": ["x", "y"], "num_epochs": 2}
    path.write_text(yaml.safe_dump(settings | {"train_file": "d.jsonl"}))
    _, plain = parsed(f"--config {path}")
    assert (plain["folder_name"], plain["seed"], plain["label_names"]) == ("a", 3, ["x", "y"])
    assert plain["learning_rate"] == 6e-3 and plain["num_train_epochs"] == 2, "default, and an old name"
    command, given = parsed(f"--model_name_or_path org/b --seed 4 --data_type c --config={path} --recipe paper")
    assert (given["folder_name"], command.model.base, command.data.name) == (None, "org/b", "c")
    assert (given["seed"], given["recipe"], given["learning_rate"]) == (4, "paper", 1e-5)


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
        parsed(f"--config {path}")


@pytest.mark.parametrize(
    "given",
    [
        "--recipe budget --data_type mixed --chat_template published --mod_n 3 --output_dir somewhere",
        "--model_name_or_path org/base --train_file rows.jsonl --lora True --seed 3 --bf16 True --logging_steps 5",
        "--recipe budget --num_train_epochs 1 --skip zero --train_skip False --router_pooling sequence",
        '--lr_scheduler_kwargs {"num_cycles":0.4} --gradient_accumulation_steps 2 --label_names a b',
    ],
)
def test_the_settings_of_a_record_repeat_the_run(tmp_path, given):
    """What a model card prints goes through a file and the parser to the same settings."""
    command, _ = parsed(given)
    (tmp_path / "run.yaml").write_text(settings_file(json.loads(json.dumps(command.values()))))
    again, _ = parsed(f"--config {tmp_path / 'run.yaml'}")
    wanted, found = ({k: v for k, v in each.given().items() if k not in NEUTRAL} for each in (command, again))
    assert found == wanted

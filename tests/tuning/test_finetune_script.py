"""``scripts/finetune_mod.sh`` as a user starts it: two processes, SIGTERM, the rest in one; mistakes in one line."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
import tiny_tuning
import torch
from safetensors.torch import load_file

from router_tuning.tuning.command.arguments import PARTS
from router_tuning.tuning.command.command_line import parse_command, settings_file
from router_tuning.tuning.command.parser import VARIABLES
from router_tuning.tuning.trainer.checkpoints import NEUTRAL

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts/finetune_mod.sh"
STEPS = 20
launched = pytest.mark.full
"""Looks at what three processes leave, of which each starts Python anew."""


def start(log: Path, *arguments: object, **variables: object) -> subprocess.Popen:
    """The script in a session of its own, as a scheduler would start it."""
    hidden = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment |= {name: str(value) for name, value in variables.items()}
    with open(log, "a") as stream:
        return subprocess.Popen(
            ["bash", str(SCRIPT), *map(str, arguments)],
            env=environment,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd=log.parent,
        )


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def run(parts, tmp_path_factory) -> Path:
    """Folder of a run of 20 steps: two processes until SIGTERM, then one process to the end."""
    folder = tmp_path_factory.mktemp("script")
    knobs = {"PORT": free_port(), "OUTPUT_DIR": folder / "run", "RESUME": "auto", "MODEL_NAME_OR_PATH": parts["base"]}
    knobs |= {"GLOBAL_BATCH_SIZE": 8, "MICRO_BATCH_SIZE": 2, "SEED": 7}
    knobs |= {"LEARNING_RATE": 0.02, "TARGET_CAPACITY": 0.4, "GRADIENT_SCALE": 0.7}
    further = ["--train_file", parts["data"], "--router_dir", parts["start"], "--mod_layers", "1,2,3"]
    further += ["--max_steps", STEPS, "--save_steps", 1]
    first = start(folder / "first.log", *further, NUM_PROCESSES=2, **knobs)
    while first.poll() is None and not (folder / "run/checkpoint-4").exists():
        time.sleep(0.02)
    first.send_signal(signal.SIGTERM)
    codes = [first.wait(timeout=120)]
    left = sorted(path.name for path in (folder / "run").iterdir())
    codes.append(start(folder / "second.log", *further, NUM_PROCESSES=1, **knobs).wait(timeout=300))
    (folder / "seen.json").write_text(json.dumps({"codes": codes, "left": left}))
    return folder


def log_of(run: Path, name: str) -> str:
    return (run / f"{name}.log").read_text()


@launched
def test_a_scheduler_sees_that_it_was_stopped_and_then_that_it_finished(run):
    seen, first, second = json.loads((run / "seen.json").read_text()), log_of(run, "first"), log_of(run, "second")
    assert seen["codes"] == [128 + signal.SIGTERM, 0], first + second
    assert set(seen["left"]) >= {"checkpoint-4"} and "run.json" not in seen["left"], "no result before the end"
    step = int(re.search(r"interrupted after step (\d+); continue with RESUME=auto", first)[1])
    assert 4 <= step < STEPS and f"continuing from checkpoint-{step}\n" in second
    kept = {path.name for path in (run / "run").glob("checkpoint-*")}
    assert kept == {f"checkpoint-{STEPS}", f"checkpoint-{STEPS - 1}"}, "the newest two by default"


@launched
def test_two_processes_ran_and_learnt_what_one_does(run, parts, tmp_path):
    first = log_of(run, "first")
    assert "configs/accelerate/cpu_ddp.yaml, 2 process(es) on 1 machine(s)" in first
    assert "2 process(es) x 2 sequences x 2 accumulated" in first, "as the processes themselves count"
    tiny_tuning.tune(parts, tmp_path / "one", max_steps=STEPS)
    saved, expected = (load_file(folder / "router.safetensors") for folder in (run / "run", tmp_path / "one"))
    assert set(saved) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(saved[name], value, rtol=0, atol=1e-5)


@launched
def test_the_log_of_twenty_steps_fits_on_two_screens(run):
    # What the launcher says of the signal is no part of a normal run.
    first = re.split(r"^.*Received 15 death signal", log_of(run, "first"), maxsplit=1, flags=re.MULTILINE)[0]
    text = first + log_of(run, "second")
    lines = text.splitlines()
    assert len(lines) <= STEPS + 2 * 9, text
    assert STEPS - 1 <= sum(line.startswith("step ") for line in lines) <= STEPS, "a line per step, none twice"
    for unwanted in ("Warning", "warnings.warn", "Traceback", "\r"):
        assert unwanted not in text, text


@pytest.mark.parametrize(
    "given",
    [
        [],
        ["--recipe", "budget", "--data_type", "mixed", "--chat_template", "published", "--mod_n", "3"],
        ["--model_name_or_path", "org/base", "--train_file", "my rows.jsonl", "--lora", "True", "--seed", "3"],
        [
            "--lr_scheduler_kwargs",
            '{"num_cycles": 0.4}',
            "--gradient_accumulation_steps",
            "2",
            *"--label_names a b".split(),
        ],
        ["--bf16", "True", "--router_only", "False", "--logging_steps", "5", "--output_dir", "somewhere"],
    ],
)
def test_the_settings_of_a_record_repeat_the_run(tmp_path, given):
    """What a model card prints goes through a file and the parser to the same settings."""
    command = parse_command(given)
    (tmp_path / "run.yaml").write_text(settings_file(json.loads(json.dumps(command.values()))))
    again = parse_command(["--config", str(tmp_path / "run.yaml")])
    wanted = {name: value for name, value in command.given().items() if name not in NEUTRAL}
    assert {name: value for name, value in again.given().items() if name not in NEUTRAL} == wanted


def test_the_variables_of_the_script_are_told():
    told = (ROOT / "docs/tuning.md").read_text()
    assert all(f"`{variable}`" in told for variable in VARIABLES.values())
    port = re.search(r"^PORT=.*:-(\d+)", SCRIPT.read_text(), re.MULTILINE)[1]
    assert f"`{port}`" in told


def test_help_names_our_options_by_group_and_help_all_those_of_the_trainer(capsys):
    told = {}
    for flag in ("--help", "--help_all"):
        with pytest.raises(SystemExit) as stopped:
            parse_command(["--mod_n", "3", flag])
        assert stopped.value.code == 0
        told[flag] = capsys.readouterr().out
    own = {name for part in PARTS for name in part.__annotations__} | set(VARIABLES)
    names = {flag: set(re.findall(r"^  --(\w+)", text, re.MULTILINE)) for flag, text in told.items()}
    assert own <= names["--help"] <= names["--help_all"] and "adam_beta1" in names["--help_all"] - names["--help"]
    assert all(f"\n{group}:\n" in told["--help"] for group in ("Base", "Routing", "Recipe budget", "Data", "Training"))
    assert all(variable in told["--help"] for variable in VARIABLES.values())


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"NUM_PROCESSES": 0}, "NUM_PROCESSES=0 must be at least 1"),
        ({"NUM_PROCESSES": "two"}, "NUM_PROCESSES=two must be a whole number"),
        ({"PORT": "http"}, "PORT=http must be a whole number"),
        ({"CONFIG_FILE": "nowhere.yaml"}, "CONFIG_FILE=nowhere.yaml does not exist"),
        ({"PYTHON": "/bin/false"}, "pip install -r requirements.txt"),
        ({"NUM_PROCESSES": 2, "GRANULARITY": "attn", "DATA_TYPE": "none"}, "granularity"),
    ],
)
def test_mistakes_are_told_in_one_line_before_anything_starts(tmp_path, variables, told):
    script = start(tmp_path / "log", OUTPUT_DIR=tmp_path / "run", **variables)
    code, text = script.wait(timeout=120), (tmp_path / "log").read_text()
    assert code == 2, text
    assert told in text and text.startswith("error: ") and len(text.splitlines()) == 1, text
    assert not (tmp_path / "run").exists()

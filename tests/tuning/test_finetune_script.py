"""``scripts/finetune_mod.sh`` as a user starts it: two processes, SIGTERM, the rest in one; mistakes in one line."""

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

from router_tuning.places import ROOT

SCRIPT = ROOT / "scripts/finetune_mod.sh"
STEPS = 20


def start(log: Path, *arguments: object, **variables: object) -> subprocess.Popen:
    """The script in a session of its own, as a scheduler would start it."""
    hidden = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment |= {name: str(value) for name, value in variables.items()}
    given = {"env": environment, "cwd": log.parent, "start_new_session": True, "stderr": subprocess.STDOUT}
    with open(log, "a") as stream:
        return subprocess.Popen(["bash", str(SCRIPT), *map(str, arguments)], stdout=stream, **given)


@pytest.mark.full
def test_two_processes_until_sigterm_then_one_to_the_end(parts, tmp_path):
    """A scheduler sees that it was stopped and then that it finished; both have learnt what one process does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run, logs = tmp_path / "run", [tmp_path / "first.log", tmp_path / "second.log"]
    knobs = {"PORT": port, "OUTPUT_DIR": run, "RESUME": "auto", "MODEL_NAME_OR_PATH": parts["base"], "SEED": 7}
    knobs |= {"GLOBAL_BATCH_SIZE": 8, "MICRO_BATCH_SIZE": 2}
    knobs |= {"LEARNING_RATE": 0.02, "TARGET_CAPACITY": 0.4, "GRADIENT_SCALE": 0.7}
    further = ["--train_file", parts["data"], "--router_dir", parts["start"], "--mod_layers", "1,2,3"]
    further += ["--max_steps", STEPS, "--save_steps", 1]
    script = start(logs[0], *further, NUM_PROCESSES=2, **knobs)
    while script.poll() is None and not (run / "checkpoint-4").exists():
        time.sleep(0.02)
    script.send_signal(signal.SIGTERM)
    assert script.wait(timeout=120) == 128 + signal.SIGTERM, logs[0].read_text()
    assert (run / "checkpoint-4").exists() and not (run / "run.json").exists(), "no result before the end"
    assert start(logs[1], *further, NUM_PROCESSES=1, **knobs).wait(timeout=300) == 0, logs[1].read_text()
    first, second = (log.read_text() for log in logs)
    step = int(re.search(r"interrupted after step (\d+); continue with RESUME=auto", first)[1])
    assert 4 <= step < STEPS and f"continuing from checkpoint-{step}\n" in second
    kept = {path.name for path in run.glob("checkpoint-*")}
    assert kept == {f"checkpoint-{STEPS}", f"checkpoint-{STEPS - 1}"}, "the newest two by default"
    assert "configs/accelerate/cpu_ddp.yaml, 2 process(es) on 1 machine(s)" in first and "launch[@]" not in first
    assert "2 process(es) x 2 sequences x 2 accumulated" in first, "as the processes themselves count"
    told = first.partition("Received 15 death signal")[0] + second  # what the launcher adds is no part of a normal run
    assert STEPS - 1 <= len(re.findall("^step ", told, re.MULTILINE)) <= STEPS, "a line per step, none twice"
    assert len(told.splitlines()) <= STEPS + 20 and not re.search(r"Warning|Traceback|\r", told), told
    tiny_tuning.tune(parts, tmp_path / "one", max_steps=STEPS)
    saved, expected = tiny_tuning.routers(run), tiny_tuning.routers(tmp_path / "one")
    torch.testing.assert_close(saved, expected, rtol=0, atol=1e-5)


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
    assert code == 2 and text.startswith("error: ") and told in text and len(text.splitlines()) == 1, text
    assert not (tmp_path / "run").exists()

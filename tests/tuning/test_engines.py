"""Two processes under every engine: the same routers as one process, exact resumption, float32 routers, LoRA.

All runs happen in one launch of two processes (``tests/support/engine_worker.py``); each test looks at what they left.
By default those of DDP and FSDP2, under ``-m full`` those of DeepSpeed.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_checkpoint
import tiny_tuning
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny_tuning import record, routers
from transformers import AutoModelForCausalLM

from router_tuning.model import route
from router_tuning.places import ROOT

CONFIGS = {
    "DDP": "configs/accelerate/cpu_ddp.yaml",
    "FSDP2": "configs/accelerate/fsdp2.yaml",
    "DeepSpeed ZeRO-1": "configs/accelerate/deepspeed_zero1.yaml",
    "DeepSpeed ZeRO-2": "configs/accelerate/deepspeed_zero2.yaml",
    "DeepSpeed ZeRO-3": "configs/accelerate/deepspeed_zero3.yaml",
}
ALL, SHARDING = tuple(CONFIGS), ("FSDP2", "DeepSpeed ZeRO-2", "DeepSpeed ZeRO-3")
LORA = {"lora": True, "lora_r": 2, "lora_dropout": 0.2, "num_train_epochs": 1, "router_dir": None}
LORA["lora_target_modules"] = "q_proj,down_proj"  # ZeRO-3 pays for each module
BUDGET = {"recipe": "budget", "router_dir": None, "num_train_epochs": 1, "gradient_scale": None}
KINDS = {
    "plain": {},
    "lora": LORA,
    "half": {"bf16": True, "num_train_epochs": 1},
    "budget-attn_token": {**BUDGET, "granularity": "attn_token"},
    "budget-attn_sequence": {**BUDGET, "granularity": "attn_sequence"},
}
RESUMED_AFTER = {"plain": 3, "lora": 1}
BY_DEFAULT = {"DDP": ("plain", "plain-resumed", "budget-attn_token"), "FSDP2": ("plain", "lora", "lora-resumed")}


def folder_of(engine: str, kind: str) -> str:
    return f"{engine.replace(' ', '-')}-{kind}"


def of(**kinds: tuple[str, ...]) -> pytest.MarkDecorator:
    """Parameters of a test that looks at the runs of some kinds, each under some engines."""
    cells = [(engine, kind.replace("__", "-")) for kind, engines in kinds.items() for engine in engines]
    marks = [() if kind in BY_DEFAULT.get(engine, ()) else pytest.mark.full for engine, kind in cells]
    found = [pytest.param(*cell, marks=mark) for cell, mark in zip(cells, marks, strict=True)]
    return pytest.mark.parametrize(("engine", "kind"), found)


@pytest.fixture(scope="module")
def runs(parts, tmp_path_factory, request) -> Path:
    """Folder with the runs that the selected tests look at."""
    folder = tmp_path_factory.mktemp("engines")
    asked = [item.callspec.params for item in request.session.items if item.path == request.path and "[" in item.name]
    asked = {
        (cell["engine"], kind) for cell in asked for kind in (cell["kind"].removesuffix("-resumed"), cell["kind"])
    }
    plan = []
    for engine, kind in sorted(asked):  # what is resumed comes behind the whole run
        place, whole = folder / folder_of(engine, kind), kind.removesuffix("-resumed")
        item = {"config": CONFIGS[engine], "arguments": tiny_tuning.arguments(parts, place, **KINDS[whole])}
        if kind != whole:
            step = f"checkpoint-{RESUMED_AFTER[whole]}"
            item["copy"] = [[str(folder / folder_of(engine, whole) / step), str(place / step)]]
            item["arguments"] += ["--resume_from_checkpoint", "auto"]
        plan.append(item)
    (folder / "plan.json").write_text(json.dumps(plan))
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    launch += [str(ROOT / "tests/support/engine_worker.py"), str(folder / "plan.json")]
    done = subprocess.run(launch, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return folder


def assert_close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@of(plain=ALL)
def test_two_processes_learn_and_log_what_one_does(runs, finished, engine, kind):
    run = runs / folder_of(engine, kind)
    found = record(run)
    assert (found["world_size"], found["engine"]) == (2, engine)
    assert_close(routers(run), routers(finished))
    assert {value.dtype for value in routers(run).values()} == {torch.float32}
    names = ["task_loss", "penalty", "capacity", "loss", "learning_rate", "padding"]
    for ours, theirs in zip(tiny_tuning.history(run), tiny_tuning.history(finished), strict=True):
        assert {name: ours[name] for name in names} == pytest.approx({name: theirs[name] for name in names}, abs=2e-5)
    checkpoint = run / "checkpoint-6"
    assert set(load_file(checkpoint / "trainable.safetensors")) == set(routers(finished))
    base = (Path(found["base"]["path"]) / "model.safetensors").stat().st_size
    assert sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file()) < base


@of(plain__resumed=ALL, lora__resumed=SHARDING)
def test_resuming_ends_with_the_same_bits(runs, engine, kind):
    whole, resumed = (runs / folder_of(engine, name) for name in (kind.removesuffix("-resumed"), kind))
    for name in ("router.safetensors", *["adapter/adapter_model.safetensors"] * ("lora" in kind)):
        assert (whole / name).read_bytes() == (resumed / name).read_bytes()


@of(half=SHARDING)
def test_a_bfloat16_base_keeps_float32_routers(runs, engine, kind):
    for value in routers(runs / folder_of(engine, kind)).values():
        assert value.dtype == torch.float32 and not torch.equal(value, value.bfloat16().float()), "finer than bfloat16"


@of(lora=("DDP", *SHARDING))
def test_lora_and_routers_equal_one_process_and_reload(runs, parts, tmp_path, engine, kind):
    run, name = runs / folder_of(engine, kind), "adapter/adapter_model.safetensors"
    tiny_tuning.tune(parts, tmp_path, **LORA)
    assert_close(load_file(run / name), load_file(tmp_path / name))
    base = AutoModelForCausalLM.from_pretrained(parts["base"], dtype=torch.float32)
    state = PeftModel.from_pretrained(route(base, mod_layers=tiny_checkpoint.LAYERS), run / "adapter").state_dict()
    trained = load_file(run / "checkpoint-3" / "trainable.safetensors")
    assert len(trained) > 3 and all(torch.equal(state[key], value) for key, value in trained.items())


@of(budget__attn_token=("DDP", "FSDP2", "DeepSpeed ZeRO-2"), budget__attn_sequence=("DDP",))
def test_two_processes_reach_a_budget_as_one_does(runs, parts, tmp_path, engine, kind):
    run = runs / folder_of(engine, kind)
    tiny_tuning.tune(parts, tmp_path, **KINDS[kind])
    assert_close(routers(run), routers(tmp_path))
    assert record(run)["world_size"] == 2
    assert record(run)["reached_capacity"] == pytest.approx(record(tmp_path)["reached_capacity"], abs=1e-3)

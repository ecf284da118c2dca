"""Two processes under every engine: the same routers as one process, exact resumption, float32 routers, LoRA.

All runs happen in one launch of two processes (``tests/support/engine_worker.py``); each test looks at what they left.
By default those of DDP and FSDP2, under ``-m full`` those of DeepSpeed.
"""

from __future__ import annotations

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
from transformers import AutoModelForCausalLM

from router_tuning.model import route

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = {
    "DDP": "configs/accelerate/cpu_ddp.yaml",
    "FSDP2": "configs/accelerate/fsdp2.yaml",
    "DeepSpeed ZeRO-1": "configs/accelerate/deepspeed_zero1.yaml",
    "DeepSpeed ZeRO-2": "configs/accelerate/deepspeed_zero2.yaml",
    "DeepSpeed ZeRO-3": "configs/accelerate/deepspeed_zero3.yaml",
}
ENGINES = [pytest.param(name, marks=pytest.mark.full) if "DeepSpeed" in name else name for name in CONFIGS]
SHARDING = [ENGINES[list(CONFIGS).index(name)] for name in ("FSDP2", "DeepSpeed ZeRO-2", "DeepSpeed ZeRO-3")]
LORA = {"lora": True, "lora_r": 2, "lora_dropout": 0.2, "num_train_epochs": 1, "router_dir": None}
LORA["lora_target_modules"] = "q_proj,down_proj"  # ZeRO-3 pays for each module
HALF = {"bf16": True, "num_train_epochs": 1}
BUDGET = {"recipe": "budget", "router_dir": None, "num_train_epochs": 1}
BUDGETS = [
    ("DDP", "attn_sequence"),
    ("DDP", "attn_token"),
    ("FSDP2", "attn_token"),
    pytest.param("DeepSpeed ZeRO-2", "attn_token", marks=pytest.mark.full),
]
# Sections with which a DeepSpeed config would silently replace the command line's optimizer and schedule.
OWN_SCHEDULE = {
    "optimizer": {"type": "AdamW", "params": {"lr": 1.0, "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": 0, "warmup_max_lr": 1.0, "warmup_num_steps": 100}},
}


def folder_of(engine: str, kind: str) -> str:
    return f"{engine.replace(' ', '-')}-{kind}"


def own_schedule(folder: Path) -> str:
    """An accelerate config whose DeepSpeed JSON brings optimizer and schedule."""
    settings = json.loads((ROOT / "configs/deepspeed/zero2.json").read_text()) | OWN_SCHEDULE
    (folder / "own_schedule.json").write_text(json.dumps(settings))
    text = (ROOT / CONFIGS["DeepSpeed ZeRO-2"]).read_text()
    place = folder / "own_schedule.yaml"
    place.write_text(text.replace("configs/deepspeed/zero2.json", str(folder / "own_schedule.json")))
    return str(place)


@pytest.fixture(scope="module")
def runs(parts, tmp_path_factory, request) -> Path:
    """Folder with one run per kind and engine that is tested: plain, resumed, LoRA, LoRA resumed, bfloat16, budget."""
    folder = tmp_path_factory.mktemp("engines")
    asked = [item.callspec.params for item in request.session.items if item.path == request.path and "[" in item.name]
    plan = []
    for engine in {params["engine"]: None for params in asked}:
        kinds = {"plain": {}, "lora": LORA, "half": HALF}
        resumed = {"plain": 3} | ({"lora": 1} if engine in ("FSDP2", "DeepSpeed ZeRO-2", "DeepSpeed ZeRO-3") else {})
        levels = {params.get("granularity") for params in asked if params["engine"] == engine} - {None}
        kinds |= {f"budget-{level}": {**BUDGET, "granularity": level} for level in sorted(levels)}
        if engine == "DeepSpeed ZeRO-2":
            kinds["own-schedule"] = {}
        for kind, settings in kinds.items():
            config = own_schedule(folder) if kind == "own-schedule" else CONFIGS[engine]
            place = folder / folder_of(engine, kind)
            plan.append({"config": config, "arguments": tiny_tuning.arguments(parts, place, **settings)})
            if step := resumed.get(kind):
                again = folder / folder_of(engine, f"{kind}-resumed")
                settings = {**settings, "resume_from_checkpoint": "auto"}
                copied = [str(folder / f"checkpoint-{step}") for folder in (place, again)]
                arguments = tiny_tuning.arguments(parts, again, **settings)
                plan.append({"config": config, "arguments": arguments, "copy": [copied]})
    (folder / "plan.json").write_text(json.dumps(plan))
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    with open(folder / "log.txt", "w") as log:
        done = subprocess.run(
            [*launch, str(ROOT / "tests/support/engine_worker.py"), str(folder / "plan.json")],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            timeout=900,
        )
    assert done.returncode == 0, (folder / "log.txt").read_text()[-4000:]
    return folder


@pytest.fixture(scope="module")
def alone(parts, tmp_path_factory) -> Path:
    """The LoRA run of one process, and the runs of the other recipe."""
    folder = tmp_path_factory.mktemp("alone")
    tiny_tuning.tune(parts, folder / "lora", **LORA)
    for granularity in ("attn_sequence", "attn_token"):
        tiny_tuning.tune(parts, folder / f"budget-{granularity}", granularity=granularity, **BUDGET)
    return folder


def assert_close(ours: Path, theirs: Path, tolerance: float) -> None:
    saved, expected = load_file(ours), load_file(theirs)
    assert set(saved) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(saved[name], value, rtol=0, atol=tolerance)


@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_learn_what_one_does(runs, finished, engine):
    run = runs / folder_of(engine, "plain")
    record = json.loads((run / "run.json").read_text())
    assert (record["world_size"], record["engine"]) == (2, engine)
    assert_close(run / "router.safetensors", finished / "router.safetensors", 1e-5)
    start, end = (load_file(folder / "router.safetensors") for folder in (finished, run))
    assert all(value.dtype == torch.float32 for value in end.values()) and set(start) == set(end)


@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_log_what_one_does(runs, finished, engine):
    names = ["task_loss", "penalty", "capacity", "loss", "learning_rate", "padding"]
    for ours, theirs in zip(
        tiny_tuning.history(runs / folder_of(engine, "plain")), tiny_tuning.history(finished), strict=True
    ):
        assert {name: ours[name] for name in names} == pytest.approx({name: theirs[name] for name in names}, abs=2e-5)


@pytest.mark.parametrize("engine", ENGINES)
def test_resuming_ends_with_the_same_bits(runs, engine):
    whole, resumed = runs / folder_of(engine, "plain"), runs / folder_of(engine, "plain-resumed")
    assert (whole / "router.safetensors").read_bytes() == (resumed / "router.safetensors").read_bytes()


@pytest.mark.parametrize("engine", SHARDING)
def test_resumed_adapters_end_with_the_same_bits(runs, engine):
    whole, resumed = runs / folder_of(engine, "lora"), runs / folder_of(engine, "lora-resumed")
    for name in ("adapter/adapter_model.safetensors", "router.safetensors"):
        assert (whole / name).read_bytes() == (resumed / name).read_bytes()


@pytest.mark.full
@pytest.mark.parametrize("engine", ["DeepSpeed ZeRO-2"])
def test_the_command_line_decides_the_schedule_not_the_deepspeed_config(runs, finished, engine):
    run = runs / folder_of(engine, "own-schedule")
    assert_close(run / "router.safetensors", finished / "router.safetensors", 1e-5)
    rates = [[line["learning_rate"] for line in tiny_tuning.history(folder)] for folder in (run, finished)]
    assert rates[0] == pytest.approx(rates[1])


@pytest.mark.parametrize("engine", ENGINES)
def test_checkpoints_hold_what_trains(runs, finished, engine):
    folder = runs / folder_of(engine, "plain") / "checkpoint-6"
    assert set(load_file(folder / "trainable.safetensors")) == set(load_file(finished / "router.safetensors"))
    base = sum(p.numel() for p in AutoModelForCausalLM.from_config(_config(finished)).parameters()) * 4
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < base


def _config(finished):
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(json.loads((finished / "run.json").read_text())["base"]["path"])


@pytest.mark.parametrize("engine", ENGINES)
def test_a_bfloat16_base_keeps_float32_routers(runs, parts, engine):
    saved = load_file(runs / folder_of(engine, "half") / "router.safetensors")
    start = load_file(parts["start"] / "router.safetensors")
    for name, value in saved.items():
        assert value.dtype == torch.float32 and not torch.equal(value, start[name])
        assert not torch.equal(value, value.bfloat16().float()), "finer than bfloat16"


@pytest.mark.parametrize("engine", ENGINES)
def test_lora_and_routers_equal_one_process_and_reload(runs, alone, parts, engine):
    run = runs / folder_of(engine, "lora")
    name = "adapter_model.safetensors"
    assert_close(run / "adapter" / name, alone / "lora" / "adapter" / name, 1e-5)
    base = AutoModelForCausalLM.from_pretrained(parts["base"], dtype=torch.float32)
    model = PeftModel.from_pretrained(route(base, mod_layers=tiny_checkpoint.LAYERS), run / "adapter")
    trained = load_file(run / "checkpoint-3" / "trainable.safetensors")
    state = model.state_dict()
    assert len(trained) > 3 and all(torch.equal(state[key], value) for key, value in trained.items())


@pytest.mark.parametrize(("engine", "granularity"), BUDGETS)
def test_two_processes_reach_a_budget_as_one_does(runs, alone, engine, granularity):
    ours, theirs = runs / folder_of(engine, f"budget-{granularity}"), alone / f"budget-{granularity}"
    assert_close(ours / "router.safetensors", theirs / "router.safetensors", 1e-5)
    records = [json.loads((folder / "run.json").read_text()) for folder in (ours, theirs)]
    assert [record["world_size"] for record in records] == [2, 1]
    assert records[0]["reached_capacity"] == pytest.approx(records[1]["reached_capacity"], abs=1e-3)


def test_the_log_of_all_runs_is_short(runs):
    lines = (runs / "log.txt").read_text().splitlines()
    assert len(lines) < 20 * len(json.loads((runs / "plan.json").read_text())), "\n".join(lines[:200])

"""The folder of a tuning run: its name, what may be in it before, and the files that a finished run leaves."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from router_tuning.errors import UserError
from router_tuning.files import scratch_folder, write_text
from router_tuning.places import ROOT
from router_tuning.tuning.checkpoints import checkpoints, find_fault, remove
from router_tuning.tuning.command_line import Command
from router_tuning.tuning.routing_statistics import CAPACITY

TEMPLATE = "chat_template.jinja"
"""The template that a run rendered its conversations in."""
RESULTS = (
    "router.safetensors",
    "router_config.json",
    TEMPLATE,
    "run.json",
    "metrics.jsonl",
    "routing_history.json",
    "adapter",
    "model",
    "tensorboard",
)
"""What a finished run leaves beside its checkpoints."""


def default_folder(command: Command) -> Path:
    """``trained_models/<base>/<data>/<knobs>``; every knob that changes the result and is often changed is named."""
    model, routing, data, training = command.model, command.routing, command.data, command.training
    layers = f"layers{re.sub('[,:+]', '-', routing.mod_layers)}" if routing.mod_layers else f"mod_n{routing.mod_n}"
    samples = data.max_train_samples or "all"
    knobs = [
        routing.granularity,
        layers,
        f"target{routing.target_capacity:g}",
        f"gradient_scale{routing.gradient_scale:g}",
        f"samples{samples}",
        f"epoch{training.num_train_epochs:g}",
        f"lr{training.learning_rate:g}",
        f"wd{training.weight_decay:g}",
    ]
    if routing.recipe != "paper":
        knobs.insert(0, routing.recipe)
    if routing.trains != "routers":
        knobs.append(f"lora{routing.lora_r}" if routing.trains == "lora" else "full")
    if routing.skip != "zero":
        knobs.append(routing.skip + (str(routing.skip_rank) if routing.skip == "low_rank" else ""))
    if routing.router_pooling != "sequence":
        knobs.append(routing.router_pooling)
    if routing.kv_policy != "keep":
        knobs.append(f"kv_{routing.kv_policy}")
    if training.seed != 42:
        knobs.append(f"seed{training.seed}")
    return ROOT / "trained_models" / model.name / data.name / "_".join(knobs)


def check_folder(folder: Path, resume: bool, overwrite: bool) -> None:
    """UserError if the folder holds an earlier run and nothing says what to do with it."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output_dir {folder} is a file")
    held = [name for name in RESULTS if (folder / name).exists()] + [path.name for _, path in checkpoints(folder)]
    if held and not resume and not overwrite:
        raise UserError(
            f"{folder} holds an earlier run ({held[0]}): continue it with --resume_from_checkpoint auto "
            "(RESUME=auto), or start again with --overwrite_output_dir"
        )


def clear_folder(folder: Path, keep_checkpoints: bool) -> None:
    """Delete what an earlier run left, and what a killed one left half-written; nothing else in the folder."""
    with scratch_folder(folder):
        pass  # makes the folder, and empties it of what a killed run left half-written
    for _, path in checkpoints(folder):
        # A damaged one that stayed the newest would count among those that rotation keeps.
        if keep_checkpoints and find_fault(path) is None:
            break
        remove(path)
    for name in RESULTS:
        path = folder / name
        if keep_checkpoints and name == "tensorboard":
            continue
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def write_results(folder: Path, run: Mapping[str, Any], history: list[dict[str, Any]]) -> None:
    """Write ``metrics.jsonl``, ``routing_history.json`` and, last, ``run.json``: where it is, the run is complete."""
    lines = [row for row in history if "loss" in row]
    write_text(folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in lines))
    write_text(folder / "routing_history.json", json.dumps(routing_history(lines), indent=1) + "\n")
    write_text(folder / "run.json", json.dumps(run, indent=1, default=str) + "\n")


def routing_history(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Capacity by router over training: ``{"step": [s], "total": [s], "routers": {name: [s]}}``."""
    prefix = f"{CAPACITY}_layer_"
    names = [name for name in lines[0] if name.startswith(prefix)] if lines else []
    return {
        "step": [row["step"] for row in lines],
        "total": [row[CAPACITY] for row in lines],
        "routers": {name.removeprefix(prefix): [row[name] for row in lines] for name in names},
    }

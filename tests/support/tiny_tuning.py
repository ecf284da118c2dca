"""A tuning run on a tiny random base: folders, command lines, and the run itself."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import tiny_checkpoint
import torch
from safetensors.torch import load_file

from router_tuning.tuning.command.command_line import Command, parse_command
from router_tuning.tuning.run import Run, TunedRun
from router_tuning.tuning.trainer.interruption import StopOnSignal
from router_tuning.tuning.tuning import run_tuning

WORDS = "red blue green one two three cat dog sun moon tree house up down left right".split()
ROWS = 26
# Three steps of eight sequences, two rows over; the routers start from a run whose decisions are mixed.
SETTINGS = {
    "global_batch_size": 8,
    "per_device_train_batch_size": 2,
    "num_train_epochs": 2,
    "learning_rate": 0.02,
    "target_capacity": 0.4,
    "gradient_scale": 0.7,
    "mod_layers": ",".join(map(str, tiny_checkpoint.LAYERS)),
    "save_steps": 1,
    "save_total_limit": 20,
    "report_to": "none",
    "disable_tqdm": True,
    "seed": 7,
}


def write_conversations(path: Path, rows: int = ROWS, seed: int = 0) -> Path:
    """A training file with rows of different lengths."""
    rng = random.Random(seed)
    lines = []
    for number in range(rows):
        asked, answered = (" ".join(rng.choices(WORDS, k=rng.randint(1, 14))) for _ in range(2))
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
        lines.append(json.dumps({"dataset": "words", "id": str(number), "messages": turns}))
    path.write_text("\n".join(lines) + "\n")
    return path


def write_parts(folder: Path) -> dict[str, Path]:
    """A base, mixed start routers for it and data: ``{"base", "start", "data"}``."""
    base = tiny_checkpoint.write_base(folder / "base")
    start = tiny_checkpoint.write_run(folder / "start", base)
    return {"base": base, "start": start, "data": write_conversations(folder / "data.jsonl")}


def arguments(parts: dict[str, Path], output: Path, **overrides) -> list[str]:
    """The command line of a run; None as a value leaves a setting out."""
    values = {
        "model_name_or_path": parts["base"],
        "train_file": parts["data"],
        "output_dir": output,
        "router_dir": parts["start"],
        **SETTINGS,
        **overrides,
    }
    return [text for name, value in values.items() if value is not None for text in (f"--{name}", str(value))]


def command(parts: dict[str, Path], output: Path, **overrides) -> Command:
    """The same, parsed."""
    return parse_command(arguments(parts, output, **overrides))


def tune(parts: dict[str, Path], output: Path, stop: StopOnSignal | None = None, **overrides) -> TunedRun:
    """Run it."""
    return run_tuning(Run(command(parts, output, **overrides), stop))


def resume(parts: dict[str, Path], whole: Path, step: int, output: Path, **overrides) -> Path:
    """Continue a run, in a folder of its own, from a checkpoint that another one left."""
    shutil.copytree(whole / f"checkpoint-{step}", output / f"checkpoint-{step}")
    tune(parts, output, resume_from_checkpoint="auto", **overrides)
    return output


def history(output: Path) -> list[dict]:
    """Log lines of a finished run."""
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def record(output: Path, name: str = "run") -> dict:
    """What a finished run says of itself."""
    return json.loads((output / f"{name}.json").read_text())


def routers(output: Path) -> dict[str, torch.Tensor]:
    """Routers and skip paths of a finished run."""
    return load_file(output / "router.safetensors")

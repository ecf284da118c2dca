"""The folder of a tuning run: its name, what may be in it before, what a run leaves there, and reading that."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from router_tuning.errors import UserError
from router_tuning.files import read_json, read_json_lines, scratch_folder, write_text
from router_tuning.places import ROOT
from router_tuning.tuning.command.command_line import Command, not_usual
from router_tuning.tuning.encoding import load_tokenizer
from router_tuning.tuning.trainer.checkpoints import checkpoints, find_fault

TEMPLATE = "chat_template.jinja"
"""The template that a run rendered its conversations in."""
ADAPTER, MODEL = "adapter", "model"
"""Folders of a run that hold what peft saved, or all weights where all were tuned."""
PARTS = ("arguments", "base", "data", "tokenizer")
"""Entries of ``run.json`` that hold further entries."""
_NAMED = frozenset("folder_name model_name_or_path data_type train_file granularity".split())
RESULTS = (
    "router.safetensors",
    "router_config.json",
    TEMPLATE,
    "run.json",
    "metrics.jsonl",
    ADAPTER,
    MODEL,
    "tensorboard",
)
"""What a finished run leaves beside its checkpoints."""


def default_folder(command: Command) -> Path:
    """``trained_models/<base>/<data>/<knobs>``, the knobs all settings that are given and change what is learnt."""
    given = {name: value for name, value in not_usual(command.values()).items() if name not in _NAMED}
    knobs = [command.routing.granularity, *(f"{name}_{value}" for name, value in sorted(given.items()))]
    name = re.sub(r"[^\w.+-]+", "-", "__".join(knobs))
    if len(name) > 200:  # of 255 that file systems take
        name = f"{name[:180]}__{hashlib.sha256(name.encode()).hexdigest()[:12]}"
    return ROOT / "trained_models" / command.model.name / command.data.name / name


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
        shutil.rmtree(path)
    for name in RESULTS:
        path = folder / name
        if keep_checkpoints and name == "tensorboard":
            continue
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def write_results(folder: Path, run: Mapping[str, Any], history: list[dict[str, Any]]) -> None:
    """Write ``metrics.jsonl`` and, last, ``run.json``: where it is, the run is complete."""
    write_text(folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in history))
    write_text(folder / "run.json", json.dumps(run, indent=1, default=str) + "\n")


# ---- what a run left behind


def read_run(run: Path) -> dict[str, Any]:
    """``run.json`` of a tuning run, or an empty dict where there is none; UserError if it is damaged."""
    path = run / "run.json"
    if not path.is_file():
        return {}
    content = {name: value for name, value in read_json(path).items() if value is not None}
    if odd := [name for name in PARTS if not isinstance(content.get(name, {}), dict)]:
        raise UserError(f"{path}: expected JSON objects under {', '.join(odd)}")
    return content


def refuse_run(output: Path) -> None:
    """UserError if a tuning run lies where something is to be written, which may replace what is there."""
    if read_run(output):
        raise UserError(f"--output {output} is a tuning run: name another folder")


def trained(run: Path) -> str:
    """What a run trained: ``routers``, ``routers and LoRA`` or ``all weights``."""
    if (run / ADAPTER).is_dir():
        return "routers and LoRA"
    return "all weights" if (run / MODEL).is_dir() else "routers"


def base_of(run: Path, given: Path | None = None) -> Path:
    """Folder of the base that a run was tuned on: ``given``, or the one that ``run.json`` names.

    Raises :class:`UserError` if neither is a folder with a ``config.json``.
    """
    record = read_run(run)
    named, folder_name = record.get("base", {}).get("path"), record.get("arguments", {}).get("folder_name")
    candidates = [given] if given else [Path(named)] if named else []
    # The repository may have moved since. A name with a path in it is none that this repository wrote.
    if not given and isinstance(folder_name, str) and Path(folder_name).name == folder_name != "..":
        candidates.append(ROOT / "ckpt" / folder_name)
    for folder in candidates:
        if (folder / "config.json").is_file():
            return folder
    where = ", ".join(map(str, candidates)) or "run.json names none"
    raise UserError(f"{run}: no checkpoint folder of its base ({where}); name it with --base")


def tokenizer_of(run: Path, base: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that a run was tuned with, rendering conversations as the run did.

    Args:
        base: folder of the run's base, whose tokenizer it is unless the run named another.
    """
    template = run / TEMPLATE
    place = read_run(run).get("tokenizer", {}).get("name") or base
    return load_tokenizer(place, template.read_text(encoding="utf-8") if template.is_file() else "auto")


def data_of(run: Path) -> Path | None:
    """JSONL file that a run was tuned on, if ``run.json`` names one."""
    path = read_run(run).get("data", {}).get("path")
    return Path(path) if path else None


def training_log(run: Path) -> list[dict[str, Any]]:
    """Log lines of the run, from ``metrics.jsonl``; empty where it wrote none."""
    return read_json_lines(run / "metrics.jsonl")

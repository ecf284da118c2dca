"""Checkpoint folders that are complete or not there, and the settings that a run must share to continue one."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from router_tuning.errors import UserError
from router_tuning.tuning.command.arguments import DEFAULTS

MANIFEST = "manifest.json"
FORMAT = 4
ORIGINS = frozenset(
    "folder_name model_name_or_path model_revision trust_remote_code tokenizer_name router_dir data_type train_file "
    "max_train_samples".split()
)
"""Arguments that say where something comes from: runs share its content, not its place."""

_WITHOUT_INFLUENCE = ("logging_", "log_", "save_", "hub_", "trackio_", "dataloader_", "ddp_", "eval_", "do_")
NEUTRAL = frozenset(name for name in DEFAULTS if name.startswith(_WITHOUT_INFLUENCE)) | frozenset(
    "output_dir overwrite_output_dir resume_from_checkpoint dry_run check_inputs num_processes "
    "cache_dir token preprocessing_num_workers attn_implementation report_to run_name project push_to_hub "
    "disable_tqdm debug skip_memory_metrics include_num_input_tokens_seen torch_empty_cache_steps use_cache "
    "enable_jit_checkpoint gradient_accumulation_steps activation_checkpointing activation_checkpointing_kwargs "
    "gradient_checkpointing gradient_checkpointing_kwargs use_cpu local_rank fsdp fsdp_config deepspeed "
    "parallelism_config accelerator_config per_device_eval_batch_size bf16_full_eval fp16_full_eval".split()
)
"""Arguments that do not change what is learnt. Every other, and every new one, has to be that of a run to continue it.

The number of forward passes of a step is not among the others: the global batch is.
"""
_HASHED_UP_TO = 256 << 20  # bytes; larger files are checked by size alone


def describe(folder: Path, settings: Mapping[str, Any]) -> None:
    """Flush every file of a checkpoint to disk, and list them all in its manifest."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        _flush(path)
        files[path.relative_to(folder).as_posix()] = _describe(path)
    manifest = {"format": FORMAT, "settings": settings, "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    _flush(folder / MANIFEST)


def rotate(run: Path, limit: int | None) -> None:
    """Keep the ``limit`` newest checkpoints (None or 0: all)."""
    for _, folder in checkpoints(run)[limit:] if limit else []:
        shutil.rmtree(folder)  # half of one, after a kill, is incomplete and the first to go


def checkpoints(run: Path) -> list[tuple[int, Path]]:
    """``(step, folder)``, newest first."""
    found = []
    for path in run.glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if match and path.is_dir():
            found.append((int(match[1]), path))
    return sorted(found, reverse=True)


def newest_complete(run: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose files are all there and whole, and one line for each newer one that is not."""
    skipped = []
    for _, folder in checkpoints(run):
        fault = find_fault(folder)
        if fault is None:
            return folder, skipped
        skipped.append(f"{folder.name} is incomplete ({fault}): skipped and removed")
    return None, skipped


def find_fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:
        return f"no {MANIFEST}"
    except ValueError:
        return f"{MANIFEST} is damaged"
    if manifest.get("format") != FORMAT:
        return f"{MANIFEST} has format {manifest.get('format')!r}, not {FORMAT}"
    for name, described in manifest["files"].items():
        path = folder / name
        if not path.is_file() or _describe(path) != described:
            return f"{name} is missing or has changed"
    return None


def settings_of(folder: Path) -> dict[str, Any]:
    """The settings of the run that wrote a checkpoint."""
    return json.loads((folder / MANIFEST).read_text())["settings"]


def check_settings(folder: Path, settings: Mapping[str, Any], unknown: Sequence[str] = ()) -> None:
    """UserError that names every value in which this run differs from the one that wrote the checkpoint.

    Args:
        unknown: settings that are not known yet.
    """
    saved = settings_of(folder)
    here = json.loads(json.dumps(settings, default=str))
    differing = differences(saved, here | {name: saved.get(name) for name in unknown})
    if differing:
        raise UserError(
            f"{folder} cannot be continued by this run: {differing}. Use the same settings, another output folder, or "
            "--overwrite_output_dir to start again"
        )


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Settings that differ, with both values; one that a side lacks is at its default there."""
    pairs = [
        (name, *(side.get(name, DEFAULTS.get(name)) for side in (before, now)))
        for name in sorted(before.keys() | now.keys())
    ]
    return "; ".join(f"{name} was {was!r} and is {here!r}" for name, was, here in pairs if was != here)


def chosen(resume: str | None, run: Path) -> tuple[Path | None, list[str]]:
    """The checkpoint that ``--resume_from_checkpoint`` names (``auto``: the newest complete one), and notes."""
    if resume is None:
        return None, []
    if resume == "auto":
        folder, notes = newest_complete(run)
        if folder is None:
            notes.append(f"no complete checkpoint in {run}: starting from the beginning")
        return folder, notes
    folder = Path(resume)
    if not folder.is_dir():
        raise UserError(f"--resume_from_checkpoint {resume}: no such folder; use auto for the newest complete one")
    fault = find_fault(folder)
    if fault:
        raise UserError(
            f"--resume_from_checkpoint {resume} is incomplete ({fault}); use auto for the newest complete one"
        )
    return folder, []


def _describe(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    if size > _HASHED_UP_TO:
        return {"bytes": size}
    with open(path, "rb") as stream:
        return {"bytes": size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

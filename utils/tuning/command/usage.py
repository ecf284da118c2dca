"""``--help`` of a tuning run: the project's own options on one screen."""

from __future__ import annotations

import textwrap
from dataclasses import Field, fields
from typing import Any

from router_tuning.tuning.command.arguments import (
    DEFAULTS,
    DataArguments,
    ModelArguments,
    RoutingArguments,
    TuningArguments,
)
from router_tuning.tuning.recipes import RECIPE_DEFAULTS
from router_tuning.tuning.recipes.budget.settings import BudgetArguments

_SAME = (
    "folder_name model_name_or_path mod_n mod_layers granularity skip skip_rank router_only recipe "
    "data_type max_train_samples max_seq_length chat_template learning_rate weight_decay gradient_scale "
    "target_capacity global_batch_size seed output_dir"
)
VARIABLES = {name: name.upper() for name in _SAME.split()} | {
    "num_train_epochs": "NUM_EPOCHS",
    "per_device_train_batch_size": "MICRO_BATCH_SIZE",
    "resume_from_checkpoint": "RESUME",
}
"""Argument → environment variable of ``scripts/finetune_mod.sh`` that sets it."""

_OFTEN = {
    "Base": (ModelArguments, "folder_name model_name_or_path dtype trust_remote_code load_in_4bit"),
    "Routing": (
        RoutingArguments,
        "recipe granularity mod_n mod_layers target_capacity gradient_scale skip skip_rank router_only lora "
        "router_dir",
    ),
    "Recipe budget": (BudgetArguments, "lowest_budget highest_budget label_tokens calibration_tokens"),
    "Data": (DataArguments, "data_type train_file max_train_samples max_seq_length chat_template"),
    "Training": (
        TuningArguments,
        "output_dir overwrite_output_dir resume_from_checkpoint global_batch_size per_device_train_batch_size "
        "num_train_epochs learning_rate weight_decay seed save_steps report_to dry_run",
    ),
}
"""What is told of each group in a line of its own; its other arguments are named."""
_WIDTH = 119


def usage() -> str:
    """The project's own options by group, each with its variable of the launcher and its default."""
    lines = [
        "usage: finetune_mod.py [--config FILE.yaml] [--OPTION VALUE ...]      tunes the routers of one base",
        "       VARIABLE=value ... bash scripts/finetune_mod.sh [--OPTION VALUE ...]      the same on any machine",
        "A VARIABLE of the launcher stands behind its option; it has NUM_PROCESSES, PORT (29501), CONFIG_FILE,",
        "NUM_MACHINES, MACHINE_RANK, MAIN_PROCESS_IP and RUN (--config) besides. In brackets: defaults.",
    ]
    for title, (part, often) in _OFTEN.items():
        own = {field.name: field for field in fields(part) if field.name in _own(part)}
        rest = [f"--{name}" for name in own if name not in often.split()]
        lines += ["", title, *(_line(own[name]) for name in often.split())]
        also = {"initial_indent": "  also: ", "subsequent_indent": " " * 8, "break_on_hyphens": False}
        lines += textwrap.wrap(" ".join(rest), _WIDTH, **also)
    return "\n".join([*lines, "", "--help_all tells of every option, with those of the Trainer of transformers."])


def _own(part: type) -> set[str]:
    """Arguments that ``part`` itself declares, and those of the Trainer that the launcher sets."""
    return {*part.__annotations__, *VARIABLES}


def _line(field: Field) -> str:
    name = field.name
    flag = f"--{name} {VARIABLES.get(name, '')}".rstrip()
    others = [f"{recipe}: {_text(values[name])}" for recipe, values in RECIPE_DEFAULTS.items() if name in values]
    default = ", ".join([text for text in (_text(DEFAULTS[name]),) if text] + others)
    told = field.metadata["help"].split(". ")[0]  # the Trainer tells more than a line
    return f"  {flag:<46} {told}" + (f" [{default}]" if default else "")


def _text(default: Any) -> str:
    return "" if default is None else f"{default:g}" if isinstance(default, float) else str(default)

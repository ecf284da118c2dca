"""From a command line to checked arguments: old names are mapped, unknown ones refused, all problems named at once."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import math
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import HfArgumentParser
from transformers.utils import is_torch_bf16_gpu_available, is_torch_tf32_available

from router_tuning.errors import UserError
from router_tuning.tuning.command.arguments import (
    DEFAULTS,
    PARTS,
    DataArguments,
    ModelArguments,
    RoutingArguments,
    TuningArguments,
)
from router_tuning.tuning.command.published_names import RENAMED, modernise
from router_tuning.tuning.command.usage import VARIABLES, usage
from router_tuning.tuning.recipes import RECIPES, recipe_defaults
from router_tuning.tuning.recipes.budget.settings import BudgetArguments
from router_tuning.tuning.rehearsal import tried
from router_tuning.tuning.trainer.checkpoints import NEUTRAL
from router_tuning.tuning.trainer.engines import keep_schedule

_PATHS = ("router_dir", "train_file", "output_dir", "resume_from_checkpoint", "cache_dir")
_PATHS_OR_NAMES = ("model_name_or_path", "tokenizer_name")
_SECRETS = ("token", "hub_token")


@dataclass
class Command:
    """A parsed and checked command line; ``notes`` are lines that a user should see.

    ``typed`` are the Trainer's arguments as they were given, before the Trainer makes objects of them.
    """

    model: ModelArguments
    routing: RoutingArguments
    budget: BudgetArguments
    data: DataArguments
    training: TuningArguments
    typed: dict[str, Any]
    notes: list[str]

    def values(self) -> dict[str, Any]:
        """All arguments as plain values, for the record of the run; secrets are left out."""
        parts = (self.model, self.routing, self.budget, self.data)
        flat = {name: value for part in parts for name, value in dataclasses.asdict(part).items()} | self.typed
        # How a step is cut follows from the number of processes.
        flat |= {"global_batch_size": self.training.global_batch_size, "gradient_accumulation_steps": None}
        return {name: value for name, value in flat.items() if name not in _SECRETS}

    def given(self) -> dict[str, Any]:
        """The arguments that are not at their defaults."""
        return not_default(self.values())


def not_default(values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of ``values`` (of a command, or of its record) that are arguments and not at their defaults."""
    return {name: value for name, value in values.items() if name in DEFAULTS and value != DEFAULTS[name]}


def launch_command(values: Mapping[str, Any]) -> str:
    """The shell command that repeats a run of recorded ``values``: variables first, then what none of them sets."""
    variables, flags = [], []
    for name, value in not_default(values).items():
        if name in NEUTRAL:
            continue
        flag, *words = _words(name, value)
        if name in VARIABLES:
            variables.append(f"{VARIABLES[name]}={shlex.join(words)}")
        else:
            flags.append(f"{flag} {shlex.join(words)}")
    return " ".join([*variables, "bash scripts/finetune_mod.sh", *flags])


_AT_LEAST = {
    1: "global_batch_size per_device_train_batch_size gradient_accumulation_steps preprocessing_num_workers "
    "label_tokens calibration_tokens".split(),
    0: "learning_rate weight_decay warmup_steps max_grad_norm num_train_epochs label_smoothing_factor gradient_scale "
    "other_rate seed logging_steps save_steps save_total_limit".split(),
}


def out_of_range(values: Mapping[str, Any]) -> list[str]:
    """Numbers that are not finite or too small, one line each."""
    odd = [name for name, value in values.items() if isinstance(value, float) and not math.isfinite(value)]
    found = [f"--{name} {values[name]} must be a finite number" for name in odd]
    for least, names in _AT_LEAST.items():
        small = [name for name in names if values[name] is not None and values[name] < least]
        found += [f"--{name} {values[name]} must be at least {least}" for name in small]
    return found


class _Parser(HfArgumentParser):
    """Collects what argparse would die of, one problem after the other."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.found: list[str] = []

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        try:
            return super()._get_values(action, arg_strings)
        except argparse.ArgumentError as error:
            self.found.append(f"{action.option_strings[0]}: {error.message}")
            return action.default

    def error(self, message: str):
        raise UserError(message)


def parse_command(argv: Sequence[str] | None = None) -> Command:
    """Parse ``argv`` (default: the process's own) into checked arguments.

    Raises:
        UserError: one line that names every unknown flag, every value of a wrong type or range, and every conflict.
    """
    argv, notes = modernise(expanded(sys.argv[1:] if argv is None else list(argv)))
    parser = _Parser(PARTS, allow_abbrev=False, description="Tune the routers of a Mixture-of-Depths model.")
    parser.set_defaults(**recipe_defaults(*_given(argv, "recipe", "granularity")))
    if {"-h", "--help", "--help_all"} & set(argv):
        sys.stdout.write(f"{parser.format_help() if '--help_all' in argv else usage()}\n")
        raise SystemExit(0)
    namespace, unknown = parser.parse_known_args(argv)
    values = vars(namespace)
    for name in (*_PATHS, *_PATHS_OR_NAMES):
        values[name] = _absolute(values[name], name in _PATHS)
    problems = [*parser.found, *_unknown(unknown, values)]
    parts = [part(**{f.name: values.pop(f.name) for f in dataclasses.fields(part) if f.init}) for part in PARTS[:-1]]
    model, routing, budget, data = parts
    for part in parts:
        problems += part.problems()
    if routing.recipe not in RECIPES:
        problems.append(f"--recipe {routing.recipe} is none of {', '.join(sorted(RECIPES))}")
    elif routing.recipe != "budget" and (given := not_default(vars(budget))):
        problems += [f"--{name} is a setting of --recipe budget" for name in given]
    _set_precision(model, routing, values, notes)
    typed = {f.name: values[f.name] for f in dataclasses.fields(TuningArguments) if f.init}
    wrong_numbers = out_of_range({**typed, **vars(routing), **vars(budget), **vars(data)})
    problems += wrong_numbers
    if not wrong_numbers:
        try:
            training = tried(typed)
            problems += training.problems()
            notes += keep_schedule(training.deepspeed_plugin)
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("; ".join(problems))
    return Command(model, routing, budget, data, training, typed, notes)


_ONE_OF = (("folder_name", "model_name_or_path"), ("data_type", "train_file"))
"""What is given behind a file takes the place of all of its kind in the file."""


def expanded(argv: list[str]) -> list[str]:
    """``--config F`` replaced by the arguments of that YAML file and ``--environment`` by those of the launcher's
    variables, both in front: what else is given counts more, and a variable more than the file.

    Raises:
        UserError: for a file that cannot be read, is no mapping, or names an unknown argument.
    """
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    peek.add_argument("--config", type=Path)
    peek.add_argument("--environment", action="store_true")
    found, rest = peek.parse_known_args(argv)
    if found.environment:
        named = [(name, os.environ.get(variable)) for name, variable in VARIABLES.items()]
        rest = [word for name, value in named if value for word in (f"--{name}", value)] + rest
    if found.config is None:
        return rest
    try:
        values = yaml.safe_load(found.config.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"--config {found.config} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"--config {found.config} must hold lines of the form 'name: value'")
    if odd := [str(name) for name in values if name not in DEFAULTS and name not in RENAMED]:
        raise UserError(f"--config {found.config}: unknown argument {', '.join(odd)}")
    given = {word[2:].partition("=")[0].replace("-", "_") for word in rest if word.startswith("--")}
    for kind in _ONE_OF:
        values = {name: value for name, value in values.items() if name not in kind or not given & set(kind)}
    return [word for name, value in values.items() if value is not None for word in _words(name, value)] + rest


def _words(name: str, value: Any) -> list[str]:
    """An argument as a command line gives it."""
    listed = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
    return [f"--{name}", *map(str, listed)]


def _absolute(place: str | None, is_path: bool) -> str | None:
    """A path as it reads from everywhere; ``auto``, and a hub id where one may stand, as they are."""
    if place in (None, "auto"):
        return place
    path = Path(place).expanduser()
    return str(path.absolute()) if is_path or path.exists() or place.startswith((".", "~")) else place


def _given(argv: list[str], *names: str) -> list[str | None]:
    """Values of some arguments, before the others' defaults are known."""
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in names:
        peek.add_argument(f"--{name}")
    found = peek.parse_known_args(argv)[0]
    return [getattr(found, name) for name in names]


def _unknown(unknown: list[str], known: dict[str, Any]) -> list[str]:
    problems = []
    for token in unknown:
        if not token.startswith("--"):
            continue
        name = token[2:].partition("=")[0]
        close = difflib.get_close_matches(name.replace("-", "_"), known, n=1)
        problems.append(f"unknown argument --{name}" + (f" (did you mean --{close[0]}?)" if close else ""))
    if unknown and not problems:
        problems.append(f"{unknown[0]!r} belongs to no argument")
    return problems


def _set_precision(model: ModelArguments, routing: RoutingArguments, values: dict[str, Any], notes: list[str]) -> None:
    """Decide the dtype of the base, and whether autocast is needed.

    A frozen base simply lies in bfloat16 and routers in float32: nothing is left for autocast. A base that trains
    keeps float32 weights, whose small updates bfloat16 would round away, and computes under autocast. On a CPU it
    depends on the base, so it stays open (``auto``) until that is known.
    """
    gpu = torch.cuda.is_available() and not values["use_cpu"]
    # A plan is one for GPUs, also where it is made on a laptop.
    fast = values["dry_run"] or (gpu and is_torch_bf16_gpu_available())
    half = values["bf16"] or model.dtype == "bfloat16" or (model.dtype == "auto" and fast)
    half = half and model.dtype != "float32" and not values["fp16"]
    values["bf16"] = (half and routing.trains == "full") or (values["bf16"] and model.dtype == "float32")
    if half or gpu or model.dtype != "auto" or routing.trains == "full" or values["fp16"]:
        model.dtype = "bfloat16" if half and routing.trains != "full" else "float32"
    if values["bf16"] and not gpu:
        values["use_cpu"] = True
    if values["tf32"] and not is_torch_tf32_available():
        notes.append("without effect: --tf32 (this machine has no GPU of the Ampere generation or newer)")
        values["tf32"] = None

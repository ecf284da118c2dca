"""From a command line to checked arguments: old names are mapped, unknown ones refused, all problems named at once."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import difflib
import json
import math
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM, Trainer
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
from router_tuning.tuning.command.parser import RENAMED, VARIABLES, WITHOUT_EFFECT, Parser, notes_on
from router_tuning.tuning.recipes import recipe_defaults
from router_tuning.tuning.recipes.budget.budget_arguments import BudgetArguments
from router_tuning.tuning.trainer.checkpoints import NEUTRAL
from router_tuning.tuning.trainer.engines import requested

_PATHS = ("router_dir", "train_file", "output_dir", "resume_from_checkpoint", "cache_dir")
_PATHS_OR_NAMES = ("model_name_or_path", "tokenizer_name")
_SECRETS = {"token", "hub_token"}
_TINY = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)


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


def not_usual(values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of ``values`` that change what is learnt and are not at the defaults of their recipe."""
    usual = DEFAULTS | recipe_defaults(values.get("recipe"), values.get("granularity"))
    return {k: v for k, v in values.items() if k in DEFAULTS and k not in NEUTRAL and v != usual[k]}


def settings_file(values: Mapping[str, Any]) -> str:
    """The YAML file (``--config``) that repeats a run of recorded ``values``."""
    return yaml.safe_dump(not_usual(values))


_AT_LEAST = {
    2: ["max_seq_length"],
    1: "mod_n global_batch_size per_device_train_batch_size gradient_accumulation_steps preprocessing_num_workers "
    "label_tokens calibration_tokens lora_r lora_alpha".split(),
    0: "max_train_samples learning_rate weight_decay warmup_steps max_grad_norm num_train_epochs gradient_scale "
    "label_smoothing_factor other_rate seed logging_steps save_steps save_total_limit".split(),
}


def out_of_range(values: Mapping[str, Any]) -> list[str]:
    """Numbers that are not finite or too small, one line each."""
    odd = [name for name, value in values.items() if isinstance(value, float) and not math.isfinite(value)]
    found = [f"--{name} {values[name]} must be a finite number" for name in odd]
    for least, names in _AT_LEAST.items():
        small = [name for name in names if values.get(name) is not None and values[name] < least]
        found += [f"--{name} {values[name]} must be at least {least}" for name in small]
    return found


def parse_command(argv: Sequence[str] | None = None) -> Command:
    """Parse ``argv`` (default: the process's own) into checked arguments.

    Raises:
        UserError: one line that names every unknown flag, every value of a wrong type or range, and every conflict.
    """
    argv = expanded(sys.argv[1:] if argv is None else list(argv))
    notes, parser = notes_on(_names(argv)), Parser()
    if "--help_all" not in argv:
        parser.hide_foreign()
    first, _ = parser.parse_known_args(argv)
    parser.set_defaults(**recipe_defaults(first.recipe, first.granularity))
    parser.found.clear()
    namespace, unknown = parser.parse_known_args(argv)
    values = {name: value for name, value in vars(namespace).items() if name in DEFAULTS}
    values |= {name: DEFAULTS[name] for name in WITHOUT_EFFECT.keys() & DEFAULTS.keys()}
    for name in (*_PATHS, *_PATHS_OR_NAMES):
        values[name] = _absolute(values[name], name in _PATHS)
    problems = [*parser.found, *_unknown(unknown, values)]
    parts = [part(**{f.name: values.pop(f.name) for f in dataclasses.fields(part) if f.init}) for part in PARTS[:-1]]
    model, routing, budget, data = parts
    for part in parts:
        problems += part.problems()
    _set_precision(model, routing, values, notes)
    typed = {f.name: values[f.name] for f in dataclasses.fields(TuningArguments) if f.init}
    problems += _unread({**vars(routing), **vars(budget), **typed})
    wrong_numbers = out_of_range(typed)
    problems += [*out_of_range({**vars(routing), **vars(budget), **vars(data)}), *wrong_numbers]
    if not wrong_numbers:
        try:
            training = _tried(typed, _names(argv))
            problems += training.problems()
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("; ".join(problems))
    return Command(model, routing, budget, data, training, typed, notes)


def _tried(typed: Mapping[str, Any], given: set[str]) -> TuningArguments:
    """The Trainer's arguments, with which a Trainer, its optimizer and its schedule could be built.

    Raises:
        UserError: one line for what transformers, accelerate, torch or a package that is not installed says.
    """
    try:
        training = TuningArguments(**typed)
        # Several processes are checked as one before they start, and a plan is one for other machines.
        if requested() == "one process" and not (training.dry_run or training.deepspeed or training.fsdp):
            with tempfile.TemporaryDirectory() as folder:
                rows = [{"input_ids": [1, 2], "labels": [1, 2]}]
                arguments = copy.copy(training)
                arguments.output_dir = folder
                trainer = Trainer(LlamaForCausalLM(_TINY), arguments, train_dataset=rows)
                trainer.get_train_dataloader()
                trainer.create_optimizer_and_scheduler(100)
        return training
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        names = sorted({RENAMED.get(name, name) for name in given} & typed.keys() - _SECRETS)
        told = " ".join(f"--{name} {typed[name]}" for name in names)
        raise UserError(
            f"the Trainer of transformers refuses {'one of ' * (len(names) > 1)}{told}: {reason}"
        ) from None


_READ_BY = (
    ("recipe", "budget", [f.name for f in dataclasses.fields(BudgetArguments)]),
    (
        "recipe",
        "paper",
        "threshold gradient_scale label_smoothing_factor fp16 activation_checkpointing".split(),
    ),
    ("lora", True, "lora_r lora_alpha lora_dropout lora_target_modules".split()),
    ("skip", "low_rank", ["skip_rank"]),
)
"""Arguments that nothing reads unless another has this value."""


def _unread(values: Mapping[str, Any]) -> list[str]:
    """What is given and nothing would read, one line each."""
    usual = DEFAULTS | recipe_defaults(values["recipe"], values["granularity"])
    return [
        f"--{name} is a setting of --{other} {value}"
        for other, value, names in _READ_BY
        for name in names
        if values[name] != usual[name] and values[other] != value
    ]


def _names(argv: Sequence[str]) -> set[str]:
    """Names of the arguments that are given."""
    return {word[2:].partition("=")[0].replace("-", "_") for word in argv if word.startswith("--")}


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
    if odd := [str(name) for name in values if name not in DEFAULTS | RENAMED | WITHOUT_EFFECT]:
        raise UserError(f"--config {found.config}: unknown argument {', '.join(odd)}")
    given = _names(rest)
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


def _unknown(unknown: list[str], known: dict[str, Any]) -> list[str]:
    names = [word[2:].partition("=")[0] for word in unknown if word.startswith("--")]
    close = [difflib.get_close_matches(name.replace("-", "_"), known, n=1) for name in names]
    told = ["".join(f" (did you mean --{other}?)" for other in others) for others in close]
    stray = [f"{word!r} belongs to no argument" for word in unknown[:1] if not names]
    return stray + [f"unknown argument --{name}{more}" for name, more in zip(names, told, strict=True)]


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

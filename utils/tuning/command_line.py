"""From a command line to checked arguments: old names are mapped, unknown ones refused, all problems named at once."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import HfArgumentParser
from transformers.utils import is_torch_bf16_gpu_available, is_torch_tf32_available

from router_tuning.errors import UserError
from router_tuning.tuning.arguments import DataArguments, ModelArguments, RoutingArguments, TuningArguments
from router_tuning.tuning.engines import keep_schedule
from router_tuning.tuning.recipes import DEFAULTS, RECIPES

RENAMED = {
    "mindskip_n": "mod_n",
    "router_layers": "mod_n",
    "mindskip_capacity": "target_capacity",
    "num_epochs": "num_train_epochs",
    "evaluation_strategy": "eval_strategy",
    "warmup_ratio": "warmup_steps",
    "torch_dtype": "dtype",
    "use_auth_token": "token",
    "use_checkpointing": "activation_checkpointing",
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
    "group_by_length": "length_grouping",
    "no_cuda": "use_cpu",
    "resume": "resume_from_checkpoint",
}
"""Published and former names → today's."""

BOOLEANS = {"chat_template": {"true": "own", "false": "published"}}
"""Arguments that took true or false (without a value: true) → what each now means."""

WITHOUT_EFFECT = {
    "use_fast_tokenizer": "labels need the offsets of a fast tokenizer",
    "use_flash_attn": "SDPA takes the flash kernel; --attn_implementation flash_attention_2 for the package",
    "low_cpu_mem_usage": "weights are always loaded lean",
    "overwrite_cache": "encoded data is cached by content",
    "save_safetensors": "only safetensors are written",
    "include_tokens_per_second": "always logged",
    "logging_dir": "TensorBoard logs lie in the output folder",
    "do_train": "this command trains",
}
"""Published names that have nothing left to decide, with the reason."""


@dataclass
class Command:
    """A parsed and checked command line; ``notes`` are lines that a user should see."""

    model: ModelArguments
    routing: RoutingArguments
    data: DataArguments
    training: TuningArguments
    notes: list[str]

    def values(self) -> dict[str, Any]:
        """All arguments as plain values, for the record of the run; secrets are left out."""
        flat: dict[str, Any] = {}
        for part in (self.model, self.routing, self.data):
            flat |= dataclasses.asdict(part)
        flat |= {k: v for k, v in self.training.to_dict().items() if not k.startswith("_")}
        return {k: v for k, v in flat.items() if k not in ("token", "hub_token", "check_inputs", "dry_run")}


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
    argv, notes = modernise(sys.argv[1:] if argv is None else list(argv))
    parts = (ModelArguments, RoutingArguments, DataArguments, TuningArguments)
    parser = _Parser(parts, allow_abbrev=False, description="Tune the routers of a Mixture-of-Depths model.")
    parser.set_defaults(**DEFAULTS.get(_recipe_in(argv), {}))
    namespace, unknown = parser.parse_known_args(argv)
    values = vars(namespace)
    problems = [*parser.found, *_unknown(unknown, values)]
    model, routing, data = (
        part(**{f.name: values.pop(f.name) for f in dataclasses.fields(part) if f.init}) for part in parts[:3]
    )
    for part in (model, routing, data):
        problems += part.problems()
    if routing.recipe not in RECIPES:
        problems.append(f"--recipe {routing.recipe} is none of {', '.join(sorted(RECIPES))}")
    _set_precision(model, routing, values, notes)
    try:
        training = TuningArguments(**{f.name: values[f.name] for f in dataclasses.fields(TuningArguments) if f.init})
        problems += training.problems()
        notes += keep_schedule(training.deepspeed_plugin)
    except (ValueError, ImportError) as error:
        problems.append(" ".join(str(error).split()))
    if problems:
        raise UserError("; ".join(problems))
    return Command(model, routing, data, training, notes)


def _recipe_in(argv: list[str]) -> str | None:
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--recipe")
    return peek.parse_known_args(argv)[0].recipe


def modernise(argv: list[str]) -> tuple[list[str], list[str]]:
    """Map old names and values in ``argv`` to new ones and drop those without effect; the arguments and notes."""
    result: list[str] = []
    renamed: dict[str, str] = {}
    dropped: dict[str, str] = {}
    rest = deque(argv)
    while rest:
        token = rest.popleft()
        if not token.startswith("--"):
            result.append(token)
            continue
        name, equals, value = token[2:].partition("=")
        name, values = name.replace("-", "_"), [value] if equals else []
        while not equals and rest and not rest[0].startswith("--"):
            values.append(rest.popleft())
        if name in WITHOUT_EFFECT:
            dropped[name] = WITHOUT_EFFECT[name]
            continue
        if name in RENAMED:
            renamed[f"--{name}"] = f"--{RENAMED[name]}"
            name = RENAMED[name]
        given = " ".join(values) or "true"
        if new := BOOLEANS.get(name, {}).get(given.lower()):
            renamed[f"--{name} {given}"], values = f"--{name} {new}", [new]
        result += [f"--{name}={values[0]}"] if equals else [f"--{name}", *values]
    notes = []
    if renamed:
        notes.append("old names: " + ", ".join(f"{old} is now {new}" for old, new in renamed.items()))
    if dropped:
        notes.append("without effect: " + "; ".join(f"--{name} ({why})" for name, why in dropped.items()))
    return result, notes


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
    keeps float32 weights, whose small updates bfloat16 would round away, and computes under autocast.
    """
    gpu = torch.cuda.is_available() and not values["use_cpu"]
    # A plan is one for GPUs, also where it is made on a laptop.
    fast = values["dry_run"] or (gpu and is_torch_bf16_gpu_available())
    half = values["bf16"] or model.dtype == "bfloat16" or (model.dtype == "auto" and fast)
    half = half and model.dtype != "float32" and not values["fp16"]
    values["bf16"] = (half and routing.trains == "full") or (values["bf16"] and model.dtype == "float32")
    model.dtype = "bfloat16" if half and routing.trains != "full" else "float32"
    if values["bf16"] and not gpu:
        values["use_cpu"] = True
    if values["tf32"] and not is_torch_tf32_available():
        notes.append("without effect: --tf32 (this machine has no GPU of the Ampere generation or newer)")
        values["tf32"] = None

"""The parser of a tuning run: the Trainer's options and ours by group, former names, and what the launcher sets."""

from __future__ import annotations

import argparse
from collections.abc import Collection
from typing import Any

from transformers import HfArgumentParser

from router_tuning.errors import UserError
from router_tuning.tuning.command.arguments import DEFAULTS, PARTS
from router_tuning.tuning.recipes import RECIPE_DEFAULTS

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


class _OneLine(argparse.HelpFormatter):
    """A line per option: its name, the launcher's variable for it, what it is and, in brackets, its default."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=54, width=119)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        return f"{action.option_strings[0]} {VARIABLES.get(action.dest, '')}".rstrip()

    def _get_help_string(self, action: argparse.Action) -> str:
        defaults = [] if action.default in (None, False, argparse.SUPPRESS) else [f"{action.default}"]
        defaults += [f"{name}: {its[action.dest]}" for name, its in RECIPE_DEFAULTS.items() if action.dest in its]
        told = action.help.split(". ")[0]  # the Trainer tells more than a line
        return told.replace("%", "%%") + (f" [{', '.join(defaults)}]" if defaults else "")


class Parser(HfArgumentParser):
    """Collects what argparse would die of, one problem after the other; knows former names, too."""

    def __init__(self) -> None:
        super().__init__(
            PARTS,
            allow_abbrev=False,
            formatter_class=_OneLine,
            usage="finetune_mod.py [--config FILE.yaml] [--OPTION VALUE ...]",
            description="Tunes the routers of one base; VARIABLE=value ... bash scripts/finetune_mod.sh does the same "
            "on any machine. Its variables stand behind their options; NUM_PROCESSES, PORT (29501), CONFIG_FILE, "
            "NUM_MACHINES, MACHINE_RANK, MAIN_PROCESS_IP and RUN (--config) are its own.",
        )
        self.add_argument("--help_all", action="help", help="tell of the options of the Trainer of transformers, too")
        for name in WITHOUT_EFFECT.keys() - DEFAULTS.keys():
            self.add_argument(f"--{name}", f"--{name.replace('_', '-')}", nargs="*", help=argparse.SUPPRESS)
        for old, new in RENAMED.items():
            for spelling in {old, old.replace("_", "-")}:
                self._option_string_actions[f"--{spelling}"] = self._option_string_actions[f"--{new}"]
        self.found: list[str] = []

    def hide_foreign(self) -> None:
        """Leave options of the Trainer that neither we nor the launcher set out of ``--help``."""
        own = set(VARIABLES).union(*(part.__annotations__ for part in PARTS), ("help", "help_all"))
        for action in self._actions:
            if action.dest not in own or action.option_strings[0].startswith("--no_"):
                action.help = argparse.SUPPRESS

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        try:
            return super()._get_values(action, arg_strings)
        except argparse.ArgumentError as error:
            self.found.append(f"{action.option_strings[0]}: {error.message}")
            return action.default

    def error(self, message: str):
        raise UserError(message)


def notes_on(given: Collection[str]) -> list[str]:
    """What to say of names that are no longer ours."""
    renamed = [f"--{old} is now --{new}" for old, new in RENAMED.items() if old in given]
    ignored = [f"--{name} ({why})" for name, why in WITHOUT_EFFECT.items() if name in given]
    notes = [f"old names: {', '.join(renamed)}"] if renamed else []
    return notes + ([f"without effect: {'; '.join(ignored)}"] if ignored else [])

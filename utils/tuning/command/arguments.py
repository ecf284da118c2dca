"""Arguments of a tuning run: one dataclass per concern, each of which names everything that is wrong with it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from transformers import TrainingArguments
from transformers.hf_argparser import HfArg

from router_tuning.errors import UserError
from router_tuning.model import ModConfig
from router_tuning.places import ROOT
from router_tuning.tuning.encoding import TEMPLATES
from router_tuning.tuning.recipes.budget.budget_arguments import BudgetArguments
from router_tuning.tuning.trainer.engines import settings_without_gpu


@dataclass
class ModelArguments:
    """Which base is tuned, and how it is loaded."""

    _argument_group_name = "Base"

    folder_name: str | None = HfArg(default=None, help="folder of the base under ckpt/")
    model_name_or_path: str | None = HfArg(default=None, help="checkpoint folder or hub id of the base")
    tokenizer_name: str | None = HfArg(default=None, help="folder or hub id, if not the base's")
    model_revision: str | None = HfArg(default=None, help="revision of a hub id")
    cache_dir: str | None = HfArg(default=None, help="where hub downloads are kept")
    token: str | None = HfArg(default=None, help="hub token, for gated bases")
    trust_remote_code: bool = HfArg(default=False, help="run model code that comes with the base")
    dtype: Literal["auto", "float32", "bfloat16"] = HfArg(default="auto", help="of the base; auto: what is faster")
    attn_implementation: str | None = HfArg(default=None, help="sdpa, eager or flash_attention_2")

    def __post_init__(self) -> None:
        if self.folder_name is None and self.model_name_or_path is None:
            self.folder_name = "tiny-llama-mod"

    def problems(self) -> list[str]:
        """What is wrong with these values, one line each."""
        if self.folder_name and self.model_name_or_path:
            return [f"--folder_name {self.folder_name} and --model_name_or_path both name a base: give one"]
        return []

    @property
    def base(self) -> str:
        """Folder or hub id of the base."""
        return self.model_name_or_path or str(ROOT / "ckpt" / str(self.folder_name))

    @property
    def name(self) -> str:
        """Short name of the base, for the output folder."""
        return self.folder_name or Path(self.base.rstrip("/")).name


@dataclass
class RoutingArguments:
    """What is routed and what trains."""

    _argument_group_name = "Routing"

    mod_n: int | None = HfArg(default=None, help="routed layers, deepest but one; default: half")
    mod_layers: str | None = HfArg(default=None, help="4,6,8, or attn:4,6+mlp:7,8, or auto (mod_n a part, measured)")
    granularity: str = HfArg(default="attn_sequence", help="attn_ mlp_ block_ + sequence or token; expert_token")
    threshold: float = HfArg(default=0.5, help="τ of the decision score ≥ τ")
    router_pooling: str = HfArg(default="sequence", help="what a sequence's score sees: sequence, prompt")
    kv_policy: str = HfArg(default="keep", help="token level: whether skipped tokens offer keys: keep, drop")
    skip: str = HfArg(default="zero", help="for what is skipped: zero, mean, low_rank")
    skip_rank: int = HfArg(default=32, help="rank of low_rank")
    train_skip: bool = HfArg(default=False, help="skip paths train with the routers")
    target_capacity: float = HfArg(default=0.5, help="share of the routed work that should run")
    gradient_scale: float = HfArg(default=1.0, help="λ of λ·Σ ReLU(capacity - target)")
    router_only: bool = HfArg(default=True, help="False trains the base too (full MoD tuning)")
    router_dir: str | None = HfArg(default=None, help="start from the routers saved in this folder")
    recipe: Literal["paper", "budget"] = HfArg(default="paper", help="or budget: holds its target, has a dial")
    lora: bool = HfArg(default=False, help="train LoRA adapters beside the routers")
    lora_r: int = HfArg(default=8, help="rank")
    lora_alpha: int = HfArg(default=16, help="scale is alpha / r")
    lora_dropout: float = HfArg(default=0.0, help="dropout in front of the adapters")
    lora_target_modules: str = HfArg(default="all-linear", help="comma-separated names, or all-linear")

    def layers(self) -> list[int] | dict[str, list[int]] | None:
        """``mod_layers`` as numbers, by part where it names parts; None for ``auto``."""
        if self.mod_layers in (None, "auto"):
            return None
        if ":" not in self.mod_layers:
            return [int(layer) for layer in self.mod_layers.split(",")]
        named = (part.split(":") for part in self.mod_layers.split("+"))
        return {part: [int(layer) for layer in layers.split(",")] for part, layers in named}

    def config(self) -> ModConfig:
        """The checked routing configuration; ValueError names the field, the value and the fix."""
        given = {f.name: getattr(self, f.name) for f in fields(ModConfig) if hasattr(self, f.name)}
        return ModConfig(**given | {"mod_layers": self.layers()})

    @property
    def trains(self) -> str:
        """``routers``, ``lora`` (routers and adapters) or ``full``."""
        return "lora" if self.lora else "routers" if self.router_only else "full"

    @property
    def trained_parts(self) -> str:
        """The same, and skip paths, for a person to read."""
        base = {"routers": "routers", "lora": "routers and LoRA", "full": "all weights"}[self.trains]
        return base + " and skip paths" * self.train_skip

    def problems(self) -> list[str]:
        """What is wrong with these values, one line each."""
        found = []
        try:
            self.layers()
        except ValueError:
            found.append(f"--mod_layers {self.mod_layers}: write auto, or 4,6,8, or by part attn:4,6+mlp:7,8")
        for name in "granularity threshold router_pooling kv_policy skip skip_rank target_capacity".split():
            try:
                ModConfig(**{name: getattr(self, name)})
            except ValueError as error:
                found.append(f"--{error}")
        if self.mod_layers == "auto" and "expert" in self.granularity:
            found.append(f"--mod_layers auto chooses attention, MLPs or blocks, not {self.granularity}: list layers")
        if self.train_skip and self.skip == "zero":
            found.append("--train_skip trains skip paths and --skip zero leaves nothing: give --skip low_rank or mean")
        if self.lora and not self.router_only:
            found.append("--lora trains adapters on a frozen base and --router_only False trains the base: give one")
        if not 0 <= self.lora_dropout < 1:
            found.append(f"--lora_dropout {self.lora_dropout} must lie in [0, 1)")
        return found


def layers_text(layers: Mapping[str, list[int]]) -> str:
    """Layers by part as ``--mod_layers`` takes them: ``attn:4,6+mlp:7,8``; of all parts under the name ``""``."""
    return "+".join(f"{part}:{','.join(map(str, layers[part]))}".lstrip(":") for part in layers)


@dataclass
class DataArguments:
    """Which conversations train."""

    _argument_group_name = "Data"

    data_type: str = HfArg(default="alpaca", help="a set under data/reformatted, or mixed")
    train_file: str | None = HfArg(default=None, help="JSONL file with messages; overrides data_type")
    max_train_samples: int = HfArg(default=1000, help="the first N rows; 0: all")
    max_seq_length: int = HfArg(default=2048, help="tokens; longer conversations are cut")
    chat_template: str = HfArg(
        default="auto",
        help="own (the tokenizer's), published, auto: own where there is one",
        metadata={"nargs": "?", "const": "own"},
    )
    preprocessing_num_workers: int | None = HfArg(default=None, help="processes that encode the data")
    length_grouping: bool = HfArg(default=True, help="micro-batches of like lengths within a step")

    def __post_init__(self) -> None:
        # The published argument was a boolean.
        self.chat_template = {"true": "own", "false": "published"}.get(self.chat_template.lower(), self.chat_template)

    def problems(self) -> list[str]:
        """What is wrong with these values, one line each."""
        found = []
        if self.train_file and Path(self.train_file).suffix not in (".json", ".jsonl"):
            found.append(f"--train_file {self.train_file}: a .jsonl file with one conversation per line is needed")
        if self.chat_template not in TEMPLATES:
            found.append(f"--chat_template {self.chat_template} is none of {', '.join(TEMPLATES)}")
        return found

    @property
    def path(self) -> Path:
        """The JSONL file."""
        if self.train_file:
            return Path(self.train_file)
        folder = "mixed" if self.data_type == "mixed" else f"reformatted/{self.data_type}"
        return ROOT / "data" / folder / "data.jsonl"

    @property
    def name(self) -> str:
        """Short name of the data, for the output folder."""
        return Path(self.train_file).stem if self.train_file else self.data_type


@dataclass
class TuningArguments(TrainingArguments):
    """TrainingArguments with the published recipe as defaults.

    ``gradient_accumulation_steps`` follows from the global batch, the micro-batch and the number of processes, so the
    number of processes never changes what is learnt. Raises :class:`UserError` if the three do not fit.
    """

    _argument_group_name = "Training"
    output_dir: str | None = HfArg(default=None, help="default: trained_models/<base>/<data>/<knobs>")
    overwrite_output_dir: bool = HfArg(default=False, help="delete what an earlier run left there")
    resume_from_checkpoint: str | None = HfArg(default=None, help="auto (the newest whole one, if any) or a folder")
    global_batch_size: int = HfArg(default=64, help="sequences per optimizer step, over all processes")
    per_device_train_batch_size: int = HfArg(default=4, help="sequences per forward pass of a process")
    gradient_accumulation_steps: int | None = HfArg(default=None, help="default: from --global_batch_size")
    num_train_epochs: float = HfArg(default=1.0, help="passes over the data")
    learning_rate: float = HfArg(default=1e-5, help="peak")
    lr_scheduler_type: str = HfArg(default="cosine", help="shape of the learning rate")
    warmup_steps: float = HfArg(default=0.03, help="warm-up; below 1: share of all steps")
    logging_steps: float = HfArg(default=1, help="optimizer steps between two log lines")
    save_steps: float = HfArg(default=10, help="optimizer steps between two checkpoints")
    save_total_limit: int | None = HfArg(default=2, help="checkpoints kept")
    report_to: str = HfArg(default="tensorboard", help="tensorboard, wandb, none, …")
    remove_unused_columns: bool = HfArg(default=False, help="Trainer's; the data has no other columns")
    dry_run: bool = HfArg(default=False, help="print sizes, memory and steps; load no weights")
    num_processes: int | None = HfArg(default=None, help="with --dry_run or --check_inputs: to plan for")
    check_inputs: bool = HfArg(default=False, help="check arguments, base and data, then stop")

    def __post_init__(self) -> None:
        # Each would cost a host sync per micro-batch; capacity and loss are read at logging steps.
        self.logging_nan_inf_filter = False
        world = int(os.environ.get("WORLD_SIZE", 1))
        if self.dry_run or self.check_inputs:
            world = self.num_processes or world
        elif self.num_processes not in (None, world):
            raise UserError(
                f"--num_processes {self.num_processes} plans for others with --dry_run; start them with "
                f"NUM_PROCESSES={self.num_processes} bash scripts/finetune_mod.sh"
            )
        micro = self.per_device_train_batch_size * world
        if self.gradient_accumulation_steps is None:
            if self.global_batch_size % micro:
                raise UserError(
                    f"--global_batch_size {self.global_batch_size} is no multiple of {world} processes x "
                    f"--per_device_train_batch_size {self.per_device_train_batch_size}: change one of the three"
                )
            self.gradient_accumulation_steps = self.global_batch_size // micro
        self.global_batch_size = self.gradient_accumulation_steps * micro
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False
        for name, value in settings_without_gpu().items():
            setattr(self, name, value)
        super().__post_init__()
        # One process drives one device; several GPUs in one process would mean nn.DataParallel.
        self._n_gpu = min(self.n_gpu, 1)

    def problems(self) -> list[str]:
        """What is wrong with these values, one line each."""
        found = [
            f"--{name} {getattr(given, 'value', given)}: {why}"
            for name, why in _NOT_FOR_TUNING.items()
            if (given := getattr(self, name)) != DEFAULTS[name]
        ]
        if self.save_strategy == "best":
            found.append(f"--save_strategy best: {_NOT_FOR_TUNING['eval_strategy']}")
        if self.label_smoothing_factor >= 1:
            found.append(f"--label_smoothing_factor {self.label_smoothing_factor} must lie in [0, 1)")
        if (self.activation_checkpointing_kwargs or {}).get("use_reentrant"):
            found.append("--gradient_checkpointing_kwargs use_reentrant: routers would get no gradient; leave it out")
        if self.deepspeed and "RANK" not in os.environ and not self.dry_run:
            found.append(
                "--deepspeed needs a launcher: CONFIG_FILE=configs/accelerate/deepspeed_zero2.yaml "
                "bash scripts/finetune_mod.sh, or torchrun"
            )
        config = self.deepspeed_plugin.hf_ds_config.config if self.deepspeed_plugin else {}
        if own := [section for section in ("optimizer", "scheduler") if section in config]:
            found.append(
                f"{' and '.join(own)} of the DeepSpeed config would replace the command line's: leave them out"
            )
        return found


_NOT_FOR_TUNING = dict.fromkeys(
    ("eval_strategy", "eval_on_start", "load_best_model_at_end"),
    "tuning has no evaluation set; score the result with entrypoints/evaluate",
) | {
    "ignore_data_skip": "a resumed run would learn from rows that it has seen, not from the others",
    "auto_find_batch_size": "what a step learns would change; set --per_device_train_batch_size",
    "push_to_hub": "export the run first, then upload the export",
    "data_seed": "--seed draws the rows of a step, too",
    "train_sampling_strategy": "--seed draws the rows of a step, and --length_grouping orders them within it",
}
"""What a Trainer can do and a run of routers cannot."""
PARTS = (ModelArguments, RoutingArguments, BudgetArguments, DataArguments, TuningArguments)
DEFAULTS: dict[str, Any] = {
    f.name: f.default if f.default_factory is MISSING else f.default_factory() for part in PARTS for f in fields(part)
}
"""Value of every argument that is not given."""

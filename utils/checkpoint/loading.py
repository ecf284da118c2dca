"""Loading what is to be measured or asked: the dense base, the same base with routers, an export."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from router_tuning.bases.description import dense_config
from router_tuning.bases.shards import tensor_names, weight_map
from router_tuning.checkpoint.exporting import check_adapter, fitted
from router_tuning.errors import UserError
from router_tuning.files import read_json
from router_tuning.model import is_routed, load_routers, routed_modules, set_thresholds
from router_tuning.model.configuration_mod import GUARD
from router_tuning.model.saving import WEIGHTS_NAME, read_router_config, thresholds_for
from router_tuning.tuning.encoding import load_tokenizer
from router_tuning.tuning.run_folder import ADAPTER, MODEL, base_of, tokenizer_of


class Opened(NamedTuple):
    """A model with its tokenizer, and the folders of its weights and of its routers."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    base: Path
    routers: Path


AXES = {"capacity": "the routed work", "flops": "the decoder's operations"}
"""What a dial is turned to a share of, by the name of the argument."""


def add_arguments(
    parser: argparse.ArgumentParser, export: bool = False, dial: Sequence[str] = ("capacity", "flops")
) -> None:
    """``--run --base --dtype`` of a command, ``--model`` where an export will do, too, and one or none of ``dial``."""
    parser.add_argument("--run", type=Path, required=not export, help="folder of the tuning run")
    parser.add_argument("--base", type=Path, help="folder of its base (default: the one the run names)")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    if export:
        parser.add_argument("--model", type=Path, help="an export instead of a run")
    turn = parser.add_mutually_exclusive_group() if dial else parser
    for axis in dial:
        turn.add_argument(f"--{axis}", type=float, help=f"turn the stored dial to this share of {AXES[axis]}")


def opened(args: argparse.Namespace, **budget: float | None) -> Opened:
    """What the arguments of :func:`add_arguments` name, the stored dial turned to ``--capacity`` where it is given.

    Args:
        budget: ``capacity`` or ``flops`` of :func:`load_tuned`, in place of ``--capacity``.

    Raises:
        UserError: where neither or both of a run and an export are named, or nothing is there that can be loaded.
    """
    budget = {"capacity": getattr(args, "capacity", None), **budget}
    export = getattr(args, "model", None)
    if (args.run is None) == (export is None):
        raise UserError("name one model: --run (a tuning run) or --model (an export)")
    if export is not None:
        folder, model = weights_folder(export), load_export(export, args.dtype)
        return Opened(_turned(model, folder, **budget), load_tokenizer(folder), folder, folder)
    if not args.run.is_dir():
        raise UserError(f"--run {args.run} is no folder; name the output folder of a tuning run")
    base = base_of(args.run, args.base)
    return Opened(load_tuned(base, args.run, args.dtype, **budget), tokenizer_of(args.run, base), base, args.run)


def load_dense(base: Path, dtype: str = "auto") -> PreTrainedModel:
    """The base as its plain family, in evaluation mode, whatever routing fields its configuration carries.

    Raises:
        UserError: for a folder without a configuration or safetensors weights.
    """
    config = dense_config(base)
    weight_map(base)
    model = AutoModelForCausalLM.from_pretrained(base, config=config, dtype=precision(dtype), use_safetensors=True)
    return model.to(default_device()).eval()


def load_tuned(
    base: Path, run: Path, dtype: str = "auto", capacity: float | None = None, flops: float | None = None
) -> PreTrainedModel:
    """What a run trained, in evaluation mode: routers on the base, with LoRA where the run has an ``adapter``, or the
    run's own weights where it trained all of them.

    Args:
        capacity: turns the dial that the run stored to this share of the routed modules; flops: instead, to this share
            of the decoder's operations.
    """
    if (run / MODEL).is_dir():
        model = load_export(run / MODEL, dtype)
        set_thresholds(model, read_router_config(run)["mod_threshold"])  # calibration moves those of the run alone
        return _turned(model, run, capacity, flops)
    model = load_routers(load_dense(base, dtype), run, capacity=capacity, flops=flops)
    return with_lora(model, run / ADAPTER) if (run / ADAPTER).is_dir() else model.eval()


def _turned(
    model: PreTrainedModel, folder: Path, capacity: float | None = None, flops: float | None = None
) -> PreTrainedModel:
    """The model with the dial that is stored in ``folder`` turned, where a budget is given."""
    budget, axis = (capacity, "capacity") if flops is None else (flops, "flops")
    if budget is not None:
        set_thresholds(model, thresholds_for(read_router_config(folder), budget, folder, axis))
    return model


def load_export(folder: Path, dtype: str = "auto") -> PreTrainedModel:
    """An export (full, merged or peft form) in evaluation mode, with this repository's code, never the folder's own.

    Raises:
        UserError: for what ``weight_map`` refuses, routers that do not fit the weights beside them, values that are
            not finite, or a checkpoint without routing.
    """
    if (base := weights_folder(folder)) != folder:
        return with_lora(load_export(base, dtype), folder)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is no checkpoint folder; export a run first")
    files = weight_map(folder)
    if (folder / WEIGHTS_NAME).is_file():
        fitted(folder, folder)
        if unnamed := [key for key in tensor_names(folder / WEIGHTS_NAME) if key not in files]:
            raise UserError(f"{folder}: the weight index leaves out {', '.join(unnamed)[:300]}; export it anew")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=precision(dtype), use_safetensors=True)
    if not is_routed(model):
        raise UserError(f"{folder} is not routed: its config names no mod_layers")
    _check_finite(model, folder)
    return model.to(default_device()).eval()


def is_export(folder: Path) -> bool:
    """Whether a folder's configuration is that of an export; false where there is none."""
    path = weights_folder(folder) / "config.json"
    return path.is_file() and GUARD in read_json(path)


def weights_folder(export: Path) -> Path:
    """Where an export keeps configuration, tokenizer and routers: ``base/`` in the peft form, else its own folder."""
    peft = (export / "adapter_config.json").is_file() and (export / "base").is_dir()
    return export / "base" if peft else export


def with_lora(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The routed model with the LoRA adapter, and the routers, of a peft folder; :class:`UserError` if damaged."""
    check_adapter(folder)
    try:
        model = PeftModel.from_pretrained(model, folder).get_base_model()
    except (RuntimeError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{folder}: the adapter does not fit this base ({reason})") from None
    _check_finite(model, folder)
    return model.eval()


def _check_finite(model: PreTrainedModel, folder: Path) -> None:
    for name, module in routed_modules(model).items():
        for weight in module.mod_router.parameters():
            if not bool(torch.isfinite(weight).all()):
                raise UserError(f"{folder}: the router {name} holds values that are not finite; export it anew")


def precision(name: str) -> torch.dtype | str:
    """``auto`` or a torch dtype by its name."""
    if name == "auto":
        return name
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise UserError(f"--dtype {name} is none of auto, float32, bfloat16, float16")
    return dtype


def default_device() -> str:
    """This process's GPU among those launched together, the first one for a single process, or the CPU."""
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"

"""The plan of a run, printed before anything is loaded: what is routed, what trains, how many steps, what memory."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM

from router_tuning.bases.description import dense_config
from router_tuning.errors import UserError
from router_tuning.model import route
from router_tuning.tuning.command.command_line import Command
from router_tuning.tuning.run import steps_of
from router_tuning.tuning.tuning_data import check_file
from router_tuning.tuning.tuning_model import locate_base, mark_trainable, routing_of

_PER_TRAINED = 12
"""Bytes that a float32 parameter takes beside itself where it trains: its gradient and AdamW's two moments."""


def dry_run(command: Command) -> str:
    """The plan as text; needs the base's ``config.json`` alone. UserError for routing or data that do not fit."""
    base = locate_base(command.model, weights=False)
    config = dense_config(base, command.model.trust_remote_code)
    routing, micro = command.routing, command.training.per_device_train_batch_size
    routed = routing_of(config, routing)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, command.model.dtype))
        try:
            model = mark_trainable(route(model, **vars(routed)), routing)
        except ValueError as error:
            raise UserError(str(error)) from None
    total = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    layers = (
        routed.mod_layers or f"the deepest {routed.mod_n} of {config.get_text_config().num_hidden_layers} but the last"
    )
    lines = [
        f"base         {command.model.name}: {total / 1e9:.3f} B parameters in {command.model.dtype}",
        f"routing      {routing.granularity} on {layers}",
        f"trains       {routing.trained_parts}: {trained:,} parameters, {trained / total:.2%} of all",
        f"steps        {_steps(command)}",
        f"micro-batch  {micro} sequences of at most {command.data.max_seq_length} tokens",
        f"memory       {weights / 1e9:.1f} GB of weights, {_PER_TRAINED * trained / 1e9:.1f} GB of gradients and "
        "moments, before an engine spreads them; a micro-batch's activations beside",
    ]
    return "\n".join(lines)


def _steps(command: Command) -> str:
    data, training = command.data, command.training
    there = data.path.is_file() or not data.max_train_samples
    rows = check_file(data.path, data.max_train_samples).rows if there else data.max_train_samples
    told = f"{steps_of(training, rows)} of {training.global_batch_size} sequences, from {rows:,} rows of {data.path}"
    return told if there else f"{told}, which is not there yet"

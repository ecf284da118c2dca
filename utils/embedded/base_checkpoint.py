"""The folder of the embedded base: weights, configuration with routing fields, tokenizer, log."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from transformers import GenerationConfig, PreTrainedModel

from router_tuning.embedded.base_training import build_tokenizer
from router_tuning.files import publish, read_json, scratch_folder

ROUTING_FIELDS = {
    "mod_layers": [5, 6, 7, 8, 9, 10],
    "mod_granularity": "attn_sequence",
    "mod_threshold": 0.5,
    "mod_router_pooling": "sequence",
    "mod_kv_policy": "keep",
}
"""The deepest six of twelve layers except the last."""


def write_checkpoint(folder: Path, model: PreTrainedModel, log: list[dict], arguments: Mapping[str, object]) -> None:
    """Write model, tokenizer and ``training_log.json`` into ``folder``; the model card is kept.

    The weights keep plain names and hold no routers: routers start from zero, which is what a missing key means. A
    Llama's configuration names its routing. Every file is complete before the first one is moved into place.
    """
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=64, pad_token_id=0, eos_token_id=2)
    model.config.use_cache = True
    if hasattr(model.config, "output_router_logits"):
        model.config.output_router_logits = False  # for a loss of training alone
    with scratch_folder(folder) as staged:
        model.save_pretrained(staged)
        build_tokenizer().save_pretrained(staged)
        config = read_json(staged / "config.json")
        routing = ROUTING_FIELDS if config["model_type"] == "llama" else {}
        (staged / "config.json").write_text(json.dumps(config | routing, indent=2, sort_keys=True) + "\n")
        losses = [{key: row[key] for key in ("step", "loss", "learning_rate")} for row in log if "loss" in row]
        record = {"arguments": arguments, "log": losses}
        (staged / "training_log.json").write_text(json.dumps(record, indent=1) + "\n")
        for path in sorted(staged.iterdir()):
            with publish(folder / path.name) as draft:
                path.replace(draft)

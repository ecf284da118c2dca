"""The folder of the embedded base: weights, configuration with routing fields, tokenizer, log."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from router_tuning.files import write_text

ROUTING_FIELDS = {
    "mod_layers": [5, 6, 7, 8, 9, 10],
    "mod_granularity": "attn_sequence",
    "mod_threshold": 0.5,
    "mod_router_pooling": "sequence",
    "mod_kv_policy": "keep",
}
"""The deepest six of twelve layers except the last."""

CALL_STATE = ("is_local", "local_files_only", "max_length", "stride", "truncation_side", "truncation_strategy")
"""What a tokenizer remembers of how it was loaded and called, which is no property of the checkpoint."""


def write_checkpoint(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    log: list[dict],
    arguments: Mapping[str, object],
) -> None:
    """Write model, tokenizer and ``training_log.json`` into ``folder``; the model card is kept.

    The weights keep plain names and hold no routers: routers start from zero, which is what a missing key means. A
    Llama's configuration names its routed class. Every file is complete before the first one is moved into place.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as name:
        staged = Path(name)
        model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=64, pad_token_id=0, eos_token_id=2)
        model.config.use_cache = True
        if hasattr(model.config, "output_router_logits"):
            model.config.output_router_logits = False  # for a loss of training alone
        model.save_pretrained(staged)
        for key in CALL_STATE:
            tokenizer.init_kwargs.pop(key, None)
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
        tokenizer.save_pretrained(staged)
        config = json.loads((staged / "config.json").read_text(encoding="utf-8"))
        if config["model_type"] == "llama":
            config |= ROUTING_FIELDS
        write_text(staged / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
        losses = [{key: row[key] for key in ("step", "loss", "learning_rate")} for row in log if "loss" in row]
        record = {
            "arguments": {key: value for key, value in arguments.items() if isinstance(value, (int, float, bool))},
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "log": losses,
        }
        write_text(staged / "training_log.json", json.dumps(record, indent=1) + "\n")
        for path in sorted(staged.iterdir()):
            path.chmod(0o644)
            shutil.move(path, folder / path.name)

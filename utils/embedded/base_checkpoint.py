"""The folder of the embedded base: weights, configuration with routing fields, tokenizer, log, model card."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from router_tuning.errors import UserError
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
CARD_START, CARD_END = "<!-- results: written by train_tiny_base.py -->", "<!-- end of results -->"


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
            config |= {"model_type": "llama_mod", "architectures": ["LlamaModForCausalLM"], **ROUTING_FIELDS}
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


def read_checkpoint(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The dense base and its tokenizer. Raises :class:`UserError` if the folder holds no weights."""
    if not (folder / "model.safetensors").is_file():
        raise UserError(f"no model.safetensors in {folder}; train it with entrypoints/checkpoint/train_tiny_base.py")
    fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kind = fields.pop("model_type").removesuffix("_mod")
    config = AutoConfig.for_model(kind, **{key: v for key, v in fields.items() if not key.startswith("mod_")})
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, use_safetensors=True)
    return model, AutoTokenizer.from_pretrained(folder, config=model.config)


def results_table(scores: Mapping[str, Mapping[str, float]], items: int) -> str:
    """Markdown table of :func:`~router_tuning.embedded.base_scoring.score_tasks`, best task first."""
    matches = dict(scores["exact_match"])
    average = matches.pop("average")
    perplexities = scores["perplexity"]
    ranked = sorted(matches.items(), key=lambda pair: -pair[1])
    good = sum(share >= 0.95 for share in matches.values())
    lines = [f"Held-out items per task: at most {items}. Greedy generation, exact match of the whole answer.", ""]
    lines += ["| task | exact match |", "|---|---|"]
    lines += [f"| {task} | {share:.3f} |" for task, share in ranked]
    lines += [f"| **average of {len(matches)} tasks** | **{average:.3f}** |", ""]
    lines += [f"{good} of {len(matches)} tasks reach 0.95."]
    lines += [f"Perplexity of bare {task} text, per token: {value:.2f}." for task, value in perplexities.items()]
    return "\n".join(lines)


def write_card(folder: Path, scores: Mapping[str, Mapping[str, float]], items: int) -> None:
    """Write ``eval_results.json``, and the same into ``README.md``, between its markers or at its end."""
    results = {"items_per_task": items, **scores}
    write_text(folder / "eval_results.json", json.dumps(results, indent=2) + "\n")
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else f"# {folder.name}\n"
    before, marker, rest = text.partition(CARD_START)
    after = rest.partition(CARD_END)[2] if marker else "\n"
    block = f"{CARD_START}\n{results_table(scores, items)}\n{CARD_END}"
    write_text(card, f"{before}{block}{after}" if marker else f"{before}\n{block}{after}")

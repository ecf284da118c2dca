"""The model card of an export, written from what the run recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from utils.checkpoint.run_folder import read_run
from utils.model.saving import read_router_config

KNOBS = (
    "recipe",
    "learning_rate",
    "num_train_epochs",
    "max_train_samples",
    "max_seq_length",
    "global_batch_size",
    "weight_decay",
    "target_capacity",
    "gradient_scale",
    "router_only",
    "seed",
)


def model_card(run: Path, base: Path, scores: str | None = None) -> str:
    """Markdown with YAML front matter: base, data, recipe, capacity, scores and the command that rebuilds them.

    ``scores`` is Markdown of a measured comparison. Facts that the run did not record are left out, never guessed.
    """
    record, routing = read_run(run), read_router_config(run)
    arguments = record.get("arguments", {})
    name = (routing.get("base") or {}).get("name_or_path") or base.name
    parts = [_front_matter(name), f"# {name} with Router-Tuning", _method(name, routing)]
    facts = _facts(record, arguments)
    if facts:
        parts += ["## Training", facts]
    if scores:
        parts += ["## Scores", scores]
    parts += ["## Use", _usage()]
    return "\n\n".join(parts) + "\n"


def _front_matter(name: str) -> str:
    lines = ["library_name: transformers", "pipeline_tag: text-generation", f"base_model: {name}"]
    return "\n".join(["---", *lines, "tags: [mixture-of-depths, router-tuning, dynamic-depth]", "---"])


def _method(name: str, routing: dict[str, Any]) -> str:
    layers = ", ".join(map(str, routing["mod_layers"]))
    return (
        f"The weights are those of `{name}`, unchanged. Routers on layers {layers} "
        f"(`{routing['mod_granularity']}`, pooling `{routing['mod_router_pooling']}`) decide per input which modules "
        "run; what they skip is not computed and stores no key or value."
    )


def _facts(record: dict[str, Any], arguments: dict[str, Any]) -> str:
    rows = [f"| {key} | {arguments[key]} |" for key in KNOBS if arguments.get(key) is not None]
    data = record.get("data")
    if isinstance(data, dict):
        rows += [f"| data {key} | {value} |" for key, value in data.items() if isinstance(value, (str, int, float))]
    if isinstance(record.get("git_commit"), str):
        rows.append(f"| commit | {record['git_commit']} |")
    table = "\n".join(["| | |", "|---|---|", *rows]) if rows else ""
    command = record.get("command")
    text = " ".join(command) if isinstance(command, list) else command
    return "\n\n".join(part for part in (table, f"```bash\n{text}\n```" if text else "") if part)


def _usage() -> str:
    return (
        "```python\nfrom transformers import AutoModelForCausalLM\n\n"
        'model = AutoModelForCausalLM.from_pretrained("PATH", trust_remote_code=True)\n```\n\n'
        "```bash\nlm_eval --model hf --model_args pretrained=PATH,trust_remote_code=True --tasks ...\n```"
    )

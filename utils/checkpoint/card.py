"""The model card of an export, written from what the run recorded."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from router_tuning.model.saving import read_router_config
from router_tuning.tuning.command.command_line import settings_file
from router_tuning.tuning.run_folder import read_run, trained

KNOBS = (
    "recipe chat_template learning_rate num_train_epochs max_train_samples max_seq_length global_batch_size "
    "weight_decay target_capacity gradient_scale router_only seed"
).split()
USAGE = {
    "adapter": (
        "```python\nfrom router_tuning.model import load_routers  # the Router-Tuning repository\n\n"
        'model = load_routers(AutoModelForCausalLM.from_pretrained("BASE"), "PATH")\n```'
    ),
    "peft": (
        "```python\nfrom peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
        'base = AutoModelForCausalLM.from_pretrained("PATH/base", trust_remote_code=True)\n'
        'model = PeftModel.from_pretrained(base, "PATH")\n```\n\n'
        "```bash\nlm_eval --model hf --tasks ... "
        "--model_args pretrained=PATH/base,peft=PATH,trust_remote_code=True\n```"
    ),
    "full": (
        "```python\nfrom transformers import AutoModelForCausalLM\n\n"
        'model = AutoModelForCausalLM.from_pretrained("PATH", trust_remote_code=True)\n```\n\n'
        "```bash\nlm_eval --model hf --model_args pretrained=PATH,trust_remote_code=True --tasks ...\n```"
    ),
}
USAGE["merged"] = USAGE["full"]


def model_card(run: Path, form: str = "full", scores: str | None = None) -> str:
    """Markdown with YAML front matter: base, data, recipe, capacity, scores and the settings that repeat the run.

    ``scores`` is Markdown of a measured comparison. Facts that the run did not record are left out, never guessed.
    """
    record, routing = read_run(run), read_router_config(run)
    arguments = record.get("arguments", {})
    name = arguments.get("model_name_or_path") or (routing.get("base") or {}).get("name_or_path") or "its base"
    name = Path(name).name if name.startswith(("/", ".")) else name
    parts = [
        front_matter(name, "peft" if form == "peft" else "transformers"),
        f"# {name} with Router-Tuning",
        _method(name, routing, trained(run)),
    ]
    parts += training_facts(record)
    if scores:
        parts += ["## Scores", scores]
    parts += ["## Use", USAGE[form]]
    return "\n\n".join(parts) + "\n"


def front_matter(base: str, library: str = "transformers") -> str:
    """YAML at the head of a card; a base is named where the hub knows it."""
    lines = [f"library_name: {library}", "pipeline_tag: text-generation"]
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", base):
        lines.append(f"base_model: {base}")
    return "\n".join(["---", *lines, "tags: [mixture-of-depths, router-tuning, dynamic-depth]", "---"])


def _method(name: str, routing: dict[str, Any], what: str) -> str:
    weights = {"routers": "unchanged", "routers and LoRA": "with LoRA adapters that were tuned with the routers"}
    listed = routing["mod_layers"]
    listed = listed if isinstance(listed, dict) else {"": listed}
    layers = "; ".join(f"{part} {', '.join(map(str, layers))}".strip() for part, layers in listed.items())
    skip = routing.get("mod_skip", "zero")
    instead = {"mean": "its mean output", "low_rank": f"a fitted map of rank {routing.get('mod_skip_rank')}"}
    return (
        f"The weights are those of `{name}`, {weights.get(what, 'all tuned further')}. Routers on layers {layers} "
        f"(`{routing['mod_granularity']}`, pooling `{routing['mod_router_pooling']}`) decide per input which modules "
        f"run; what they skip is not computed" + (f": {instead[skip]} takes its place." if skip in instead else ".")
    )


def training_facts(record: dict[str, Any]) -> list[str]:
    """Heading, table and command of the recorded run; empty where it recorded nothing."""
    arguments = record.get("arguments", {})
    rows = [f"| {key} | {arguments[key]} |" for key in KNOBS if arguments.get(key) is not None]
    data = record.get("data") or {}
    if data:
        rows.append(
            f"| data | {Path(data['path']).parent.name}, {data['rows']} rows, sha256 `{data['sha256'][:16]}` |"
        )
    rows += [f"| {key} | {record[key]} |" for key in ("steps", "reached_capacity", "git_commit") if record.get(key)]
    if not rows:
        return []
    again = ["`RUN=run.yaml bash scripts/finetune_mod.sh` repeats it, with this `run.yaml`:"] if arguments else []
    again += [f"```yaml\n{settings_file(arguments)}```"] if arguments else []
    return ["## Training", "\n".join(["| | |", "|---|---|", *rows]), *again]

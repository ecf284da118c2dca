"""Tables of README.md and docs/: each block between its markers is rendered from committed JSON alone."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from router_tuning.embedded.base_checkpoint import results_table
from router_tuning.evaluation.report import summary_table
from router_tuning.evaluation.results import cost_table
from router_tuning.evaluation.tables import Table
from router_tuning.speed.cells import measured, read_rows
from router_tuning.speed.limits import limits_table
from router_tuning.speed.table import gpu_tables, speed_table

ROOT = Path(__file__).resolve().parents[2]


def _json(path: str) -> Any:
    return json.loads((ROOT / path).read_text())


def _text(path: str) -> str:
    return (ROOT / path).read_text().strip()


def base_block() -> str:
    """Held-out scores of the embedded base."""
    scores = _json("ckpt/tiny-llama-mod/eval_results.json")
    table = results_table(scores, scores["items_per_task"])
    command = "`python entrypoints/checkpoint/train_tiny_base.py --eval_only`"
    return f"{table}\n\nFrom `ckpt/tiny-llama-mod/eval_results.json`, by\n{command}."


def quickstart_block() -> str:
    """What the quickstart prints, from the comparison that it saved."""
    comparison = _json("figures/quickstart.json")
    return (
        "What it measured on two CPU cores (`figures/quickstart.json`; the run writes its own as\n"
        "`trained_models/tiny-llama-mod/quickstart/evaluation/comparison.json`):\n\n"
        f"{summary_table(comparison).markdown()}\n\n{cost_table(comparison).markdown()}"
    )


def speed_block(name: str = "benchmark_speed_cpu") -> str:
    """The speed benchmark on two CPU cores."""
    rows = read_rows(ROOT / "figures" / f"{name}.jsonl")
    about = rows[0]["run"]
    return f"{about['device']}, {about['date'][:10]}:\n\n{speed_table(rows).markdown()}\n\n`{about['command']}`"


def limits_block() -> str:
    """Speed-up limits of Llama-3-8B on a GPU."""
    result = _json("figures/speed_limits.json")
    accelerator = result["accelerator"]
    return (
        f"{accelerator['name']}, {accelerator['operations'] / 1e12:.0f} TFLOP/s and "
        f"{accelerator['bandwidth'] / 1e12:.2f} TB/s by its data sheet:\n\n"
        f"{limits_table(result['rows'], 'llama3-8b').markdown()}\n\n`{result['command']}`"
    )


def gpu_block(journal: Path = ROOT / "figures" / "gpu_speed.jsonl") -> str:
    """What was measured on a GPU, if it was."""
    rows = read_rows(journal)
    abouts = [row["run"] for row in rows if "run" in row]
    if not abouts:
        return "**Not measured yet**: no GPU was at hand."
    lines = [
        f"{about['device']}, {about['date'][:10]}, commit {about['git_commit']}, {about['shape']}: "
        f"{about['ceilings']['operations'] / 1e12:.0f} TFLOP/s, {about['ceilings']['bandwidth'] / 1e12:.2f} TB/s"
        for about in abouts
    ]
    failed = [f"{row['cell']}: {row['failed']}" for row in rows if "failed" in row]
    tables = [table.markdown() for table in gpu_tables(measured(rows)).values()]
    return "\n\n".join([*lines, *tables, *failed])


def training_block() -> str:
    """What a tuning step costs beside full tuning, and beside gradients through every layer."""
    found = _json("figures/training_cost.json")
    names = {"routers": "routers", "forced": "routers, gradients forced through every layer", "full": "everything"}
    rows = [[text, found[mode]["seconds"], found[mode]["step_bytes"] / 1e6] for mode, text in names.items()]
    shape, ratio = found["shape"], found["routers_to_full"]
    return (
        f"{shape['routed']} of {shape['layers']} layers routed, {shape['granularity']}, batch "
        f"{shape['batch'][0]} × {shape['batch'][1]} tokens; the three take turns in one process:\n\n"
        f"{Table(['what trains', 'seconds per step', 'MB held'], rows).markdown()}\n\n"
        f"Router-tuning takes {ratio['time']:.2f} of the time and {ratio['step']:.2f} of the memory of full tuning. "
        f"`{found['command']}`"
    )


def kills_block() -> str:
    """How often a killed run ended as an undisturbed one."""
    found = _json("figures/kill_and_resume.json")
    engines = ", ".join(sorted({record["engine"] for record in found["records"]}))
    kills, same = found["kills"], found["same_bits_at_the_end"]
    return (
        f"{kills} SIGKILLs at random moments, of one process or of all, under {engines} on\n"
        f"{found['processes']} processes: {same} of {kills} resumed runs end with the bits of an undisturbed run.\n"
        f"`{found['command']}`"
    )


def science_block() -> str:
    """The experiment's own summary."""
    table = _text("figures/main_results.md")
    seeds = ", ".join(map(str, _json("figures/main_results.json")["seeds"]))
    return (
        f"Recipe `budget` at a requested share of the routed work (six of twelve layers), mean ± deviation of seeds\n"
        f"{seeds}, 64 held-out items of each of twelve tasks, exact match of greedy generation. *Of prompt* and *of\n"
        "answer*: the shares executed on their tokens (token level). *Random*, *static* (best fixed mask of a search\n"
        "on other inputs) and *oracle* (best mask and budget per task, chosen on the same inputs) stand at the same\n"
        "budget; *recovered* is the share of the way from static to oracle. All runs pool over the prompt.\n\n"
        f"{table}\n\n"
        "![One training, any budget](figures/main_dial.svg)\n\n"
        "One JSON per cell in `figures/experiments/main`; what is missing is run, and the tables are built, by\n"
        "`python entrypoints/analysis/experiments.py configs/experiments/main.yaml`."
    )


def lora_block() -> str:
    """LoRA alone, with routers, and routers alone."""
    return (
        f"{_text('figures/main_lora_rt.md')}\n\n"
        "From `figures/main_lora_rt.json`, by the same command; the last row is the recipe `budget` turned to the\n"
        "capacity that the published one reaches."
    )


def experts_block() -> str:
    """A router per expert on the small mixture of experts."""
    scores, _ = _text("figures/moe_results.md").split("\n\nWhich inputs")
    return (
        f"{scores}\n\n"
        "[Tokens executed of tokens assigned, by layer and expert](figures/moe_expert_rt.md). From\n"
        "`figures/moe_results.json`; the base is not in this repository, these commands train and route it:\n"
        "`python entrypoints/checkpoint/train_tiny_base.py --num_experts 4 --max_steps 4500 --curriculum_at 1600`,\n"
        "`python entrypoints/analysis/experiments.py configs/experiments/moe.yaml`."
    )


BLOCKS: dict[str, Callable[[], str]] = {
    "quickstart": quickstart_block,
    "base": base_block,
    "speed": speed_block,
    "speed_attn_token": lambda: speed_block("benchmark_speed_attn_token_cpu"),
    "limits": limits_block,
    "gpu": gpu_block,
    "training": training_block,
    "kills": kills_block,
    "science": science_block,
    "lora": lora_block,
    "experts": experts_block,
}


def render(text: str) -> str:
    """``text`` with every block between ``<!-- begin:NAME -->`` and ``<!-- end:NAME -->`` rendered anew.

    Raises:
        ValueError: for a block that nothing renders, or a missing end marker.
    """
    for name in re.findall(r"<!-- begin:(\w+) -->", text):
        if name not in BLOCKS:
            raise ValueError(f"nothing renders the block {name!r}; known: {', '.join(BLOCKS)}")
        pattern = rf"(<!-- begin:{name} -->\n).*?(<!-- end:{name} -->)"
        text, count = re.subn(pattern, lambda m, n=name: f"{m[1]}{BLOCKS[n]()}\n{m[2]}", text, flags=re.DOTALL)
        if count != 1:
            raise ValueError(f"block {name!r} must stand once, with an end marker")
    return text

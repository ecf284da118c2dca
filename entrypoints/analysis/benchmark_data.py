"""Rows per second and memory of the data entrypoints on generated files, beside a plain ``json`` loop.

    python entrypoints/analysis/benchmark_data.py --gigabytes 0.2 --scratch /tmp --output figures/benchmark_data.json
Makes a JSONL file in the shape of slim_orca and a JSON array in the shape of vicuna_sharegpt, converts and mixes each,
and removes everything again. The commands take turns, and of each the fastest run counts: other work on the machine
only ever slows a run down. Times are those of the whole command, from start to exit, on the wall and of processors.
"""

from __future__ import annotations

import json
import os
import random
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from router_tuning.data.mix_plan import PUBLISHED_PORTIONS
from router_tuning.errors import UserError, at_least, cli, parser_of
from router_tuning.files import write_json
from router_tuning.places import ROOT
from router_tuning.provenance import provenance

PLAIN_LOOP = """
import json, sys
source, target, kind = sys.argv[1:]
roles = {"human": "user", "gpt": "assistant", "system": "system"}
with open(source, encoding="utf-8") as lines, open(target, "w", encoding="utf-8") as out:
    for number, row in enumerate(json.load(lines) if kind == "array" else map(json.loads, lines)):
        messages = [{"role": roles[turn["from"]], "content": turn["value"]} for turn in row["conversations"]]
        out.write(json.dumps({"dataset": "plain", "id": f"plain_{number}", "messages": messages}) + "\\n")
"""
LAUNCHER = """
import os, subprocess, sys, time
started = time.perf_counter()
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, used = os.wait4(process.pid, 0)
print([time.perf_counter() - started, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024])
sys.exit(os.waitstatus_to_exitcode(status))
"""
"""Starts a command from a small process: the system counts what the parent holds at the start as the child's peak."""

SETS = {
    "jsonl": ("slim_orca", "oo-labeled_correct.gpt4.sharegpt.jsonl"),
    "array": ("vicuna_sharegpt", "ShareGPT_V3_unfiltered_cleaned_split_no_imsorry.json"),
}


def write_raw(kind: str, path: Path, size: int) -> int:
    """Write rows of seeded words until ``size`` bytes are reached; how many."""
    draw, count, written = random.Random(233), 0, 0
    words = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(2, 9))) for _ in range(4000)]
    words += ["\n\n", '"', "ï"] * 50
    turns = [{"from": who, "value": " ".join(draw.choices(words, k=200))} for who in ("human", "gpt") * 1000]
    with path.open("w", encoding="utf-8") as out:
        out.write("" if kind == "jsonl" else "[\n")
        while written < size:
            conversation = [turns[2 * draw.randrange(1000)], turns[2 * draw.randrange(1000) + 1]]
            row = json.dumps(
                {"id": f"row_{count}", "conversations": conversation}, indent=2 if kind == "array" else None
            )
            out.write(("" if not count else "\n" if kind == "jsonl" else ",\n") + row)
            written, count = written + len(row), count + 1
        out.write("\n" if kind == "jsonl" else "\n]\n")
    return count


def measured(command: list[object]) -> tuple[float, float, int]:
    """Seconds of a command on the wall and of processors, and the bytes that its largest process held at most."""
    launched = [sys.executable, "-I", "-S", "-c", LAUNCHER, *map(str, command)]
    done = subprocess.run(launched, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{shlex.join(launched[5:])} failed: {done.stderr[-500:]}")
    return json.loads(done.stdout)


def benchmark(kind: str, size: int, scratch: Path, repeats: int) -> dict:
    """All measurements of one kind of file."""
    name, file = SETS[kind]
    source = scratch / "raw" / name / file
    source.parent.mkdir(parents=True)
    rows = write_raw(kind, source, size)
    python, out, mixed = sys.executable, scratch / "reformatted", scratch / "mixed"
    portions = [f"{other}={int(other == name)}" for other in PUBLISHED_PORTIONS]
    reformat = ["--raw_data_root", scratch / "raw", "--datasets", name, "--save_path", out, "--workers", "1"]
    mix = ["--reformatted_dir", out, "--save_path", mixed, "--dedup", "--portion", *portions]
    commands = {
        "plain_json_loop": [python, "-c", PLAIN_LOOP, source, scratch / "plain.jsonl", kind],
        "reformat": [python, "entrypoints/data/reformat_datasets.py", *reformat],
        "mix_dedup": [python, "entrypoints/data/mix_datasets.py", *mix],
    }
    runs = {label: [] for label in commands}
    for _ in range(repeats):
        for label, command in commands.items():
            runs[label].append(measured(command))
    result = {"rows": rows, "bytes": source.stat().st_size}
    plain = min(processor for _, processor, _ in runs["plain_json_loop"])
    for label, found in runs.items():
        walls, processors, peaks = zip(*found, strict=True)
        result[label] = {
            "wall_s": round(min(walls), 3),
            "processor_s": round(min(processors), 3),
            "peak_mb": round(max(peaks) / 1e6),
            "rows_per_processor_s": round(rows / min(processors)),
            "times_plain": round(plain / min(processors), 2),
        }
    return result


def main() -> None:
    """Parse, measure, write."""
    parser = parser_of(__doc__)
    parser.add_argument("--gigabytes", type=float, default=0.2, help="of each raw file")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()), help="needs five times as much")
    parser.add_argument("--repeats", type=at_least(1), default=3, help="of each command; the fastest run counts")
    parser.add_argument("--output", type=Path, default=ROOT / "figures" / "benchmark_data.json")
    args = parser.parse_args()
    size = int(args.gigabytes * 1e9)
    if size < 1 << 20:
        raise UserError(f"--gigabytes {args.gigabytes} is too little to measure")
    args.scratch.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(args.scratch).free < 5 * size:
        raise UserError(f"--scratch {args.scratch} has less than {5 * args.gigabytes:g} GB free")
    result = {
        "command": "python entrypoints/analysis/benchmark_data.py"
        f" --gigabytes {args.gigabytes:g} --repeats {args.repeats}",
        "provenance": provenance(),
        "load_before": round(os.getloadavg()[0], 1),
    }
    for kind in SETS:
        with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
            result[kind] = benchmark(kind, size, Path(folder), args.repeats)
    write_json(args.output, result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    cli(main)

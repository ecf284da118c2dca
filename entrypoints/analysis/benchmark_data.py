"""Rows per second and memory of the data entrypoints on generated files, beside a plain ``json`` loop and the disk.

    python entrypoints/analysis/benchmark_data.py --gigabytes 2 --scratch /tmp --output figures/benchmark_data.json
Makes a JSONL file in the shape of slim_orca and a JSON array in the shape of vicuna_sharegpt, converts each with one
and with two workers, mixes the result, and removes everything again. Wall time is that of the whole command, from
start to exit, the least of some runs; processor time is given too, because it depends less on what else the machine
does. ``times_plain``: rows per second beside the plain loop's, on the wall and per second of a processor.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from router_tuning.errors import UserError, cli

ROOT = Path(__file__).resolve().parents[2]
POOL_ROWS = 2000
POLL_SECONDS = 0.05
BASELINE_SHARE = 4
"""The plain loop gets every fourth part of the rows: it holds an array of 2 GB in memory five times over."""

PLAIN_LOOP = """
import json, sys
source, target, kind = sys.argv[1:]
roles = {"human": "user", "gpt": "assistant", "system": "system"}
with open(source, encoding="utf-8") as lines, open(target, "w", encoding="utf-8") as out:
    for number, row in enumerate(json.load(lines) if kind == "array" else map(json.loads, lines)):
        messages = [{"role": roles[turn["from"]], "content": turn["value"]} for turn in row["conversations"]]
        out.write(json.dumps({"dataset": "plain", "id": f"plain_{number}", "messages": messages}) + "\\n")
"""
SETS = {
    "jsonl": ("slim_orca", "oo-labeled_correct.gpt4.sharegpt.jsonl"),
    "array": ("vicuna_sharegpt", "ShareGPT_V3_unfiltered_cleaned_split_no_imsorry.json"),
}


def pool(kind: str) -> list[str]:
    """Rows as JSON, of seeded words with line breaks, quotes and letters beyond ASCII as in the real sets."""
    draw = random.Random(233)
    words = ["".join(draw.choices("etaoinshrdlucmfwypvbgkjqxz", k=draw.randint(2, 9))) for _ in range(4000)]
    words += ["\n\n", '"so"', "x = [1];\n", "\tif"] * 50 + ["naïve", "–"] * 5

    def turn(sender: str, low: int, high: int) -> dict:
        return {"from": sender, "value": " ".join(draw.choices(words, k=draw.randint(low, high)))}

    made = []
    for number in range(POOL_ROWS):
        if kind == "jsonl":
            turns = [turn("system", 10, 30), turn("human", 20, 200), turn("gpt", 50, 300)]
            made.append(json.dumps({"conversations": [{**one, "weight": None} for one in turns]}))
        else:
            pairs = draw.randint(1, 6)
            turns = [one for _ in range(pairs) for one in (turn("human", 5, 120), turn("gpt", 50, 350))]
            made.append(json.dumps({"id": f"row_{number}", "conversations": turns}, indent=2))
    return made


def write_raw(kind: str, path: Path, size: int) -> int:
    """Write rows until ``size`` bytes are reached; how many."""
    between, count, written = ("\n", 0, 0) if kind == "jsonl" else (",\n", 0, 0)
    rows = pool(kind)
    with path.open("w", encoding="utf-8") as out:
        out.write("" if kind == "jsonl" else "[\n")
        while written < size:
            row = rows[count % len(rows)]
            out.write((between if count else "") + row)
            written += len(row)
            count += 1
        out.write("\n" if kind == "jsonl" else "\n]\n")
    return count


def measured(command: list[str], repeats: int, made: Path) -> dict:
    """The fastest of some runs of a command, with the largest memory of any; see :func:`measured_once`.

    Other work on the machine only ever slows a run down. What an earlier run ``made`` is taken away first: giving
    back the memory of a file that is replaced takes the system half a second for 2 GB.
    """
    runs = []
    for _ in range(repeats):
        if made.is_dir():
            shutil.rmtree(made)
        made.unlink(missing_ok=True)
        runs.append(measured_once(command))
    return {**min(runs, key=lambda run: run["wall_s"]), "peak_mb": max(run["peak_mb"] for run in runs)}


def measured_once(command: list[str]) -> dict:
    """Seconds of a command on the wall and of processors, and the largest memory of all its processes together."""
    before, started, peak = _processor_seconds(), time.perf_counter(), 0
    with tempfile.TemporaryFile("w+") as errors:
        process = psutil.Popen(command, cwd=ROOT, stderr=errors, stdout=subprocess.DEVNULL)
        while process.poll() is None:
            peak = max(peak, sum(_memory(one) for one in _family(process)))
            time.sleep(POLL_SECONDS)
        wall = time.perf_counter() - started
        if process.returncode:
            errors.seek(0)
            raise UserError(f"{shlex.join(command)} failed: {errors.read()[-500:]}")
    return {
        "wall_s": round(wall, 3),
        "processor_s": max(round(_processor_seconds() - before, 3), 0.001),
        "peak_mb": round(peak / 1e6),
    }


def _processor_seconds() -> float:
    """Of all processes that this one has waited for, and of those that they have."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _memory(process: psutil.Process) -> int:
    try:
        return process.memory_info().rss
    except psutil.Error:
        return 0


def _family(process: psutil.Popen) -> Iterator[psutil.Process]:
    try:
        yield process
        yield from process.children(recursive=True)
    except psutil.Error:
        return


def rate(result: dict, rows: int, size: int) -> dict:
    """With rows and bytes by second."""
    return {
        **result,
        "rows_per_s": round(rows / result["wall_s"]),
        "mb_per_s": round(size / 1e6 / result["wall_s"]),
        "rows_per_processor_s": round(rows / result["processor_s"]),
    }


def benchmark(kind: str, size: int, scratch: Path, repeats: int) -> dict:
    """All measurements of one kind of file."""
    name, file = SETS[kind]
    raw, out = scratch / "raw", scratch / "reformatted"
    source = raw / name / file
    source.parent.mkdir(parents=True)
    small = scratch / f"small.{kind}"
    small_rows = write_raw(kind, small, size // BASELINE_SHARE)
    looped = scratch / "plain.jsonl"
    plain = measured([sys.executable, "-c", PLAIN_LOOP, str(small), str(looped), kind], repeats, looped)
    result = {"plain_json_loop": rate(plain, small_rows, small.stat().st_size)}
    looped.unlink()
    small.unlink()
    rows = write_raw(kind, source, size)
    bytes_ = source.stat().st_size
    copy = scratch / "copy"
    result["copy_to_disk"] = rate(
        measured(["sh", "-c", f"cp {shlex.quote(str(source))} {copy}"], repeats, copy), rows, bytes_
    )
    result["copy_to_disk_and_sync"] = rate(
        measured(["sh", "-c", f"cp {shlex.quote(str(source))} {copy} && sync {copy}"], repeats, copy),
        rows,
        bytes_,
    )
    copy.unlink()
    entry = [sys.executable, "entrypoints/data/reformat_datasets.py", "--raw_data_root", str(raw), "--datasets", name]
    for workers in (1, 2):
        run = measured([*entry, "--save_path", str(out), "--workers", str(workers)], repeats, out)
        result[f"reformat_{workers}_workers"] = rate(run, rows, bytes_)
    made = (out / name / "data.jsonl").stat().st_size
    mix = [sys.executable, "entrypoints/data/mix_datasets.py", "--reformatted_dir", str(out)]
    others = [f"{other}=0" for other in ("evol_instruct", "meta_math_qa", "evol_code_alpaca", *_others(name))]
    command = [*mix, "--save_path", str(scratch / "mixed"), "--portion", f"{name}=1", *others, "--dedup"]
    result["mix_dedup"] = rate(measured(command, repeats, scratch / "mixed"), rows, made)
    base = result["plain_json_loop"]
    for key in ("reformat_1_workers", "reformat_2_workers"):
        result[key]["times_plain_wall"] = round(result[key]["rows_per_s"] / base["rows_per_s"], 2)
        share = result[key]["rows_per_processor_s"] / base["rows_per_processor_s"]
        result[key]["times_plain_processor"] = round(share, 2)
    for path in (raw, out, scratch / "mixed"):
        shutil.rmtree(path)
    return {"rows": rows, "bytes": bytes_, **result}


def _others(name: str) -> list[str]:
    return [other for other, _ in SETS.values() if other != name]


def machine() -> dict:
    """What the numbers were measured on."""
    load = os.getloadavg()[0]
    return {
        "processors": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9),
        "load_before": round(load, 1),
        "processor": _processor(),
        "python": platform.python_version(),
        "system": platform.system(),
    }


def _processor() -> str:
    """Its name, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    """Parse, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="of each raw file")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()), help="needs five times as much")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each command, of which the fastest counts")
    parser.add_argument("--output", type=Path, default=ROOT / "figures" / "benchmark_data.json")
    args = parser.parse_args()
    size = int(args.gigabytes * 1e9)
    if size < 1 << 20:
        raise UserError(f"--gigabytes {args.gigabytes} is too little to measure")
    if args.repeats < 1:
        raise UserError(f"--repeats must be at least 1, not {args.repeats}")
    if shutil.disk_usage(args.scratch).free < 5 * size:
        raise UserError(f"--scratch {args.scratch} has less than {5 * args.gigabytes:g} GB free")
    result = {
        "command": "python entrypoints/analysis/benchmark_data.py"
        f" --gigabytes {args.gigabytes:g} --repeats {args.repeats}",
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
    }
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        for kind in SETS:
            result[kind] = benchmark(kind, size, Path(folder), args.repeats)
    result["machine"]["load_after"] = round(os.getloadavg()[0], 1)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    cli(main)

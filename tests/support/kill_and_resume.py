"""Kills tuning runs of two processes at random moments with SIGKILL, resumes them, and compares the outcome.

    python tests/support/kill_and_resume.py --kills 20 --seed 0 --output figures/kill_and_resume.json

Half of the kills hit one rank (the launcher then ends the other, as torchrun does), half hit both. A resumed run may
be killed again. The first checkpoint that a kill leaves, and every third, is cut short as well, as by a full disk; so
that there is one, the last kill waits for a checkpoint where none before has left any. In the end the routers must
have the bits of an undisturbed run under the same engine. The processes are forked from one that has imported
everything, so that a moment drawn at random lies in the run and not in Python's start.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import re
import runpy
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "DS_LOG_LEVEL": "error"}
os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"

import engine_worker  # noqa: E402
import tiny_tuning  # noqa: E402

from router_tuning.provenance import provenance  # noqa: E402
from router_tuning.tuning.recipes import paper  # noqa: E402, F401  imported once, for all ranks
from router_tuning.tuning.trainer.checkpoints import checkpoints, newest_complete  # noqa: E402

WORLD = 2
GRACE = 5.0  # seconds between SIGTERM and SIGKILL for the rank that is left
CONFIGS = {
    "DDP": "configs/accelerate/cpu_ddp.yaml",
    "FSDP2": "configs/accelerate/fsdp2.yaml",
    "ZeRO-2": "configs/accelerate/deepspeed_zero2.yaml",
    "ZeRO-3": "configs/accelerate/deepspeed_zero3.yaml",
}
KEPT = 3  # checkpoints


def run_rank(rank: int, port: int, config: str, arguments: list[str], log: Path) -> None:
    """``entrypoints/finetune/finetune_mod.py`` as a launcher starts it."""
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    launched = engine_worker.environment_of(config)
    os.environ.update({k: v for k, v in launched.items() if k.startswith(("ACCELERATE_", "FSDP_"))})
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD, "LOCAL_WORLD_SIZE": WORLD}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    script = str(ROOT / "entrypoints/finetune/finetune_mod.py")
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


class Launch:
    """Two ranks, forked."""

    def __init__(self, config: str, arguments: list[str], log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.started, fork = time.monotonic(), multiprocessing.get_context("fork")
        ranks = range(WORLD)
        self.ranks = [fork.Process(target=run_rank, args=(rank, port, config, arguments, log)) for rank in ranks]
        for process in self.ranks:
            process.start()

    def wait(self, until: float | None = None, ready: Callable[[], Any] = lambda: True) -> list[int] | None:
        """Exit codes once all have ended; None if ``until`` (monotonic seconds) comes first, and it is ``ready``."""
        failed_at = None
        while None in (codes := [process.exitcode for process in self.ranks]):
            now = time.monotonic()
            if until is not None and now >= until and codes == [None] * WORLD and ready():
                return None
            if any(codes) and failed_at is None:
                failed_at = now
                for process in self.ranks:
                    process.terminate()
            elif failed_at is not None and now - failed_at > GRACE:
                for process in self.ranks:
                    process.kill()
            time.sleep(0.005)
        return codes


def cut_short(checkpoint: Path, rng: random.Random) -> str:
    """Truncate one file of a checkpoint; its name."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.stat().st_size)
    chosen = rng.choice(files)
    os.truncate(chosen, rng.randrange(chosen.stat().st_size))
    return f"{checkpoint.name}/{chosen.relative_to(checkpoint)}"


class Engine:
    """An undisturbed run under one engine, and runs that are disturbed."""

    def __init__(self, name: str, parts: dict[str, Path], folder: Path, epochs: int) -> None:
        self.name, self.parts, self.folder, self.epochs, self.runs = name, parts, folder, epochs, 0
        self.found = 0  # kills that left a checkpoint: the first of them, and every third, has it cut short
        folder.mkdir(parents=True)
        whole = folder / "undisturbed"
        launch = self._start(whole, folder / "undisturbed.log")
        assert launch.wait() == [0] * WORLD, (folder / "undisturbed.log").read_text()[-4000:]
        self.seconds = time.monotonic() - launch.started
        self.expected = (whole / "router.safetensors").read_bytes()

    def _start(self, run: Path, log: Path) -> Launch:
        settings = {"num_train_epochs": self.epochs, "save_total_limit": KEPT, "resume_from_checkpoint": "auto"}
        arguments = tiny_tuning.arguments(self.parts, run, **settings)
        return Launch(CONFIGS[self.name], arguments, log)

    def disturb(self, rng: random.Random, first: int, most: int) -> list[dict[str, Any]]:
        """Kill a run up to ``most`` times, resume it to its end, compare; one record per kill."""
        self.runs += 1
        run, logs, records = self.folder / f"run-{self.runs}", [], []
        codes = None
        while not records or (len(records) < most and rng.random() < 0.5):
            number, after = first + len(records), rng.uniform(0, self.seconds)
            ranks = list(range(WORLD)) if number % 2 else [number // 2 % WORLD]
            logs.append(self.folder / f"run-{self.runs}-{len(logs)}.log")
            launch = self._start(run, logs[-1])
            until, waits = launch.started + after, not self.found and len(records) == most - 1
            codes = launch.wait(until, partial(checkpoints, run)) if waits else launch.wait(until)
            if codes is None:
                for rank in ranks:
                    launch.ranks[rank].kill()
                launch.wait()
                found = checkpoints(run)
                record = {"engine": self.name, "run": self.runs, "killed_ranks": ranks}
                record |= {"after_seconds": round(after, 2), "newest_checkpoint": found[0][0] if found else None}
                record["cut_short"] = cut_short(found[0][1], rng) if found and self.found % 3 == 0 else None
                self.found += bool(found)
                whole, _ = newest_complete(run)
                record["newest_complete"] = whole and int(whole.name.removeprefix("checkpoint-"))
                records.append(record)
            elif records:  # resumed, and faster at its end than the moment drawn
                break
            else:
                shutil.rmtree(run)
        if codes is None:
            logs.append(self.folder / f"run-{self.runs}-{len(logs)}.log")
            codes = self._start(run, logs[-1]).wait()
        assert codes == [0] * WORLD, logs[-1].read_text()[-4000:]
        assert len(checkpoints(run)) == KEPT
        same = (run / "router.safetensors").read_bytes() == self.expected
        # What the launch after each kill said; None if it was killed before it could.
        for record, log in zip(records, logs[-len(records) :], strict=True):
            record |= {"then": told(log.read_text()), "same_bits_at_the_end": same}
        return records


def told(log: str) -> str | None:
    """Where a launch began, and what it left aside."""
    lines = re.findall(r"continuing from checkpoint-\d+|checkpoint-\d+ is incomplete|starting from the beginning", log)
    return "; ".join(lines) or None


def main() -> None:
    """Kill, resume, write the record; exit code 1 if any run ended with other weights."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engines", default=",".join(CONFIGS), help="comma-separated")
    parser.add_argument("--epochs", type=int, default=10, help="three steps each, a checkpoint after every step")
    parser.add_argument("--output", type=Path, default=None, help="JSON with every kill")
    args = parser.parse_args()
    rng, names = random.Random(args.seed), args.engines.split(",")
    kills: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        parts = tiny_tuning.write_parts(Path(folder))
        engines = [Engine(name, parts, Path(folder) / name, args.epochs) for name in names]
        while len(kills) < args.kills:
            engine = min(engines, key=lambda engine: sum(kill["engine"] == engine.name for kill in kills))
            for record in engine.disturb(rng, first=len(kills), most=args.kills - len(kills)):
                kills.append(record)
                print(json.dumps(record), flush=True)
    same = sum(kill["same_bits_at_the_end"] for kill in kills)
    result = {
        "command": "python tests/support/kill_and_resume.py "
        f"--kills {args.kills} --seed {args.seed} --epochs {args.epochs}",
        **provenance(),
        "processes": WORLD,
        "steps": 3 * args.epochs,
        "undisturbed_seconds": {engine.name: round(engine.seconds, 2) for engine in engines},
        "kills": len(kills),
        "same_bits_at_the_end": same,
        "records": kills,
    }
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{same} of {len(kills)} killed runs ended with the bits of an undisturbed one")
    raise SystemExit(same != len(kills))


if __name__ == "__main__":
    main()

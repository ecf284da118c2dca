"""SIGKILL at random moments: the resumed run ends with the bits of an undisturbed one.

Four seeded kills here; ``python tests/support/kill_and_resume.py --kills 20`` under every engine, with the record in
``figures/kill_and_resume.json``.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.full
def test_killed_runs_go_on_from_the_newest_complete_checkpoint_and_end_as_undisturbed_ones(tmp_path):
    output = tmp_path / "record.json"
    command = [sys.executable, ROOT / "tests/support/kill_and_resume.py", "--output", output]
    few = ["--kills", "4", "--epochs", "4", "--engines", "DDP", "--seed", "3"]
    done = subprocess.run([*command, *few], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads(output.read_text())
    assert record["kills"] == 4 == record["same_bits_at_the_end"] and record["processes"] == 2
    assert {len(kill["killed_ranks"]) for kill in record["records"]} == {1, 2}, "one rank, and both"
    heard = [kill for kill in record["records"] if kill["then"]]  # the others were killed again before they could say
    assert heard and any(kill["cut_short"] for kill in record["records"])
    for kill in heard:
        skipped = f"checkpoint-{kill['newest_checkpoint']} is incomplete; " if kill["cut_short"] else ""
        step = kill["newest_complete"]
        begun = "starting from the beginning" if step is None else f"continuing from checkpoint-{step}"
        assert kill["then"] == skipped + begun


def test_the_full_record_is_complete():
    record = json.loads((ROOT / "figures/kill_and_resume.json").read_text())
    assert record["kills"] >= 20 and record["same_bits_at_the_end"] == record["kills"] == len(record["records"])
    assert {kill["engine"] for kill in record["records"]} == {"DDP", "FSDP2", "ZeRO-2", "ZeRO-3"}

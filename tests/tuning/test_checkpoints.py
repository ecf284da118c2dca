"""Checkpoints, signals and kills: a folder is whole or skipped, and a run goes on to the bits of an undisturbed one.

Four seeded kills here; ``python tests/support/kill_and_resume.py --kills 20`` under every engine, with the record in
``figures/kill_and_resume.json``.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_tuning import tune

from router_tuning.errors import UserError
from router_tuning.files import publish
from router_tuning.tuning.run_folder import clear_folder
from router_tuning.tuning.trainer import checkpoints
from router_tuning.tuning.trainer.customized_trainer import RouterTrainer
from router_tuning.tuning.trainer.interruption import StopOnSignal


def write(run, step):
    place = run / f"checkpoint-{step}"
    with publish(place) as folder:
        (folder / "global_step").mkdir(parents=True)
        (folder / "weights.bin").write_bytes(bytes(range(100)))
        (folder / "global_step" / "shard.bin").write_bytes(b"shard")
        checkpoints.describe(folder, {"base": "abc"})
    return place


HARM = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-4]),
    "corrupt": lambda path: path.write_bytes(b"\xff" + path.read_bytes()[1:]),
    "gone": Path.unlink,
}


@pytest.mark.parametrize("harm", HARM.values(), ids=HARM)
@pytest.mark.parametrize("name", ["weights.bin", "global_step/shard.bin", "manifest.json"])
def test_a_harmed_newest_one_is_skipped_with_a_message(tmp_path, harm, name):
    write(tmp_path, 1)
    harm(write(tmp_path, 2) / name)
    folder, [note] = checkpoints.newest_complete(tmp_path)
    assert folder.name == "checkpoint-1" and note.startswith("checkpoint-2 is incomplete (") and name in note


def test_nothing_complete_means_a_fresh_start_with_auto_and_an_error_with_a_name(tmp_path):
    folder = write(tmp_path, 1)
    HARM["truncated"](folder / "weights.bin")
    found, notes = checkpoints.chosen("auto", tmp_path)
    assert found is None and "starting from the beginning" in notes[-1]
    for name, told in ((folder, "is incomplete"), (tmp_path / "checkpoint-7", "no such folder")):
        with pytest.raises(UserError, match=told):
            checkpoints.chosen(str(name), tmp_path)


def test_the_newest_is_found_by_number_and_rotation_keeps_it(tmp_path):
    for step in (9, 10, 11, 2):
        write(tmp_path, step)
    for limit in (2, None):
        checkpoints.rotate(tmp_path, limit)
        assert [path.name for _, path in checkpoints.checkpoints(tmp_path)] == ["checkpoint-11", "checkpoint-10"]
    HARM["truncated"](write(tmp_path, 17) / "weights.bin")  # saved out of turn on a signal, newer than the next
    clear_folder(tmp_path, keep_checkpoints=True)
    write(tmp_path, 15)
    checkpoints.rotate(tmp_path, 1)
    assert checkpoints.newest_complete(tmp_path) == (tmp_path / "checkpoint-15", [])


@pytest.fixture
def stop():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield StopOnSignal().install()
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("number", "micro_batch", "step"), [(signal.SIGTERM, 0, 0), (signal.SIGTERM, 9, 2), (signal.SIGINT, 11, 3)]
)
def test_resumed_equals_undisturbed(parts, finished, tmp_path, stop, monkeypatch, number, micro_batch, step):
    """Four micro-batches make a step: the tenth lies within step 3, the twelfth ends it; after none, none is saved."""
    plain, seen = RouterTrainer.training_step, []

    def training_step(self, *args, **kwargs):
        if len(seen) == micro_batch:
            os.kill(os.getpid(), number)
        seen.append(1)
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(RouterTrainer, "training_step", training_step)
    tune(parts, tmp_path, stop, save_steps=100)
    assert stop.signal == number
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{step}"][: step > 0]
    assert not (tmp_path / "router.safetensors").exists() and not (tmp_path / "run.json").exists()
    monkeypatch.undo()
    if step:
        tune(parts, tmp_path, resume_from_checkpoint="auto", save_steps=100)
        assert (tmp_path / "router.safetensors").read_bytes() == (finished / "router.safetensors").read_bytes()


def test_a_signal_outside_of_training_and_a_late_second_one_end_the_process(stop):
    with pytest.raises(SystemExit, match="143"):
        os.kill(os.getpid(), signal.SIGTERM)
    stop.training = True
    for _ in range(2):  # the terminal's and the launcher's: one wish
        os.kill(os.getpid(), signal.SIGINT)
    assert stop.signal == signal.SIGINT
    stop.since -= 10
    with pytest.raises(SystemExit, match="130"):
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.full
def test_killed_runs_go_on_from_the_newest_complete_checkpoint_and_end_as_undisturbed_ones(root, tmp_path):
    output = tmp_path / "record.json"
    few = ["--kills", "4", "--epochs", "4", "--engines", "DDP", "--seed", "3", "--output", output]
    command = [sys.executable, root / "tests/support/kill_and_resume.py", *few]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
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


def test_the_full_record_is_complete(root):
    record = json.loads((root / "figures/kill_and_resume.json").read_text())
    assert record["kills"] >= 20 and record["same_bits_at_the_end"] == record["kills"] == len(record["records"])
    assert {kill["engine"] for kill in record["records"]} == {"DDP", "FSDP2", "ZeRO-2", "ZeRO-3"}

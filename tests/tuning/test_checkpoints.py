"""Checkpoint folders: whole or absent, newest whole one first, never continued by another run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from router_tuning.errors import UserError
from router_tuning.files import publish
from router_tuning.tuning.run_folder import clear_folder
from router_tuning.tuning.trainer import checkpoints

SETTINGS = {"base": "abc", "granularity": "attn_sequence", "mod_n": 3, "betas": [0.9, 0.999]}


def write(run, step, settings=SETTINGS):
    place = run / f"checkpoint-{step}"
    with publish(place) as folder:
        (folder / "global_step").mkdir(parents=True)
        (folder / "weights.bin").write_bytes(bytes(range(100)))
        (folder / "global_step" / "shard.bin").write_bytes(b"shard")
        checkpoints.describe(folder, settings)
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
    folder, notes = checkpoints.newest_complete(tmp_path)
    assert folder.name == "checkpoint-1"
    assert len(notes) == 1 and notes[0].startswith("checkpoint-2 is incomplete (") and name in notes[0]


def test_nothing_complete_means_a_fresh_start_with_auto_and_an_error_with_a_name(tmp_path):
    folder = write(tmp_path, 1)
    HARM["truncated"](folder / "weights.bin")
    found, notes = checkpoints.chosen("auto", tmp_path)
    assert found is None and "starting from the beginning" in notes[-1]
    with pytest.raises(UserError, match="is incomplete"):
        checkpoints.chosen(str(folder), tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        checkpoints.chosen(str(tmp_path / "checkpoint-7"), tmp_path)
    assert checkpoints.chosen(None, tmp_path) == (None, [])


def test_the_newest_is_found_by_number_and_rotation_keeps_it(tmp_path):
    for step in (9, 10, 11, 2):
        write(tmp_path, step)
    assert checkpoints.newest_complete(tmp_path) == (tmp_path / "checkpoint-11", [])
    checkpoints.rotate(tmp_path, 2)
    assert [path.name for _, path in checkpoints.checkpoints(tmp_path)] == ["checkpoint-11", "checkpoint-10"]
    checkpoints.rotate(tmp_path, None)
    assert len(checkpoints.checkpoints(tmp_path)) == 2


def test_writing_a_step_again_replaces_it(tmp_path):
    write(tmp_path, 1)
    folder = write(tmp_path, 1, {**SETTINGS, "mod_n": 5})
    assert json.loads((folder / "manifest.json").read_text())["settings"]["mod_n"] == 5
    assert checkpoints.find_fault(folder) is None


def test_a_damaged_newest_one_does_not_count_among_those_kept(tmp_path):
    """Saved out of turn on a signal, damaged, and newer than the next that the resumed run saves."""
    write(tmp_path, 10)
    HARM["truncated"](write(tmp_path, 17) / "weights.bin")
    clear_folder(tmp_path, keep_checkpoints=True)
    write(tmp_path, 15)
    checkpoints.rotate(tmp_path, 1)
    assert checkpoints.newest_complete(tmp_path) == (tmp_path / "checkpoint-15", [])

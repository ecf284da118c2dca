"""Files and folders appear whole or not at all, whatever ends the process that writes them."""

import errno
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from refused import refused
from safetensors.torch import save_file

from router_tuning.errors import UserError, cli
from router_tuning.files import exclusive, publish, scratch_folder, write_json, write_text


def make(draft: Path, kind: str, text: str) -> None:
    if kind == "folder":
        draft.mkdir()
        draft = draft / "inside"
    draft.write_text(text)


def content(target: Path, kind: str) -> str:
    return (target / "inside" if kind == "folder" else target).read_text()


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_the_old_or_the_new_is_there(kind, tmp_path):
    target = tmp_path / "above" / "made.json"
    for text in ("old", "new"):
        with publish(target) as draft:
            assert draft.name == "made.json", "some libraries take the format from the suffix"
            make(draft, kind, text)
            assert text == "old" or content(target, kind) == "old"
        assert content(target, kind) == text
    with pytest.raises(KeyError), publish(target) as draft:
        make(draft, kind, "broken off")
        raise KeyError
    assert content(target, kind) == "new" and os.listdir(target.parent) == ["made.json"]


def test_modes_are_the_usual_ones_and_linked_files_are_left_alone(tmp_path):
    (tmp_path / "plain").write_text("")
    private = tmp_path / "private"
    private.touch(0o600)
    with publish(tmp_path / "made") as draft:
        draft.mkdir(0o700)
        (draft / "file").touch(0o600)
        os.link(private, draft / "linked")
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    assert modes["file"] == modes["plain"] and modes["linked"] == 0o600 and modes["made"] & 0o111


CHILD = """
import sys, time
from pathlib import Path
from router_tuning.files import publish
with publish(Path(sys.argv[1])) as draft:
    draft.write_text("half")
    print("writing", flush=True)
    time.sleep(60)
"""


def test_a_kill_leaves_nothing_for_long_and_live_drafts_are_not_swept(tmp_path):
    target = tmp_path / "made"
    child = subprocess.Popen([sys.executable, "-c", CHILD, target], stdout=subprocess.PIPE)
    child.stdout.readline()
    write_text(target, "another process")
    assert len(os.listdir(tmp_path)) == 2, "the draft of the child, which lives"
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert target.read_text() == "another process"
    with scratch_folder(tmp_path) as scratch:
        assert set(os.listdir(tmp_path)) == {"made", scratch.name}
        write_text(scratch / "inside", "scratch folders nest")
    assert os.listdir(tmp_path) == ["made"]


def test_what_the_system_says_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file cannot be written: (Not a directory|File exists)"):
        write_json(tmp_path / "file" / "made", {})
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="folder cannot be written: Is a directory"):
        write_text(tmp_path / "folder", "")
    with pytest.raises(UserError, match=r"made cannot be written: No such file or directory \(.*absent\)"):
        with publish(tmp_path / "made"):
            (tmp_path / "absent").read_text()
    with pytest.raises(OSError, match="^no such model"), publish(tmp_path / "made"):
        raise OSError("no such model")


@pytest.mark.parametrize(
    ("save", "said"), [(save_file, "File too large"), (torch.save, "not all of it could be saved")]
)
def test_so_is_a_full_disk_whatever_writes(tmp_path, full_disk, save, said):
    with full_disk(9000), refused(f"made cannot be written: {said}", UserError), publish(tmp_path / "made") as draft:
        save({"values": torch.zeros(10_000)}, draft)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_what_the_system_refuses_ends_a_command_in_one_line(number, capsys):
    def main():
        raise OSError(number, os.strerror(number), "/place")

    with pytest.raises(SystemExit, match="2"):
        cli(main)
    assert capsys.readouterr().err == f"error: {os.strerror(number)} (/place)\n"


def test_a_folder_is_had_by_one_process_at_a_time(tmp_path):
    with exclusive(tmp_path / "run"), refused("run: another process is at work there", UserError):
        with exclusive(tmp_path / "run"):
            raise AssertionError
    with exclusive(tmp_path / "run"):
        assert list(tmp_path.iterdir()) == [tmp_path / "run"]

"""Places that cannot be written, disks that fill up: one clear line, and nothing under a final name."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from raw_data import in_threads, outcome_of, published_files, sample_rows, write_rows

from router_tuning.data import planning
from router_tuning.data.mix_plan import MixPlan
from router_tuning.data.mixing import mix
from router_tuning.errors import UserError

NOBODY = 65534


@contextmanager
def without_privileges() -> Iterator[None]:
    """Permissions bind everybody but the superuser, so be somebody else for a while."""
    if os.geteuid():
        yield
        return
    try:
        os.seteuid(NOBODY)
    except OSError:
        pytest.skip("this process may not become another user")
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_place_that_is_no_folder(tmp_path: Path):
    path = write_rows(tmp_path / "rows", sample_rows("alpaca", 10), ".json")
    (tmp_path / "file").write_text("")
    outcome = outcome_of("alpaca", path, tmp_path / "file")
    assert "cannot be written" in outcome.error and str(tmp_path / "file") in outcome.error


@pytest.mark.parametrize("locked", ["out", "out/alpaca"])
def test_read_only_output(locked: str):
    """A locked output folder, and a locked folder of one data set; what is there stays as it is."""
    # Folders of pytest are closed to other users.
    with TemporaryDirectory() as name:
        base = Path(name)
        base.chmod(0o755)
        path = write_rows(base / "rows", sample_rows("alpaca", 10), ".json")
        assert outcome_of("alpaca", path, base / "good").error is None
        (base / "out" / "alpaca").mkdir(parents=True)
        (base / "out" / "alpaca" / "data.jsonl").write_text("before\n")
        (base / locked).chmod(0o555)
        mixed = base / locked / "mixed"
        with without_privileges():
            outcome = outcome_of("alpaca", path, base / "out")
            with pytest.raises(UserError, match="mixed.* cannot be written: Permission denied"):
                mix(MixPlan({"alpaca": Fraction(1)}, {}), base / "good", mixed)
        assert "cannot be written: Permission denied" in outcome.error and "\n" not in outcome.error
        assert (base / "out" / "alpaca" / "data.jsonl").read_text() == "before\n"
        assert published_files(base / "out") == {"data.jsonl"}


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_during_the_conversion(workers: int, tmp_path: Path, monkeypatch):
    """A disk with room for 40 kB, which takes no write as a whole; what it took is not lost."""
    path = write_rows(tmp_path / "rows", sample_rows("alpaca", 500), ".json")
    pwrite = os.pwrite

    def full(file: int, data: memoryview, offset: int) -> int:
        if offset > 40_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(file, data[:700], offset)

    monkeypatch.setattr(planning, "STRETCH_BYTES", 3000)
    in_threads(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        outcome = outcome_of("alpaca", path, tmp_path / "out", workers=workers)
    assert "No space left" in outcome.error and "data.jsonl" in outcome.error
    assert published_files(tmp_path / "out") == set()
    assert len((tmp_path / "out" / "alpaca" / ".partial" / "journal.jsonl").read_bytes().splitlines()) > 1
    assert outcome_of("alpaca", path, tmp_path / "out", resume=True).accepted == 500
    assert outcome_of("alpaca", path, tmp_path / "fresh").accepted == 500
    made = [(tmp_path / folder / "alpaca" / "data.jsonl").read_bytes() for folder in ("out", "fresh")]
    assert made[0] == made[1]


@pytest.mark.parametrize("entry", ["reformat_datasets.py", "mix_datasets.py"])
def test_no_more_room_for_a_file(entry: str, tmp_path: Path, root: Path, convert):
    """The system refuses to let a file grow, as on a full disk; the command says so and leaves nothing."""
    path = write_rows(tmp_path / "raw" / "alpaca", sample_rows("alpaca", 3000), ".json")
    convert("alpaca", path, tmp_path / "whole")
    options = {
        "reformat_datasets.py": ["--raw_data_root", tmp_path / "raw", "--workers", "1"],
        "mix_datasets.py": [
            *("--reformatted_dir", tmp_path / "whole", "--portion", "alpaca=1", "vicuna_sharegpt=0"),
            *("evol_instruct=0", "slim_orca=0", "meta_math_qa=0", "evol_code_alpaca=0"),
        ],
    }[entry]
    command = [sys.executable, root / "entrypoints" / "data" / entry, *options, "--save_path", tmp_path / "out"]
    done = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(errors) == 1 and "File too large" in errors[0], done.stderr
    assert published_files(tmp_path / "out") == set()
    if entry == "mix_datasets.py":
        assert not (tmp_path / "out" / ".partial").exists()

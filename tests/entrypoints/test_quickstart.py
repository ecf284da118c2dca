"""The scripts that a stranger types first: one-line refusals, and an installation only when it is needed."""

import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

SCRIPTS = ("environment.sh", "quickstart.sh", "test.sh")


def run(command, cwd, **env):
    keep = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR", "LANG") if name in os.environ}
    return subprocess.run(command, cwd=cwd, env=keep | env, capture_output=True, text=True, timeout=120)


@pytest.fixture
def clone(tmp_path, root):
    """A checkout with scripts and requirements, in a folder with a space in its name."""
    folder = tmp_path / "a clone"
    (folder / "scripts").mkdir(parents=True)
    for name in SCRIPTS:
        shutil.copy(root / "scripts" / name, folder / "scripts" / name)
    for name in ("requirements.txt", "pyproject.toml"):
        shutil.copy(root / name, folder / name)
    return folder


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.mark.parametrize(
    "argument, message",
    [
        ("--smok", "unknown argument --smok; usage: bash scripts/quickstart.sh [--smoke] [folder under ckpt/]"),
        *[(base, f"prepare_base.py --folder_name {base};") for base in ("smollm2-135m-instruct", "unknown")],
    ],
)
def test_bad_arguments_are_one_line_before_anything_is_installed(clone, argument, message):
    assert message in error_of(run(["bash", "scripts/quickstart.sh", argument], clone), clone)


def error_of(done, clone):
    """The one line that is told before anything is installed."""
    assert done.returncode == 2 and done.stdout == "" and not (clone / ".venv").exists()
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def test_old_python_is_one_line(clone, tmp_path):
    old = program(tmp_path / "bin" / "python3", 'if [ "$1" = --version ]; then echo Python 3.10.9; else exit 1; fi')
    for other in ("python3.11", "python3.12", "python3.13"):
        program(old.with_name(other), "exit 127")
    line = error_of(run(["bash", "scripts/test.sh"], clone, PATH=f"{old.parent}:/usr/bin:/bin"), clone)
    assert line.startswith("error: no Python 3.11 or newer found (Python 3.10.9)") and "PYTHON=" in line


def test_installs_once_and_again_when_the_requirements_change(clone, tmp_path):
    """And the caller's PYTHONPATH does not leak in."""
    fake, installs = clone / ".venv" / "bin" / "python", tmp_path / "installs"
    program(fake, f'[ "$1 $2" = "-m pip" ] && echo "$@" >> "{installs}"; exit 0')
    told = 'echo "$VIRTUAL_ENV, ${PYTHONPATH-unset}"'
    use = ["bash", "-c", f"source scripts/environment.sh && ensure_environment && {told}"]
    for changed, count in ((False, 1), (False, 1), (True, 2)):
        if changed:
            (clone / "requirements.txt").write_text("more\n")
        done = run(use, clone, PYTHONPATH="/elsewhere")
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == f"{clone / '.venv'}, unset"
        assert len(installs.read_text().splitlines()) == count


def test_a_failed_installation_is_said_and_tried_again(clone):
    program(clone / ".venv" / "bin" / "python", '[ "$1 $2" = "-m pip" ] && exit 1; exit 0')
    for _ in range(2):
        done = run(["bash", "scripts/test.sh"], clone)
        assert done.returncode == 2 and "installing requirements.txt" in done.stdout
        assert done.stderr.startswith("error: the installation failed")


def test_ci_runs_the_commands(root):
    lines = [line for line in (root / ".ci" / "run").read_text().splitlines() if line.startswith("bash ")]
    tests = ['bash scripts/test.sh -m "not real"', "bash scripts/test.sh -m real -rs tests/test_real_model.py"]
    assert lines == [*tests, "bash scripts/quickstart.sh --smoke"]

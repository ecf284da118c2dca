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
    done = run(["bash", "scripts/quickstart.sh", argument], clone)
    assert done.returncode == 2 and done.stdout == "" and not (clone / ".venv").exists()
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ") and message in line


def test_old_python_is_one_line(clone, tmp_path):
    old = program(tmp_path / "bin" / "python3", 'if [ "$1" = --version ]; then echo Python 3.10.9; else exit 1; fi')
    for other in ("python3.11", "python3.12", "python3.13"):
        program(old.with_name(other), "exit 127")
    done = run(["bash", "scripts/test.sh"], clone, PATH=f"{old.parent}:/usr/bin:/bin")
    assert done.returncode == 2 and not (clone / ".venv").exists()
    [line] = done.stderr.splitlines()
    assert line.startswith("error: no Python 3.11 or newer found (Python 3.10.9)") and "PYTHON=" in line


def test_installs_once_and_again_when_the_requirements_change(clone, tmp_path):
    fake = clone / ".venv" / "bin" / "python"
    program(fake, f'[ "$1 $2" = "-m pip" ] && echo "$@" >> "{tmp_path}/installs"; exit 0')
    use = ["bash", "-c", 'source scripts/environment.sh && ensure_environment && echo "$VIRTUAL_ENV"']
    for _ in range(2):
        done = run(use, clone)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == str(clone / ".venv")
    assert len((tmp_path / "installs").read_text().splitlines()) == 1
    (clone / "requirements.txt").write_text("more\n")
    run(use, clone)
    assert len((tmp_path / "installs").read_text().splitlines()) == 2


def test_a_failed_installation_is_said_and_tried_again(clone):
    program(clone / ".venv" / "bin" / "python", '[ "$1 $2" = "-m pip" ] && exit 1; exit 0')
    for _ in range(2):
        done = run(["bash", "scripts/test.sh"], clone)
        assert done.returncode == 2 and "installing requirements.txt" in done.stdout
        assert done.stderr.startswith("error: the installation failed")


def test_pythonpath_of_the_caller_does_not_leak_in(clone):
    program(clone / ".venv" / "bin" / "python", "exit 0")
    show = 'source scripts/environment.sh && ensure_environment >/dev/null && echo "[${PYTHONPATH-unset}]"'
    assert run(["bash", "-c", show], clone, PYTHONPATH="/elsewhere").stdout == "[unset]\n"


def test_ci_runs_the_commands(root):
    lines = [line for line in (root / ".ci" / "run").read_text().splitlines() if line.startswith("bash ")]
    assert lines == [
        'bash scripts/test.sh -m "not real"',
        "bash scripts/test.sh -m real -rs tests/test_real_model.py",
        "bash scripts/quickstart.sh --smoke",
    ]

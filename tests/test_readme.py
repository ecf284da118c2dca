"""The README's commands exist as printed, and its numbers are those of the committed JSON."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PAGES = {page.name: page for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
BASH = "\n".join(re.findall(r"```bash\n(.*?)```", "\n".join(p.read_text() for p in PAGES.values()), re.DOTALL))
COMMANDS = [line for line in BASH.splitlines() if line.strip()]


@pytest.mark.parametrize("command", COMMANDS)
def test_command_names_a_script_and_flags_that_exist(command):
    words = [w for w in shlex.split(command) if not re.fullmatch(r"[A-Z_]+=.*", w)]
    if words[0] == "lm_eval":
        assert (ROOT / words[words.index("--include_path") + 1]).is_dir()
        return
    assert words[0] in ("bash", "python")
    assert (ROOT / words[1]).is_file()
    if words[0] == "python":
        usage = subprocess.run([sys.executable, words[1], "--help"], cwd=ROOT, capture_output=True, text=True)
        assert usage.returncode == 0
        for flag in (w for w in words[2:] if w.startswith("--")):
            assert re.search(rf"{flag}\b", usage.stdout), f"{words[1]} has no {flag}"


@pytest.mark.parametrize("snippet", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_python_runs_as_printed_in_an_empty_folder(snippet, tmp_path):
    done = subprocess.run([sys.executable, "-c", snippet], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "GHBIK" in done.stdout, "the embedded base reverses a word"


def test_environment_variables_are_read_by_the_launcher():
    launcher = (ROOT / "scripts/finetune_mod.sh").read_text()
    named = set(re.findall(r"^\| `([A-Z_`, ]+)` \|", README, re.MULTILINE))
    names = {name for group in named for name in re.findall(r"[A-Z_]+", group)}
    assert names and all(re.search(rf"\b{name}\b", launcher) for name in names)


@pytest.mark.parametrize("page", PAGES)
def test_linked_files_exist(page):
    for target in re.findall(r"\]\(([^)#]+?)\)", PAGES[page].read_text()):
        if not target.startswith("http"):
            assert (PAGES[page].parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES)
def test_numbers_are_those_of_the_committed_json(page):
    from router_tuning.experiments.readme import render

    text = PAGES[page].read_text()
    assert render(text) == text, "run: python entrypoints/analysis/update_readme.py"


def test_numbers_in_blocks_come_from_json_alone(monkeypatch):
    """Changing a JSON changes the README: the test above cannot pass by accident."""
    from router_tuning.experiments import readme

    monkeypatch.setitem(readme.BLOCKS, "kills", lambda: "other numbers")
    assert readme.render(README) != README

"""What README.md and docs/ print is true: commands and files exist, snippets run, numbers are the committed JSON's."""

import argparse
import functools
import importlib.util
import re
import runpy
import shlex
import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from router_tuning.embedded import TINY_LLAMA
from router_tuning.experiments.readme import render
from router_tuning.places import ROOT
from router_tuning.tuning.command.command_line import parse_command
from router_tuning.tuning.command.parser import VARIABLES

OURS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
PAGES = {page.name: page for page in (*(ROOT / name for name in OURS), *sorted((ROOT / "docs").glob("*.md")))}
TEXTS = {name: page.read_text() for name, page in PAGES.items()} | {"ckpt": (ROOT / "ckpt/README.md").read_text()}
ELSEWHERE = ("pip", "unzip", "for", "sbatch", "pytest", "vllm", "curl")
"""What printed commands begin with that are not of this repository."""


def printed(language: str) -> list[str]:
    """Blocks of a language, of all pages."""
    return re.findall(rf"```{language}\n(.*?)```", "\n".join(TEXTS.values()), re.DOTALL)


def commands() -> list[str]:
    """Lines of every bash block, and commands of this repository within the text."""
    lines = [line for block in printed("bash") for line in block.splitlines()]
    ours = r"`((?:[A-Z_]+=\S+ )*(?:python (?:entrypoints|tests)|bash scripts)/[^`]+)`"
    lines += re.findall(ours, "\n".join(TEXTS.values()))
    return sorted({line for line in lines if line.strip() and line.split()[0] not in ELSEWHERE})


class Parsed(Exception):
    """A command line was accepted; the rest of the command is not run."""


@functools.cache
def entrypoint(script: str) -> ModuleType:
    """The module of a script."""
    spec = importlib.util.spec_from_file_location(Path(script).stem, ROOT / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_arguments(script: str, arguments: list[str], monkeypatch) -> None:
    """What the script itself says of a command line: flags, numbers, choices."""
    if script.startswith("tests/"):
        assert all(f'"{word}"' in (ROOT / script).read_text() for word in arguments if word.startswith("--"))
    elif script.endswith("finetune_mod.py"):
        parse_command(arguments)
    else:
        parse = argparse.ArgumentParser.parse_args

        def stop(*given, **options):
            parse(*given, **options)
            raise Parsed

        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        with pytest.raises(Parsed):
            entrypoint(script).main()


@pytest.mark.parametrize("command", commands())
def test_command_is_accepted_as_printed(command, monkeypatch):
    words = shlex.split(command, comments=True)
    given = [word.partition("=")[0] for word in words if re.fullmatch(r"[A-Z_]+=.*", word)]
    words = words[len(given) :]
    for before, word in pairwise(words):
        if re.match(r"(configs|data/sample|ckpt)/", word) and before != "--output":
            assert (ROOT / word).exists(), word
    if words[0] in ("lm_eval", "transformers", "hf") or words[:2] == ["python", "-m"]:
        return
    assert words[0] in ("bash", "python") and (ROOT / words[1]).is_file()
    if words[0] == "python":
        check_arguments(words[1], words[2:], monkeypatch)
        return
    script = (ROOT / words[1]).read_text()
    for name in given:
        assert name in VARIABLES.values() or re.search(rf"\b{name}\b", script), f"{words[1]} reads no {name}"
    if words[1].endswith("finetune_mod.sh"):
        parse_command(words[2:])


@pytest.mark.parametrize("snippet", printed("python"))
def test_python_runs_as_printed_in_an_empty_folder(snippet, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if '"exports/tiny"' in snippet:  # what the commands above it make
        for kind in (AutoModelForCausalLM, AutoTokenizer):
            kind.from_pretrained(TINY_LLAMA).save_pretrained("exports/tiny")
    exec(compile(snippet, "snippet", "exec"), {"__name__": "__main__"})
    assert "GHBIK" in capsys.readouterr().out, "the embedded base reverses a word"


@pytest.mark.full
@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_an_example_is_short_and_runs_in_an_empty_folder(path, tmp_path, monkeypatch, capsys):
    """And tells in the end of routers that skip something, or gives an answer that is right."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(path)])
    runpy.run_path(str(path), run_name="__main__")
    told = {"sft_with_trl": "capacity 0.", "own_loop": "capacity 0.", "serve_export": "GHBIK"}[path.stem]
    assert told in capsys.readouterr().out.splitlines()[-1] and len(path.read_text().splitlines()) <= 60


def test_environment_variables_are_read_by_the_launcher_or_the_entrypoint():
    launcher = set(re.findall(r"\b[A-Z_]+\b", (ROOT / "scripts/finetune_mod.sh").read_text()))
    named = set(re.findall(r"^\| `([A-Z_`, ]+)` \|", TEXTS["tuning.md"], re.MULTILINE))
    names = {name for group in named for name in re.findall(r"[A-Z_]+", group)}
    read = set(VARIABLES.values())
    assert len(read) >= 15 and read <= names <= read | launcher


@pytest.mark.parametrize("page", PAGES)
def test_linked_files_exist(page):
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", TEXTS[page]):
        if not target.startswith("http"):
            assert (PAGES[page].parent / target).exists(), target


def test_readme_is_short():
    assert len(TEXTS["README.md"].splitlines()) <= 180


@pytest.mark.parametrize("page", PAGES)
def test_numbers_are_those_of_the_committed_json(page):
    assert render(TEXTS[page]) == TEXTS[page], "run: python entrypoints/analysis/update_readme.py"

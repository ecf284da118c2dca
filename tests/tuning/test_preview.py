"""Preview: what is shown is what trains; lengths; the command."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

from router_tuning.errors import UserError
from router_tuning.tuning.encoding import load_tokenizer, use_template
from router_tuning.tuning.preview import lengths, preview, read_rows

ROWS = [
    {
        "dataset": "alpaca",
        "id": "alpaca_0",
        "messages": [{"role": "user", "content": "Copy AB"}, {"role": "assistant", "content": "AB é"}],
    },
    {"prompt": "Copy AB", "completion": "AB"},
    {"messages": [{"role": "user", "content": "Copy " * 40}, {"role": "assistant", "content": "AB"}]},
]


@pytest.fixture(scope="module")
def folder() -> Path:
    folder = Path(__file__).resolve().parents[2] / "ckpt" / "tiny-llama-mod"
    if not (folder / "tokenizer.json").exists():
        pytest.skip("the tiny checkpoint is not here")
    return folder


def test_trained_text_is_marked(folder: Path):
    shown = preview(ROWS, load_tokenizer(folder), 60, colour=False)
    assert "<|user|>\nCopy AB\n<|assistant|>\n⟦AB é</s>⟧\n" in shown
    assert "Copy AB⟦ AB</s>⟧" in shown
    assert "── alpaca alpaca_0: " in shown and "0 of 60 tokens carry loss" in shown
    assert "\033[" in preview(ROWS, load_tokenizer(folder), 60, colour=True)


def test_lengths(folder: Path):
    tokenizer = load_tokenizer(folder)
    told = lengths(ROWS, tokenizer, 60)
    assert "rows 3, " in told and "so cut: 1 (33.3%)" in told
    assert "nothing to learn: cut before their answer: 1" in told
    with pytest.raises(UserError, match="no row"):
        lengths([], tokenizer, 60)


def test_command(folder: Path, tmp_path: Path, root: Path, monkeypatch, capsys):
    data = tmp_path / "mixed" / "data.jsonl"
    data.parent.mkdir()
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert [row for row in read_rows(data, 2)] == ROWS[:2]
    entry = str(root / "entrypoints" / "data" / "preview_data.py")
    argv = [entry, "--tokenizer", str(folder), "--data_file", str(data), "--preview", "1"]
    monkeypatch.setattr(sys, "argv", argv)
    runpy.run_path(entry, run_name="__main__")
    shown = capsys.readouterr().out
    assert shown.count("──") == 1 and "rows 3," in shown
    data.write_text('{"messages": 5}\n')
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(entry, run_name="__main__")
    assert stopped.value.code == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ") and "data.jsonl:1: " in error


def test_refused_rows_are_shown_as_that(folder: Path):
    tokenizer = load_tokenizer(folder)
    use_template(tokenizer, "{{ messages[0].tools | tojson }}")
    assert "── alpaca alpaca_0: refused by the chat template: " in preview(ROWS[:1], tokenizer, 60, colour=False)
    with pytest.raises(UserError, match=r"no row to measure \(refused by the chat template: 1 \(.*JSON"):
        lengths(ROWS[:1], tokenizer, 60)

"""Preview: what is shown is what trains; lengths; the command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from router_tuning.errors import UserError
from router_tuning.tuning.preview import report

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


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path / "data.jsonl"


def test_trained_text_is_marked_and_all_rows_are_measured(folder: Path, data: Path):
    told = report(data, folder, 3, 60)
    assert "<|user|>\nCopy AB\n<|assistant|>\n⟦AB é</s>⟧\n" in told and "Copy AB⟦ AB</s>⟧" in told
    assert "── alpaca alpaca_0: " in told and "0 of 60 tokens carry loss" in told
    assert "rows 3, " in told and "so cut: 1 (33.3%)" in told
    assert "nothing to learn: cut before their answer: 1" in told
    assert "\033[" in report(data, folder, 3, 60, colour=True)


def test_rows_that_are_refused_are_shown_as_that(folder: Path, data: Path):
    refusing = "{{ messages[0].tools | tojson }}"
    told = report(data, folder, 1, 60, refusing)
    assert told.startswith("── alpaca alpaca_0: refused by the chat template: ") and "rows 1, " in told
    with pytest.raises(UserError, match=r"no row to measure \(refused by the chat template: 1 \(.*JSON"):
        report(data, folder, 1, 60, refusing, measured=1)


def test_command(folder: Path, data: Path, command, capsys):
    given = ["--tokenizer", folder, "--data_file", data, "--preview", "1"]
    assert command("data/preview_data.py", *given) == 0
    shown = capsys.readouterr().out
    assert shown.count("──") == 1 and "rows 3," in shown
    data.write_text('{"messages": 5}\n')
    assert command("data/preview_data.py", *given) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ") and "data.jsonl:1: " in error

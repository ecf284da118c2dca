"""Preview: what is shown is what trains; lengths; the command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from router_tuning.embedded import TINY_LLAMA
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


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path / "data.jsonl"


def test_the_command_marks_what_is_trained_and_measures_all_rows(data: Path, command, capsys):
    given = ["--tokenizer", TINY_LLAMA, "--data_file", data, "--max_seq_length", "60"]
    assert command("data/preview_data.py", *given) == 0
    told = capsys.readouterr().out
    assert "<|user|>\nCopy AB\n<|assistant|>\n⟦AB é</s>⟧\n" in told and "Copy AB⟦ AB</s>⟧" in told
    assert "── alpaca alpaca_0: " in told and "0 of 60 tokens carry loss" in told
    assert "rows 3, " in told and "so cut: 1 (33.3%)" in told
    assert "nothing to learn: cut before their answer: 1" in told
    data.write_text('{"messages": 5}\n')
    assert command("data/preview_data.py", *given) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ") and "data.jsonl:1: " in error


def test_rows_that_are_refused_are_shown_as_that(data: Path):
    refusing = "{{ messages[0].tools | tojson }}"
    told = report(data, TINY_LLAMA, 1, 60, refusing)
    assert told.startswith("── alpaca alpaca_0: refused by the chat template: ") and "rows 1, " in told
    with pytest.raises(UserError, match=r"no row to measure \(refused by the chat template: 1 \(.*JSON"):
        report(data, TINY_LLAMA, 1, 60, refusing, measured=1)

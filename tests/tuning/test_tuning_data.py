"""Training files: what is wrong is named with file and line; what is right is encoded once and hashed; a preview shows
what trains."""

import copy
import json

import pytest
from transformers import AutoTokenizer

from router_tuning.embedded import TINY_LLAMA
from router_tuning.errors import UserError
from router_tuning.tuning import tuning_data
from router_tuning.tuning.encoding import encode_row
from router_tuning.tuning.preview import report
from router_tuning.tuning.tuning_data import check_file, encode_file


def talk(asked, answered=None, **more):
    turns = [("user", asked), ("assistant", answered)][: 1 + (answered is not None)]
    return {**more, "messages": [{"role": role, "content": text} for role, text in turns]}


GOOD, QUESTION = talk("red", "blue"), talk("red")


@pytest.fixture(scope="module")
def tokenizer(parts):
    return AutoTokenizer.from_pretrained(parts["base"])


def write(path, *rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


def test_a_bad_row_is_named_with_its_line(tmp_path):
    path = write(tmp_path / "d.jsonl", GOOD, "", {"text": "x"})
    with pytest.raises(UserError, match=f"^{path}:3.*neither a list of 'messages'"):
        check_file(path, 0)
    assert check_file(path, 1).rows == 1, "rows behind the limit are not read"


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(UserError, match="python entrypoints/data/reformat_datasets.py --raw_data_root data/sample"):
        check_file(tmp_path / "none.jsonl", 0)
    with pytest.raises(UserError, match="holds no conversation"):
        check_file(write(tmp_path / "empty.jsonl", "", ""), 0)


def test_rows_are_encoded_as_the_encoder_does_and_limited(parts, tokenizer):
    data = encode_file(check_file(parts["data"], 5), tokenizer, 100)
    assert len(data.rows) == 5 and data.left_out == ""
    for row, line in zip(data.rows, parts["data"].read_text().splitlines(), strict=False):
        expected = encode_row(json.loads(line), tokenizer, 100)
        assert (row["input_ids"], row["labels"]) == (expected["input_ids"], expected["labels"])
    assert data.lengths == [len(row["input_ids"]) for row in data.rows]
    assert 0 < data.cut == sum(length == 100 for length in data.lengths)
    assert data.largest_id == max(max(row["input_ids"]) for row in data.rows)


def test_rows_that_teach_nothing_are_left_out_and_counted_by_reason(tmp_path, tokenizer):
    system = {"messages": [{"role": "system", "content": "red"}, *GOOD["messages"]]}
    long = talk("red " * 80, "blue")
    path = write(tmp_path / "d.jsonl", QUESTION, GOOD, system, long, QUESTION, {"prompt": "red", "completion": "blue"})
    strict = copy.deepcopy(tokenizer)
    strict.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    strict.chat_template += tokenizer.chat_template
    data = encode_file(check_file(path, 0), strict, 64)
    assert len(data.rows) == 2
    refused = "refused by the chat template: 1 (the chat template refuses this conversation: no system turn)"
    assert data.left_out == f"without assistant text: 2, {refused}, cut before their answer: 1"
    with pytest.raises(UserError, match="no row to learn from within 3 tokens .*cut before their answer: 3"):
        encode_file(check_file(path, 0), strict, 3)


def test_the_same_rows_are_encoded_once_wherever_they_are(tmp_path, tokenizer, monkeypatch):
    """By content, not by name or size; per tokenizer and length."""
    counted = []
    monkeypatch.setattr(tuning_data, "encode_row", lambda *given: counted.append(given) or encode_row(*given))

    def encoded(name, tokenizer=tokenizer, length=64, limit=0):
        return encode_file(check_file(tmp_path / name, limit), tokenizer, length).rows.to_list()

    rows = [{**GOOD, "id": f"{tmp_path} {number}"} for number in range(2)]  # rows that no other test has
    write(tmp_path / "a.jsonl", *rows)
    write(tmp_path / "b.jsonl", *rows)
    assert encoded("a.jsonl") == encoded("b.jsonl") and len(counted) == 2
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["blue"])
    encoded("b.jsonl", length=63), encoded("b.jsonl", limit=1), encoded("b.jsonl", other)
    assert len(counted) == 2 + 2 + 1 + 2
    write(tmp_path / "b.jsonl", *json.loads(json.dumps(rows).replace("blue", "gold")))
    assert encoded("b.jsonl") != encoded("a.jsonl")


def test_the_preview_marks_what_is_trained_and_measures_all_rows(tmp_path, command, capsys):
    rows = [talk("Copy AB", "AB é", dataset="alpaca", id="alpaca_0"), {"prompt": "Copy AB", "completion": "AB"}]
    data = write(tmp_path / "data.jsonl", *rows, talk("Copy " * 40, "AB"))
    given = ["data/preview_data.py", "--tokenizer", TINY_LLAMA, "--data_file", data, "--max_seq_length", "60"]
    assert command(*given) == 0
    told = capsys.readouterr().out
    assert "<|user|>\nCopy AB\n<|assistant|>\n⟦AB é</s>⟧\n" in told and "Copy AB⟦ AB</s>⟧" in told
    assert "── alpaca alpaca_0: " in told and "0 of 60 tokens carry loss" in told
    assert "rows 3, " in told and "so cut: 1 (33.3%)" in told and "cut before their answer: 1" in told
    refusing = "{{ messages[0].tools | tojson }}"
    assert report(data, TINY_LLAMA, 1, 60, refusing).startswith("── alpaca alpaca_0: refused by the chat template: ")
    with pytest.raises(UserError, match=r"no row to measure \(refused by the chat template: 1 \(.*JSON"):
        report(data, TINY_LLAMA, 1, 60, refusing, measured=1)
    write(data, {"messages": 5})
    assert command(*given) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ") and "data.jsonl:1: " in error

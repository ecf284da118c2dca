"""Training files: what is wrong is named with file and line; what is right is encoded once and hashed."""

from __future__ import annotations

import copy
import json

import pytest
from transformers import AutoTokenizer

from router_tuning.errors import UserError
from router_tuning.tuning import tuning_data
from router_tuning.tuning.encoding import encode_conversation, encode_row
from router_tuning.tuning.tuning_data import check_file, encode_file

GOOD = {"messages": [{"role": "user", "content": "red"}, {"role": "assistant", "content": "blue"}]}
QUESTION = {"messages": [{"role": "user", "content": "red"}]}


@pytest.fixture(scope="module")
def tokenizer(parts):
    return AutoTokenizer.from_pretrained(parts["base"])


def write(path, *rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ('{"messages": [', "no JSON"),
        ("[1]", "no JSON object"),
        ({"text": "x"}, "neither a list of 'messages'"),
        ({"messages": []}, "no list of turns"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "'robot'"),
        ({"messages": [{"role": "user"}]}, "no text"),
    ],
)
def test_a_bad_row_is_named_with_its_line(tmp_path, row, fault):
    path = write(tmp_path / "d.jsonl", GOOD, "", row)
    with pytest.raises(UserError) as caught:
        check_file(path, 0)
    assert str(caught.value).startswith(f"{path}:3") and fault in str(caught.value)
    assert check_file(path, 1).rows == 1, "rows behind the limit are not read"


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(UserError, match="python entrypoints/data/reformat_datasets.py --raw_data_root data/sample"):
        check_file(tmp_path / "none.jsonl", 0)
    with pytest.raises(UserError, match="holds no conversation"):
        check_file(write(tmp_path / "empty.jsonl", "", ""), 0)


def test_rows_are_encoded_as_the_encoder_does_and_limited(tmp_path, parts, tokenizer):
    data = encode_file(check_file(parts["data"], 5), tokenizer, 100)
    assert len(data.rows) == 5 and data.left_out == ""
    for row, line in zip(data.rows, parts["data"].read_text().splitlines(), strict=False):
        expected = encode_conversation(json.loads(line)["messages"], tokenizer, 100)
        assert (row["input_ids"], row["labels"]) == (expected["input_ids"], expected["labels"])
    assert data.lengths == [len(row["input_ids"]) for row in data.rows]
    assert 0 < data.cut == sum(length == 100 for length in data.lengths)
    assert data.largest_id == max(max(row["input_ids"]) for row in data.rows)


def test_prompt_and_completion_rows_train_too(tmp_path, tokenizer):
    path = write(tmp_path / "d.jsonl", {"prompt": "red", "completion": "blue"}, GOOD)
    assert len(encode_file(check_file(path, 0), tokenizer, 64).rows) == 2


def test_rows_that_teach_nothing_are_left_out_and_counted_by_reason(tmp_path, tokenizer):
    system = {"messages": [{"role": "system", "content": "red"}, *GOOD["messages"]]}
    long = {"messages": [{"role": "user", "content": "red " * 80}, *GOOD["messages"][1:]]}
    path = write(tmp_path / "d.jsonl", QUESTION, GOOD, system, long, QUESTION)
    strict = copy.deepcopy(tokenizer)
    strict.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    strict.chat_template += tokenizer.chat_template
    data = encode_file(check_file(path, 0), strict, 64)
    assert len(data.rows) == 1
    refused = "refused by the chat template: 1 (the chat template refuses this conversation: no system turn)"
    assert data.left_out == f"without assistant text: 2, {refused}, cut before their answer: 1"
    with pytest.raises(UserError, match="no row to learn from within 3 tokens .*cut before their answer: 2"):
        encode_file(check_file(path, 0), strict, 3)


def test_a_changed_file_of_the_same_size_is_not_taken_from_the_cache(tmp_path, tokenizer):
    path = write(tmp_path / "d.jsonl", GOOD)
    before = encode_file(check_file(path, 0), tokenizer, 64)
    write(path, json.loads(json.dumps(GOOD).replace("blue", "gold")))
    after = encode_file(check_file(path, 0), tokenizer, 64)
    assert before.raw.sha256 != after.raw.sha256
    assert before.rows[0]["input_ids"] != after.rows[0]["input_ids"]


def test_the_same_rows_are_encoded_once_wherever_they_are(tmp_path, tokenizer, monkeypatch):
    """Per tokenizer, length and template; by content, not by name."""
    calls = []

    def counted(row, *arguments):
        calls.append(row)
        return encode_row(row, *arguments)

    monkeypatch.setattr(tuning_data, "encode_row", counted)
    rows = [{**GOOD, "id": f"{tmp_path} {number}"} for number in range(2)]  # rows that no other test has
    first = encode_file(check_file(write(tmp_path / "a.jsonl", *rows), 0), tokenizer, 64)
    assert len(calls) == 2
    again = encode_file(check_file(write(tmp_path / "b.jsonl", *rows), 0), tokenizer, 64)
    assert len(calls) == 2 and again.rows.to_list() == first.rows.to_list()
    encode_file(check_file(tmp_path / "b.jsonl", 0), tokenizer, 63)
    assert len(calls) == 4
    encode_file(check_file(tmp_path / "b.jsonl", 1), tokenizer, 64)
    assert len(calls) == 5
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["blue"])
    encode_file(check_file(tmp_path / "b.jsonl", 0), other, 64)
    assert len(calls) == 7

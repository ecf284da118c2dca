"""Training files: what is wrong is named with file and line; what is right is encoded once and hashed; micro-batches
are the same for any number of processes; a preview shows what trains."""

import copy
import json

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler
from transformers import AutoTokenizer

from router_tuning.embedded import TINY_LLAMA
from router_tuning.errors import UserError
from router_tuning.tuning import tuning_data
from router_tuning.tuning.batching import Collator, StepOrder
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
    assert check_file(write(tmp_path / "d.jsonl", f"\ufeff{json.dumps(GOOD)}"), 0).rows == 1, "as Windows writes it"


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


# ---- rows in batches

LENGTHS = [int(n) for n in torch.randint(5, 200, (100,), generator=torch.Generator().manual_seed(0))]


def micro_batches(size=4, seed=1, epoch=0, **options):
    """All of an epoch, in steps of 16 rows."""
    order = StepOrder(LENGTHS, 16, seed, **options)
    order.set_epoch(epoch)
    return BatchSampler(order, batch_size=size, drop_last=False)


def test_grouping_changes_the_order_within_a_step_only():
    for ours, theirs in zip(micro_batches(16), micro_batches(16, group=False), strict=True):
        assert sorted(ours) == sorted(theirs) and ours != theirs
        assert [LENGTHS[row] for row in ours] == sorted((LENGTHS[row] for row in ours), reverse=True)


def test_seed_and_epoch_decide_the_order_of_an_epoch_which_uses_each_row_at_most_once():
    first, again, other, later = (sum(micro_batches(**o), []) for o in ({}, {}, {"seed": 2}, {"epoch": 1}))
    assert len(first) == len(set(first)) == 96 and first == again
    assert first != other and first != later


@pytest.mark.parametrize("world", [2, 4])
def test_processes_share_the_micro_batches_of_one(world):
    whole, ranks = list(micro_batches()), range(world)
    shares = [list(BatchSamplerShard(micro_batches(), num_processes=world, process_index=rank)) for rank in ranks]
    assert all(len(mine) * world == len(whole) for mine in shares)
    for step in range(6):
        together = [batch for mine in shares for batch in mine[step * 4 // world : (step + 1) * 4 // world]]
        assert sorted(together) == sorted(whole[step * 4 : (step + 1) * 4])


def test_collator_pads_on_the_right_and_masks(tokenizer):
    batch = Collator(tokenizer)([{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8], "labels": [8]}])
    pad = tokenizer.pad_token_id
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, pad, pad]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]
    assert batch["prompt_length"].tolist() == [1, 0]


# ---- preview


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

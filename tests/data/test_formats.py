"""The six converters and the policy: every branch, and equality with the published converter."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from raw_data import SHARED, published, read_jsonl, sample_rows, write_rows

from router_tuning.data.formats import FORMATS
from router_tuning.data.policy import FILTERED, Reject, json_type

CONVERSATIONS = ("vicuna_sharegpt", "evol_instruct", "slim_orca")
PAIRS = {"meta_math_qa": ("query", "response"), "evol_code_alpaca": ("instruction", "output")}


def talk(*turns: tuple[object, object], **extra: object) -> dict:
    return {"conversations": [{"from": sender, "value": value, **extra} for sender, value in turns]}


def refusal(name: str, row: dict) -> str:
    with pytest.raises(Reject) as caught:
        FORMATS[name].convert(row)
    assert caught.value.detail
    return caught.value.reason


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("human", ["human", "user"])
@pytest.mark.parametrize("gpt", ["gpt", "chatgpt"])
def test_senders_become_roles(name: str, human: str, gpt: str):
    made = FORMATS[name].convert(talk((human, "q"), (gpt, "a"), (human, " q2 "), (gpt, "b"), weight=1.0))
    assert made == [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": " q2 "},
        {"role": "assistant", "content": "b"},
    ]


def test_senders_of_one_set_only():
    assert FORMATS["vicuna_sharegpt"].convert(talk(("human", "q"), ("bard", "a")))[1]["role"] == "assistant"
    for name in ("evol_instruct", "slim_orca"):
        assert refusal(name, talk(("human", "q"), ("bard", "a"))) == "unknown_sender"
    for name in ("vicuna_sharegpt", "slim_orca"):
        assert FORMATS[name].convert(talk(("system", "s"), ("human", "q"), ("gpt", "a")))[0]["role"] == "system"
    assert refusal("evol_instruct", talk(("system", "s"), ("human", "q"), ("gpt", "a"))) == "system_turn"
    for name in ("vicuna_sharegpt", "evol_instruct"):
        assert refusal(name, talk(("human", "q"), ("bing", "a"))) == "bing_sender"
    assert refusal("slim_orca", talk(("human", "q"), ("bing", "a"))) == "unknown_sender"


def test_irregular_conversations_that_are_kept_as_they_are():
    for turns in (
        [("gpt", "first"), ("human", "q"), ("gpt", "a")],
        [("human", "q"), ("human", "q2"), ("gpt", "a"), ("gpt", "b")],
        [("human", "q"), ("gpt", "a"), ("system", "s"), ("human", "q"), ("gpt", "a")],
        [("human", "q"), ("gpt", "a"), ("human", "open end")],
        [("gpt", "alone")],
    ):
        row = talk(*turns)
        assert FORMATS["vicuna_sharegpt"].convert(row) == published("vicuna_sharegpt", [row])[0]["messages"]


def test_blank_system_turns_are_left_out_and_the_row_kept():
    made = FORMATS["slim_orca"].convert(talk(("system", " \n"), ("human", "q"), ("gpt", "a"), ("system", "s")))
    assert [turn["role"] for turn in made] == ["user", "assistant", "system"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (talk(("human", "q"), ("gpt", "")), "empty_turn"),
        (talk(("human", " \t\n\u2003"), ("gpt", "a")), "empty_turn"),
        (talk(("human", "q")), "no_assistant"),
        (talk(("system", "s")), "no_assistant"),
        (talk(("system", " ")), "no_assistant"),
        (talk(), "empty_conversation"),
        (talk(("human", "q"), ("martian", "a")), "unknown_sender"),
        (talk(("human", "q"), (5, "a")), "wrong_type"),
        (talk(("human", "q"), (None, "a")), "wrong_type"),
        (talk(("human", "q"), (["gpt"], "a")), "wrong_type"),
        (talk(("human", "q"), ("gpt", 5)), "wrong_type"),
        (talk(("human", "q"), ("gpt", None)), "wrong_type"),
        (talk(("human", "q"), ("gpt", ["a"])), "wrong_type"),
        ({}, "missing_field"),
        ({"conversations": None}, "wrong_type"),
        ({"conversations": "human: q"}, "wrong_type"),
        ({"conversations": {}}, "wrong_type"),
        ({"conversations": 1.5}, "wrong_type"),
        ({"conversations": ["q", "a"]}, "wrong_type"),
        ({"conversations": [None]}, "wrong_type"),
        ({"conversations": [[]]}, "wrong_type"),
        ({"conversations": [{"value": "q"}]}, "missing_field"),
        ({"conversations": [{"from": "gpt"}]}, "missing_field"),
    ],
)
def test_conversations_that_are_left_out(row: dict, reason: str):
    assert refusal("vicuna_sharegpt", row) == reason


@pytest.mark.parametrize("name", PAIRS)
def test_pairs(name: str):
    question, answer = PAIRS[name]
    made = FORMATS[name].convert({question: " q\n", answer: "a", "more": 1})
    assert made == [{"role": "user", "content": " q\n"}, {"role": "assistant", "content": "a"}]
    assert refusal(name, {question: "q"}) == "missing_field"
    assert refusal(name, {answer: "a"}) == "missing_field"
    assert refusal(name, {question: "q", answer: " "}) == "empty_turn"
    assert refusal(name, {question: "", answer: "a"}) == "empty_turn"
    for bad in (None, 1, True, [], {}):
        assert refusal(name, {question: "q", answer: bad}) == "wrong_type"
        assert refusal(name, {question: bad, answer: "a"}) == "wrong_type"


def test_alpaca_input_follows_the_instruction():
    convert = FORMATS["alpaca"].convert
    assert convert({"instruction": "i", "input": "x", "output": "o"})[0]["content"] == "i\nInput: x\n"
    assert convert({"instruction": "i", "input": " ", "output": "o"})[0]["content"] == "i\nInput:  \n"
    for row in ({"input": ""}, {"input": None}, {}):
        assert convert({"instruction": "i", "output": "o", **row})[0]["content"] == "i"
    assert refusal("alpaca", {"instruction": "i", "input": 3, "output": "o"}) == "wrong_type"
    assert refusal("alpaca", {"instruction": "i", "input": "", "output": "\n"}) == "empty_turn"
    assert refusal("alpaca", {"instruction": "", "input": "", "output": "o"}) == "empty_turn"
    assert refusal("alpaca", {"input": "", "output": "o"}) == "missing_field"


def test_names_of_json_types():
    values = (True, "s", {}, [], 1, 1.5, None)
    assert [json_type(value) for value in values] == [
        "a boolean", "a string", "an object", "an array", "a number", "a number", "null"
    ]  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_result_equals_the_published_one(name: str, convert, tmp_path):
    rows = sample_rows(name, 40)
    folder = convert(name, write_rows(tmp_path / "raw" / name, rows, ".jsonl"))
    assert read_jsonl(folder / "data.jsonl") == published(name, rows)
    assert (folder / "rejects.jsonl").read_bytes() == b""


def source_rows(path) -> list[dict]:
    text = path.read_text(encoding="utf-8")
    return (
        json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.split("\n") if line]
    )


@pytest.mark.parametrize("folder", ["raw/" + name for name in FORMATS] + ["raw_alt/meta_math_qa_gsm8k_train"])
def test_real_files(folder: str, convert):
    """Accepted rows equal the published ones in content and order; the others are the listed rejects, all blank."""
    place = SHARED / folder
    if not place.is_dir():
        pytest.skip("the shared real data are not here")
    check_real(place, next(name for name in FORMATS if name in folder), convert)


@pytest.mark.parametrize("name", FORMATS)
def test_sample_files(name: str, convert, root):
    check_real(root / "data" / "sample" / "raw" / name, name, convert)


def check_real(place, name: str, convert):
    rows = [row for path in sorted(place.iterdir()) for row in source_rows(path)]
    folder = convert(name, place)
    made, rejects = read_jsonl(folder / "data.jsonl"), read_jsonl(folder / "rejects.jsonl")
    assert len(made) + len(rejects) == len(rows)
    refused = {reject["id"]: reject for reject in rejects}
    assert made == [row for row in published(name, rows) if row["id"] not in refused]
    label = FORMATS[name].label
    for number, row in enumerate(rows):
        if reject := refused.get(f"{label}_{number}"):
            assert reject["reason"] == "empty_turn" and reject["row"] == row
            assert any(not turn["content"].strip() for turn in published(name, [row])[0]["messages"])


TEXT = st.text(alphabet='ab \n"\\é\u2028🙂', max_size=4)
ANY = st.recursive(st.none() | st.booleans() | st.integers(-9, 9) | st.floats(-1, 1) | TEXT, st.lists, max_leaves=3)
SENDER = st.sampled_from(["human", "gpt", "system", "user", "chatgpt", "bard", "bing", "robot"])
TURN = st.fixed_dictionaries({"from": SENDER, "value": TEXT}) | st.dictionaries(
    st.sampled_from(["from", "value", "x"]), ANY, max_size=3
)
ROW = st.fixed_dictionaries({"conversations": st.lists(TURN, max_size=4)}) | st.dictionaries(
    st.sampled_from(["conversations", "query", "response", "instruction", "input", "output", "z"]),
    ANY | TEXT,
    max_size=5,
)


@settings(max_examples=2000, deadline=None)
@given(row=ROW)
def test_any_row_is_as_published_or_left_out_for_a_reason_that_holds(row: dict):
    """Each row as one of each of the six sets: 12,000 cases."""
    for name, known in FORMATS.items():
        try:
            messages = known.convert(row)
        except Reject as reject:
            assert reject.detail and isinstance(reject.reason, str)
            check_reason(name, row, reject.reason)
            continue
        assert messages and all(turn["content"].strip() for turn in messages)
        (expected,) = published(name, [with_input(row)])
        kept = [turn for turn in expected["messages"] if turn["content"].strip() or turn["role"] != "system"]
        assert messages == kept


def with_input(row: dict) -> dict:
    """Without the null or absent input that the published converter does not know."""
    return {**row, "input": ""} if row.get("input") is None else row


def check_reason(name: str, row: dict, reason: str) -> None:
    """A filtered row is one that the published converter gets through; a refused one has a fault in its fields."""
    try:
        made = published(name, [with_input(row)])
        texts = [turn["content"] for whole in made for turn in whole["messages"]]
        sound = all(isinstance(text, str) for text in texts)
    except (KeyError, TypeError):
        made, texts, sound = [], [], False
    if reason in ("bing_sender", "system_turn"):
        assert any(turn.get("from") in ("bing", "system") for turn in row["conversations"] if isinstance(turn, dict))
    elif reason == "empty_conversation":
        assert row["conversations"] == []
    elif reason in FILTERED:
        blank = any(isinstance(text, str) and not text.strip() for text in texts) or not sound
        assert blank if reason == "empty_turn" else all(turn["role"] != "assistant" for turn in made[0]["messages"])
    else:
        assert not sound or not made

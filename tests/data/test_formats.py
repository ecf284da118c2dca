"""The converters and the policy: every branch, and equality with the published converter."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
from raw_data import SHARED, SIX, published, read_jsonl

from router_tuning.data.acceptance import Reject
from router_tuning.data.formats import FORMATS

CONVERSATIONS = ("vicuna_sharegpt", "evol_instruct", "slim_orca")
PAIRS = {"meta_math_qa": ("query", "response"), "evol_code_alpaca": ("instruction", "output")}


def talk(*turns: tuple[object, object], **extra: object) -> dict:
    return {"conversations": [{"from": sender, "value": value, **extra} for sender, value in turns]}


def messages(name: str, row: dict) -> list[dict]:
    return FORMATS[name].convert(row)["messages"]


def refusal(name: str, row: dict) -> str:
    with pytest.raises(Reject) as caught:
        messages(name, row)
    assert caught.value.detail
    return caught.value.reason


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_senders_become_roles(name: str):
    turns = [("human", "q"), ("gpt", "a"), ("user", " q2 "), ("chatgpt", "b")]
    made = messages(name, talk(*turns, weight=1.0))
    assert [turn["role"] for turn in made] == ["user", "assistant"] * 2
    assert [turn["content"] for turn in made] == [text for _, text in turns]
    roles = {
        "vicuna_sharegpt": {"bard": "assistant", "system": "system", "bing": "bing_sender"},
        "evol_instruct": {"bard": "unknown_sender", "system": "system_turn", "bing": "bing_sender"},
        "slim_orca": {"bard": "unknown_sender", "system": "system", "bing": "unknown_sender"},
    }
    for sender, wanted in roles[name].items():
        row = talk(("human", "q"), (sender, "s"), ("gpt", "a"))
        assert wanted == (refusal(name, row) if "_" in wanted else messages(name, row)[1]["role"])


@pytest.mark.parametrize(
    "turns",
    [
        [("gpt", "first"), ("human", "q"), ("gpt", "a")],
        [("human", "q"), ("human", "q2"), ("gpt", "a"), ("gpt", "b")],
        [("human", "q"), ("gpt", "a"), ("system", "s"), ("human", "q"), ("gpt", "a")],
        [("human", "q"), ("gpt", "a"), ("human", "open end")],
        [("gpt", "alone")],
    ],
)
def test_irregular_conversations_that_are_kept_as_they_are(turns: list):
    row = talk(*turns)
    assert messages("vicuna_sharegpt", row) == published("vicuna_sharegpt", [row])[0]["messages"]


def test_blank_system_turns_are_left_out_and_the_row_kept():
    made = messages("slim_orca", talk(("system", " \n"), ("human", "q"), ("gpt", "a"), ("system", "s")))
    assert [turn["role"] for turn in made] == ["user", "assistant", "system"]


LEFT_OUT = {
    "empty_turn": [talk(("human", "q"), ("gpt", "")), talk(("human", " \t\n\u2003"), ("gpt", "a"))],
    "no_assistant": [talk(("human", "q")), talk(("system", "s")), talk(("system", " "))],
    "empty_conversation": [talk()],
    "unknown_sender": [talk(("human", "q"), ("martian", "a"))],
    "wrong_type": [
        *[talk(("human", "q"), (sender, "a")) for sender in (5, None, ["gpt"])],
        *[talk(("human", "q"), ("gpt", text)) for text in (5, None, ["a"])],
        *[{"conversations": odd} for odd in (None, "human: q", {}, 1.5, ["q", "a"], [None], [[]])],
    ],
    "missing_field": [{}, {"conversations": [{"value": "q"}]}, {"conversations": [{"from": "gpt"}]}],
}


@pytest.mark.parametrize(("reason", "row"), [(reason, row) for reason, rows in LEFT_OUT.items() for row in rows])
def test_conversations_that_are_left_out(row: dict, reason: str):
    assert refusal("vicuna_sharegpt", row) == reason


@pytest.mark.parametrize("name", PAIRS)
def test_pairs(name: str):
    question, answer = PAIRS[name]
    made = messages(name, {question: " q\n", answer: "a", "more": 1})
    assert made == [{"role": "user", "content": " q\n"}, {"role": "assistant", "content": "a"}]
    assert refusal(name, {question: "q"}) == "missing_field"
    assert refusal(name, {answer: "a"}) == "missing_field"
    assert refusal(name, {question: "q", answer: " "}) == "empty_turn"
    assert refusal(name, {question: "", answer: "a"}) == "empty_turn"
    for bad in (None, 1, True, [], {}):
        assert refusal(name, {question: "q", answer: bad}) == "wrong_type"
        assert refusal(name, {question: bad, answer: "a"}) == "wrong_type"


def test_alpaca_input_follows_the_instruction():
    convert = partial(messages, "alpaca")
    assert convert({"instruction": "i", "input": "x", "output": "o"})[0]["content"] == "i\nInput: x\n"
    assert convert({"instruction": "i", "input": " ", "output": "o"})[0]["content"] == "i\nInput:  \n"
    for row in ({"input": ""}, {"input": None}, {}):
        assert convert({"instruction": "i", "output": "o", **row})[0]["content"] == "i"
    assert refusal("alpaca", {"instruction": "i", "input": 3, "output": "o"}) == "wrong_type"
    assert refusal("alpaca", {"instruction": "i", "input": "", "output": "\n"}) == "empty_turn"
    assert refusal("alpaca", {"instruction": "", "input": "", "output": "o"}) == "empty_turn"
    assert refusal("alpaca", {"input": "", "output": "o"}) == "missing_field"


def test_plain_text_goes_without_a_prompt():
    assert FORMATS["c4"].convert({"text": " a\n", "url": "u"}) == {"prompt": "", "completion": " a\n"}
    assert refusal("c4", {"text": " \n"}) == "empty_turn"
    assert refusal("c4", {"text": 1}) == "wrong_type"


def source_rows(path: Path) -> list[dict]:
    text = path.read_text(encoding="utf-8").strip()
    return json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.split("\n") if line]


REAL = [SHARED / "raw" / name for name in SIX] + [SHARED / "raw_alt" / "meta_math_qa_gsm8k_train"]
SAMPLES = [Path(__file__).parents[2] / "data" / "sample" / "raw" / name for name in SIX]


@pytest.mark.parametrize("place", [*REAL, *SAMPLES], ids=lambda place: f"{place.parent.name}-{place.name}")
def test_whole_files(place: Path, convert):
    """Accepted rows equal the published ones in content and order; the others are the listed rejects, all blank."""
    if not place.is_dir():
        pytest.skip("the shared real data are not here")
    name = next(name for name in FORMATS if place.name.startswith(name))
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

"""The converters and the policy: why rows are left out, and equality with the published converter."""

import json
from pathlib import Path

import pytest
from raw_data import SHARED, SIX, published, read_jsonl

from router_tuning.data.acceptance import Reject
from router_tuning.data.formats import FORMATS
from router_tuning.places import ROOT


def talk(*turns: tuple[object, object]) -> dict:
    return {"conversations": [{"from": sender, "value": value} for sender, value in turns]}


ASKED, ANSWERED = ("human", "q"), ("gpt", "a")
PAIR = {"query": "q", "response": "a"}
ALPACA = {"instruction": "i", "input": "", "output": "o"}
KEPT = [
    ("vicuna_sharegpt", talk(("user", " q "), ("chatgpt", "a"), ASKED, ("bard", "b"))),
    ("vicuna_sharegpt", talk(ANSWERED, ASKED, ASKED, ANSWERED, ANSWERED, ("system", "s"), ASKED)),
    ("evol_instruct", talk(ASKED, ANSWERED)),
    ("slim_orca", talk(("system", "s"), ASKED, ANSWERED)),
    ("meta_math_qa", {"query": " q\n", "response": " a\n", "more": 1}),
    ("evol_code_alpaca", {"instruction": " q\n", "output": " a\n"}),
    *[("alpaca", ALPACA | {"input": given}) for given in ("", "x", " ")],
]


@pytest.mark.parametrize(("name", "row"), KEPT)
def test_rows_that_are_kept_are_as_published(name, row):
    assert FORMATS[name].convert(row)["messages"] == published(name, [row])[0]["messages"]


def test_what_is_kept_in_a_form_of_its_own():
    exchange = [{"role": "user", "content": "i"}, {"role": "assistant", "content": " a\n"}]
    for row in ({"input": None}, {}):  # where the published converter stops, or writes None
        assert FORMATS["alpaca"].convert({"instruction": "i", "output": " a\n", **row}) == {"messages": exchange}
    made = FORMATS["slim_orca"].convert(talk(("system", " \n"), ASKED, ANSWERED, ("system", "s")))["messages"]
    assert [turn["role"] for turn in made] == ["user", "assistant", "system"], "a blank system turn is left out"
    assert FORMATS["c4"].convert({"text": " a\n", "url": "u"}) == {"prompt": "", "completion": " a\n"}


LEFT_OUT = {
    "bing_sender": [(name, talk(ASKED, ("bing", "a"))) for name in ("vicuna_sharegpt", "evol_instruct")],
    "system_turn": [("evol_instruct", talk(("system", "s"), ASKED, ANSWERED))],
    "empty_turn": [
        ("vicuna_sharegpt", talk(ASKED, ("gpt", ""))),
        ("vicuna_sharegpt", talk(("human", " \t\n\u2003"), ("gpt", "a"))),
        ("meta_math_qa", PAIR | {"query": ""}),
        ("alpaca", ALPACA | {"output": "\n"}),
        ("c4", {"text": " \n"}),
    ],
    "no_assistant": [("slim_orca", talk(turn)) for turn in (ASKED, ("system", "s"), ("system", " "))],
    "empty_conversation": [("slim_orca", talk())],
    "unknown_sender": [
        *[("slim_orca", talk(ASKED, (sender, "a"))) for sender in ("martian", "bing", "bard")],
        ("evol_instruct", talk(ASKED, ("bard", "a"))),
    ],
    "wrong_type": [
        *[("vicuna_sharegpt", talk(ASKED, (sender, "a"))) for sender in (5, None, ["gpt"])],
        *[("vicuna_sharegpt", talk(ASKED, ("gpt", text))) for text in (5, None, ["a"])],
        *[("vicuna_sharegpt", {"conversations": odd}) for odd in (None, "q", {}, 1.5, ["q"], [None], [[]])],
        *[("meta_math_qa", PAIR | {"query": odd}) for odd in (None, 1, True, [], {})],
        ("alpaca", ALPACA | {"input": 3}),
        ("c4", {"text": 1}),
    ],
    "missing_field": [
        *[
            ("slim_orca", row)
            for row in ({}, {"conversations": [{"value": "q"}]}, {"conversations": [{"from": "gpt"}]})
        ],
        *[("evol_code_alpaca", row) for row in ({"instruction": "q"}, {"output": "a"})],
        ("alpaca", {"input": "", "output": "o"}),
    ],
}


@pytest.mark.parametrize(
    ("reason", "name", "row"), [(reason, *case) for reason, cases in LEFT_OUT.items() for case in cases]
)
def test_rows_that_are_left_out(reason, name, row):
    with pytest.raises(Reject) as caught:
        FORMATS[name].convert(row)
    assert caught.value.reason == reason and caught.value.detail


def source_rows(path: Path) -> list[dict]:
    text = path.read_text(encoding="utf-8").strip()
    return json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.split("\n") if line]


REAL = [SHARED / "raw" / name for name in SIX] + [SHARED / "raw_alt" / "meta_math_qa_gsm8k_train"]
SAMPLES = [ROOT / "data/sample/raw" / name for name in SIX]


@pytest.mark.parametrize("place", [*REAL, *SAMPLES], ids=lambda place: f"{place.parent.name}-{place.name}")
def test_whole_files(place, convert):
    """Accepted rows equal the published ones in content and order; the others are the listed rejects, all blank."""
    if not place.is_dir():
        pytest.skip("the shared real data are not here")
    name = next(name for name in FORMATS if place.name.startswith(name))
    rows = [row for path in sorted(place.iterdir()) for row in source_rows(path)]
    folder = convert(name, place)
    made, rejects = read_jsonl(folder / "data.jsonl"), read_jsonl(folder / "rejects.jsonl")
    refused = {reject["id"]: reject for reject in rejects}
    whole = published(name, rows)
    assert made == [row for row in whole if row["id"] not in refused] and len(made) + len(rejects) == len(rows)
    for number, row in enumerate(rows):
        if reject := refused.get(f"{FORMATS[name].label}_{number}"):
            assert reject["reason"] == "empty_turn" and reject["row"] == row
            assert any(not turn["content"].strip() for turn in published(name, [row])[0]["messages"])

"""The converters and the policy: why rows are left out; all others are as published, in random and in real files."""

import json
import random
from pathlib import Path

import pytest
from raw_data import NO_LIMIT, SHARED, SIX, published, read_jsonl, sample_rows

from router_tuning.data.acceptance import Reject
from router_tuning.data.formats import FORMATS


def talk(*turns: tuple[object, object]) -> dict:
    return {"conversations": [{"from": sender, "value": value} for sender, value in turns]}


def test_what_is_kept_in_a_form_of_its_own():
    exchange = [{"role": "user", "content": "i"}, {"role": "assistant", "content": " a\n"}]
    for row in ({"input": None}, {}):  # where the published converter stops, or writes None
        assert FORMATS["alpaca"].convert({"instruction": "i", "output": " a\n", **row}) == {"messages": exchange}
    made = FORMATS["slim_orca"].convert(talk(("system", " \n"), ASKED, ("gpt", "a"), ("system", "s")))["messages"]
    assert [turn["role"] for turn in made] == ["user", "assistant", "system"], "a blank system turn is left out"
    assert FORMATS["c4"].convert({"text": " a\n", "url": "u"}) == {"prompt": "", "completion": " a\n"}


ASKED = ("human", "q")
PAIR = {"query": "q", "response": "a"}
ALPACA = {"instruction": "i", "input": "", "output": "o"}
LEFT_OUT = {
    "bing_sender": [(name, talk(ASKED, ("bing", "a"))) for name in ("vicuna_sharegpt", "evol_instruct")],
    "system_turn": [("evol_instruct", talk(("system", "s"), ASKED, ("gpt", "a")))],
    "empty_turn": [
        ("vicuna_sharegpt", talk(ASKED, ("gpt", ""))),
        ("vicuna_sharegpt", talk(("human", " \t\n\u2003"), ("gpt", "a"))),
        ("meta_math_qa", PAIR | {"query": ""}),
        ("alpaca", ALPACA | {"output": "\n"}),
        ("c4", {"text": " \n"}),
    ],
    "no_assistant": [("slim_orca", talk(turn)) for turn in (ASKED, ("system", "s"), ("system", " "))],
    "empty_conversation": [("slim_orca", talk())],
    "unknown_sender": [("slim_orca", talk(ASKED, (sender, "a"))) for sender in ("martian", "bing", "bard")],
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


# ---- random rows, sound and faulty: what the published rules accept comes out, the rest is listed, in order

ROWS = 2000
TEXTS = ["", " ", "\n\u2003", "plain", 'a "quoted"\n\ttext', "\\", "é世界🙂\u2028", "},{", '"id":', "\0\x7f", "\ud83d"]
THINGS = [None, True, False, 0, -7, 1.5, float("nan"), 10**30, [], {}, ["x"], {"from": "gpt"}, [[[]]], "text"]
SENDERS = ["human", "gpt", "user", "chatgpt", "system", "bard", "bing", "robot", "", "Human"]
FIELDS = ["conversations", "query", "response", "instruction", "input", "output"]


def random_line(name: str, draw: random.Random) -> bytes:
    """Half of them sound; the others with every kind of fault, in the row or in its bytes."""
    row: object = dict(draw.choice(sample_rows(name, 30)))
    for _ in range(draw.choice([0, 0, 1, 1, 2])):
        row = changed(row, draw)
    line = json.dumps(row, ensure_ascii=draw.random() < 0.5).encode("utf-8", "surrogatepass")
    if draw.random() < 0.1:
        at = draw.randrange(len(line) + 1)
        damage = draw.choice([b"\xff", b"\x00", b"\xed\xa0\x80", b"\\", b'"', b"}", b"{}", b"\xc3", b""])
        line = line[:at] + damage + (line[at:] if draw.random() < 0.6 else b"")
    return line.replace(b"\n", b"")


def changed(row: object, draw: random.Random) -> object:
    """The row with one thing in it replaced, added or taken away."""
    if not isinstance(row, dict) or draw.random() < 0.05:
        return draw.choice(THINGS)
    turns = row.get("conversations")
    if isinstance(turns, list) and turns and draw.random() < 0.8:
        at, kind, turns = draw.randrange(len(turns)), draw.randrange(5), list(turns)
        if kind == 0 or not isinstance(turns[at], dict):
            turns[at] = draw.choice(THINGS)
        elif kind == 1:
            turns.insert(at, {"from": draw.choice(SENDERS), "value": draw.choice(TEXTS)})
        elif kind == 2:
            del turns[at]
        else:
            turns[at] = changed_field(turns[at], ["from", "value", "extra"], draw)
        return {**row, "conversations": turns}
    return changed_field(row, [*row, *FIELDS, "extra"], draw)


def changed_field(row: dict, keys: list[str], draw: random.Random) -> dict:
    key = draw.choice(keys)
    if draw.random() < 0.2:
        return {other: value for other, value in row.items() if other != key}
    return {**row, key: draw.choice(SENDERS if key == "from" and draw.random() < 0.7 else TEXTS + THINGS)}


def slow_result(name: str, number: int, line: bytes) -> dict | None:
    """The row that the published rules make of a line, without blank system turns; None if it is to be left out."""
    try:
        row = json.loads(line.decode("utf-8"))
        if name == "alpaca" and row.get("input") is None:
            row["input"] = ""  # the published converter stops at a row without it
        (made,) = published(name, [row])
        turns = [turn for turn in made["messages"] if turn["role"] != "system" or turn["content"].strip()]
        json.dumps(turns, ensure_ascii=False).encode("utf-8")
        blank = any(not turn["content"].strip() for turn in turns)
    except (ValueError, KeyError, TypeError, AttributeError):  # among them a content that is no text
        return None
    if blank or all(turn["role"] != "assistant" for turn in turns):
        return None
    return {"dataset": made["dataset"], "id": f"{made['dataset']}_{number}", "messages": turns}


@pytest.mark.parametrize("name", SIX)
def test_every_line_is_accepted_as_published_or_listed(name, tmp_path, convert):
    draw = random.Random(name)
    lines = [random_line(name, draw) for _ in range(ROWS)]
    ending = draw.choice([b"\n", b"\r\n"])
    path = tmp_path / "rows.jsonl"
    path.write_bytes(ending.join(lines) + draw.choice([b"", ending]))
    held = [(number, line) for number, line in enumerate(lines, 1) if line.strip(b" \t\r\n")]
    results = [slow_result(name, index, line) for index, (_, line) in enumerate(held)]
    wanted = [row for row in results if row is not None]
    assert ROWS // 4 < len(wanted) < ROWS * 3 // 4
    folder = convert(name, path, **NO_LIMIT)
    assert read_jsonl(folder / "data.jsonl") == wanted
    rejects, label = read_jsonl(folder / "rejects.jsonl"), FORMATS[name].label
    refused = [(f"{label}_{i}", held[i][0]) for i, row in enumerate(results) if row is None]
    assert [(reject["id"], reject["line"]) for reject in rejects] == refused
    assert all(reject["reason"] and reject["detail"] and ("row" in reject or "text" in reject) for reject in rejects)


# ---- real files


def source_rows(path: Path) -> list[dict]:
    text = path.read_text(encoding="utf-8").strip()
    return json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.split("\n") if line]


REAL = [SHARED / "raw" / name for name in SIX] + [SHARED / "raw_alt" / "meta_math_qa_gsm8k_train"]
SAMPLES = [Path(__file__).parents[2] / "data" / "sample" / "raw" / name for name in SIX]


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

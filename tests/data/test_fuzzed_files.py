"""Files of random rows, sound and faulty: what the published rules accept comes out, the rest is listed, in order."""

import json
import random
from pathlib import Path

import pytest
from raw_data import NO_LIMIT, SIX, published, read_jsonl, sample_rows

from router_tuning.data.formats import FORMATS

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
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    if not all(isinstance(turn["content"], str) for turn in made["messages"]):
        return None
    turns = [turn for turn in made["messages"] if turn["role"] != "system" or turn["content"].strip()]
    roles = {turn["role"] for turn in turns}
    if "assistant" not in roles or any(not turn["content"].strip() for turn in turns):
        return None
    try:
        json.dumps(turns, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return None
    return {"dataset": made["dataset"], "id": f"{made['dataset']}_{number}", "messages": turns}


@pytest.mark.parametrize("name", SIX)
def test_every_line_is_accepted_as_published_or_listed(name: str, tmp_path: Path, convert):
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
    rejects = read_jsonl(folder / "rejects.jsonl")
    refused = [
        (f"{FORMATS[name].label}_{index}", number)
        for index, ((number, _), row) in enumerate(zip(held, results, strict=True))
        if row is None
    ]
    assert [(reject["id"], reject["line"]) for reject in rejects] == refused
    assert all(reject["reason"] and reject["detail"] and ("row" in reject or "text" in reject) for reject in rejects)

"""Raw data sets in every container, and the rules of the published converter written down once more, slowly."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from router_tuning.data.formats import FORMATS
from router_tuning.data.reformat import Outcome, Settings, reformat_one

SHARED = Path(os.environ.get("REAL_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")
"""Real data sets, as ``raw/<name>/`` and ``raw_alt/<name>…/``; where there are none, their tests are skipped."""


def published(name: str, rows: Iterable[dict]) -> list[dict]:
    """What the published converter makes of rows that it gets through: no checks, one sender table per set."""
    label = FORMATS[name].label
    made = []
    for number, row in enumerate(rows):
        if name in ("vicuna_sharegpt", "evol_instruct", "slim_orca"):
            messages = published_turns(name, row["conversations"])
        elif name == "meta_math_qa":
            messages = [("user", row["query"]), ("assistant", row["response"])]
        elif name == "alpaca" and row["input"] != "":
            messages = [("user", row["instruction"] + "\nInput: " + row["input"] + "\n"), ("assistant", row["output"])]
        else:
            messages = [("user", row["instruction"]), ("assistant", row["output"])]
        if messages:
            turns = [{"role": role, "content": content} for role, content in messages]
            made.append({"dataset": label, "id": f"{label}_{number}", "messages": turns})
    return made


def published_turns(name: str, turns: list[dict]) -> list[tuple[str, str]]:
    """Empty if the row is dropped; KeyError for a sender at which the published converter stops."""
    senders = {"human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant"}
    dropped = {"vicuna_sharegpt": ["bing"], "evol_instruct": ["system", "bing"], "slim_orca": []}[name]
    if name == "vicuna_sharegpt":
        senders["bard"] = "assistant"
    if name != "evol_instruct":
        senders["system"] = "system"
    messages = []
    for turn in turns:
        if turn["from"] in dropped:
            return []
        messages.append((senders[turn["from"]], turn["value"]))
    return messages


def write_rows(path: Path, rows: list[dict], ending: str, indent: int | None = None, batch: int = 5) -> Path:
    """A file ``path`` + ``ending`` with these rows; the ending says which container (tables: so many at once)."""
    path = path.with_name(path.name + ending)
    path.parent.mkdir(parents=True, exist_ok=True)
    if ending == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=batch)
    elif ending == ".arrow":
        table = pa.Table.from_pylist(rows)
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table, max_chunksize=batch)
    else:
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        text = json.dumps(rows, indent=indent) if ".json" in ending and ".jsonl" not in ending else lines
        packed = {".gz": gzip.compress, ".zst": zstd}.get(path.suffix, bytes)
        path.write_bytes(packed(text.encode()))
    return path


def zstd(data: bytes) -> bytes:
    """One frame of it."""
    return pa.compress(data, "zstd", asbytes=True)


def read_jsonl(path: Path) -> list[dict]:
    """All rows of a JSONL file."""
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


def sample_rows(name: str, count: int) -> list[dict]:
    """Valid rows of a data set, some of them with letters beyond ASCII, quotes and line breaks."""
    texts = [
        "plain",
        'a "quoted" word\n\ttab',
        "Grüße, 世界 🙂",
        "x = {'k': [1, 2]}, {\"from\": 1}",
        "\\ back\\slash \u2028",
    ]
    rows = []
    for number in range(count):
        question, answer = f"{texts[number % 5]} {number}", texts[(number + 2) % 5]
        if name == "alpaca":
            rows.append({"instruction": question, "input": "" if number % 3 else answer, "output": answer})
        elif name == "meta_math_qa":
            rows.append({"type": "t", "query": question, "response": answer})
        elif name == "evol_code_alpaca":
            rows.append({"instruction": question, "output": answer})
        elif name == "c4":
            rows.append({"text": f"{question}\n{answer}"})
        else:
            turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}] * (1 + number % 3)
            rows.append({"id": f"r{number}", "conversations": turns})
    return rows


def raw_sets(folder: Path, count: int, *names: str) -> dict[str, Path]:
    """``<name>/rows.jsonl`` of some data sets, by name."""
    return {name: write_rows(folder / name / "rows", sample_rows(name, count), ".jsonl") for name in names}


SIX = [name for name in FORMATS if name != "c4"]
"""The published sets, all of which are conversations."""

GOOD = json.dumps(sample_rows("alpaca", 1)[0]).encode()
"""A line that alpaca accepts."""

NO_LIMIT = {"max_reject_rate": 1.0}
PUBLISHED = ("data.jsonl", "rejects.jsonl", "reformat.json")


def outcome_of(name: str, place: Path, save_path: Path, **settings: object) -> Outcome:
    """What became of one data set, converted in this process into ``save_path/name``."""
    return reformat_one(name, place, save_path / name, Settings(**settings))


def contents(folder: Path) -> list[bytes]:
    """What a conversion publishes, as bytes."""
    return [(folder / name).read_bytes() for name in PUBLISHED]


def files_in(folder: Path) -> set[str]:
    """Names of all files, hidden ones too, at any depth."""
    return {path.name for path in folder.rglob("*") if path.is_file()}

"""Raw data sets to ``{"dataset", "id", "messages"}`` rows."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import orjson
from tqdm import tqdm

from utils.data.blocks import Place, Unreadable
from utils.data.containers import blocks, data_files
from utils.data.formats import Format
from utils.data.policy import Reject


def reformat(known: Format, source: Path, folder: Path) -> Counter:
    """Convert one data set into ``folder``; counts of accepted rows and of rows left out by reason."""
    folder.mkdir(parents=True, exist_ok=True)
    counts: Counter = Counter()
    number = 0
    with (
        open(folder / ".data.jsonl.tmp", "wb") as data,
        open(folder / ".rejects.jsonl.tmp", "wb") as rejects,
        tqdm(desc=known.name, unit=" rows") as bar,
    ):
        for path in data_files(source, known.raw_file):
            for block in blocks(path, Place()):
                for index, row in enumerate(block.rows):
                    try:
                        if isinstance(row, Unreadable):
                            raise Reject(row.reason, row.detail)
                        if not isinstance(row, dict):
                            raise Reject("not_an_object", "the row is not a JSON object")
                        messages = known.convert(row)
                        line = orjson.dumps(
                            {"dataset": known.label, "id": f"{known.label}_{number}", "messages": messages},
                            option=orjson.OPT_APPEND_NEWLINE,
                        )
                        data.write(line)
                        counts["accepted"] += 1
                    except Reject as reject:
                        place = {"file": str(path), "line": block.line_of(index)}
                        entry = {"dataset": known.label, "id": f"{known.label}_{number}", **place}
                        entry |= {"reason": reject.reason, "detail": reject.detail}
                        rejects.write(orjson.dumps(entry, option=orjson.OPT_APPEND_NEWLINE))
                        counts[reject.reason] += 1
                    number += 1
                bar.update(len(block.rows))
    os.replace(folder / ".rejects.jsonl.tmp", folder / "rejects.jsonl")
    os.replace(folder / ".data.jsonl.tmp", folder / "data.jsonl")
    return counts

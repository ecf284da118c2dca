"""Mix reformatted data sets: replicate by portion, shuffle globally, in bounded memory.

Three passes over the data, each of them sequential: survey (check, count, hash), scatter (every copy of a row goes
to a bucket drawn at random), gather (each bucket is shuffled in memory and appended). A uniform draw of buckets
followed by a uniform order within each is a uniform order of all (Rao 1961; Sandelius 1962), and no step ever holds
more than one bucket. Draws come from ``random.Random``, whose ``random()`` is the same on every platform.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import orjson
from tqdm import tqdm

from router_tuning.data.mix_plan import RENDERINGS, MixPlan
from router_tuning.data.rows import checked_row, content_of, lines_of
from router_tuning.errors import UserError
from router_tuning.files import scratch_folder, writing

BUCKET_BYTES = 16 << 20
BUFFERED_BYTES = 32 << 20
_progress = partial(tqdm, disable=None)  # where there is a terminal


@dataclass
class Survey:
    """What the first pass finds in a data set: ``size`` of its rows in bytes, and the file's ``sha256``.

    ``repeats`` marks the rows that equal an earlier one, also of another set, where such are to be left out. The last
    ``held_out`` rows are not mixed.
    """

    name: str
    path: Path
    size: int
    sha256: str
    repeats: bytearray
    held_out: int

    @property
    def rows(self) -> int:
        """All of them."""
        return len(self.repeats)

    @property
    def duplicates(self) -> int:
        """Rows that are left out, of those that are not held out."""
        return sum(self.repeats[: self.rows - self.held_out])

    @property
    def usable(self) -> int:
        """Rows that may be mixed."""
        return self.rows - self.held_out - self.duplicates


def mix(plan: MixPlan, reformatted: Path, folder: Path) -> dict:
    """Write ``data.jsonl`` and ``mix.json`` into ``folder``; returns the content of the latter.

    Args:
        reformatted: the folder of ``<name>/data.jsonl``.

    Raises:
        UserError: for a set that is missing or empty and, with file and line, for a row that is none.
    """
    paths = {name: reformatted / name / "data.jsonl" for name in plan.names}
    absent = [name for name, path in paths.items() if not path.is_file()]
    if absent:
        raise UserError(
            f"{', '.join(absent)}: no data.jsonl under {reformatted}; make it with reformat_datasets.py, or mix "
            f"without: --portion {' '.join(f'{name}=0' for name in absent)}"
        )
    seen: set[bytes] = set()
    surveys = [_survey(name, path, plan, seen) for name, path in paths.items()]
    del seen
    wanted = {survey.name: plan.wanted(survey.name, survey.usable) for survey in surveys}
    if not any(wanted.values()):
        raise UserError("the portions and caps leave no row of any data set: nothing to mix")
    with scratch_folder(folder) as scratch, writing(folder):
        size = sum(survey.size * wanted[survey.name] // survey.rows for survey in surveys)
        buckets = _Buckets(scratch, max(1, -(-size // BUCKET_BYTES)))
        for survey in filter(lambda survey: wanted[survey.name], surveys):
            _scatter(survey, wanted[survey.name], plan, buckets)
        buckets.flush()
        digest = _gather(buckets, plan.seed, scratch / "data.jsonl")
        report = {"rows": sum(wanted.values()), "sha256": digest, "seed": plan.seed, "dedup": plan.dedup}
        report["renderings"] = {name: float(weight) for name, weight in plan.renderings.items()}
        report["sets"] = {survey.name: _provenance(survey, plan, wanted[survey.name]) for survey in surveys}
        (scratch / "mix.json").write_text(json.dumps(report, indent=2) + "\n")
        for name in ("data.jsonl", "mix.json"):
            os.replace(scratch / name, folder / name)
    return report


def _provenance(survey: Survey, plan: MixPlan, mixed: int) -> dict:
    return {
        "file": f"{survey.path.parent.name}/{survey.path.name}",
        "sha256": survey.sha256,
        "rows": survey.rows,
        "held_out": survey.held_out,
        "duplicates": survey.duplicates,
        "portion": str(plan.portions[survey.name]),
        "cap": plan.caps.get(survey.name),
        "mixed": mixed,
    }


def _survey(name: str, path: Path, plan: MixPlan, seen: set[bytes]) -> Survey:
    """Check all rows; ``seen`` gathers what tells which of them are equal (100 bytes a row)."""
    repeats, size = bytearray(), 0
    for number, line in _progress(lines_of(path), f"check {name}", unit=" rows"):
        row = checked_row(line, f"{path}:{number}")
        digest = hashlib.blake2b(orjson.dumps(content_of(row)), digest_size=16).digest() if plan.dedup else b""
        repeats.append(digest in seen)
        if plan.dedup:
            seen.add(digest)
        size += len(line) + 1
    if not repeats:
        raise UserError(f"{path} holds no row; reformat {name} again, or mix without: --portion {name}=0")
    held_out = plan.held_out.get(name, 0)
    if held_out >= len(repeats):
        raise UserError(f"{path}: held_out keeps {held_out} rows of {name} out of the mix, and it has {len(repeats)}")
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return Survey(name, path, size, sha256, repeats, held_out)


class _Buckets:
    """Lines in files of their own, appended to in turns so that any number of them may be filled at once."""

    def __init__(self, folder: Path, count: int) -> None:
        self.paths = [folder / f"bucket_{number:05d}" for number in range(count)]
        self._waiting: list[list[bytes]] = [[] for _ in range(count)]
        self._size = 0

    def add(self, bucket: int, line: bytes) -> None:
        self._waiting[bucket].append(line)
        self._size += len(line)
        if self._size > BUFFERED_BYTES:
            self.flush()

    def flush(self) -> None:
        for path, lines in zip(self.paths, self._waiting, strict=True):
            if lines:
                with path.open("ab") as file:
                    file.write(b"\n".join(lines) + b"\n")
                lines.clear()
        self._size = 0


def _scatter(survey: Survey, wanted: int, plan: MixPlan, buckets: _Buckets) -> None:
    """Every copy of every row into a bucket drawn at random, in a rendering drawn at random.

    Each row is taken ``wanted // rows`` times, and ``wanted % rows`` rows, drawn without replacement (Knuth 3.4.2,
    algorithm S), once more.
    """
    left = survey.usable
    whole, extra = divmod(wanted, left)
    draw = random.Random(f"{plan.seed} {survey.name}").random
    choose = random.Random(f"{plan.seed} {survey.name} renderings").choices
    names, often = list(plan.renderings), [float(weight) for weight in plan.renderings.values()]
    count = len(buckets.paths)
    lines = zip(lines_of(survey.path), survey.repeats[: survey.rows - survey.held_out], strict=False)
    for (_, line), repeated in _progress(lines, f"scatter {survey.name}"):
        if repeated:
            continue
        chosen = draw() * left < extra
        left, extra = left - 1, extra - chosen
        for _ in range(whole + chosen):
            buckets.add(int(draw() * count), rendered(line, choose(names, often)[0]))


def rendered(line: bytes, name: str) -> bytes:
    """The line of a row, as ``prompt`` and ``completion`` where it is a single exchange and not to be a chat.

    A system text stands before the prompt. Rows that are anything else stay as they are.
    """
    if (form := RENDERINGS[name]) is None:
        return line
    row = orjson.loads(line)
    *before, asked, answer = row.get("messages") or [{}, {}]
    roles = [turn.get("role") for turn in (*before, asked, answer)]
    if roles not in (["user", "assistant"], ["system", "user", "assistant"]):
        return line
    del row["messages"]
    prompt = "\n".join(turn["content"].strip() for turn in (*before, asked))
    row |= {"prompt": form[0].format(prompt), "completion": form[1].format(answer["content"].strip())}
    return orjson.dumps(row)


def _gather(buckets: _Buckets, seed: int, target: Path) -> str:
    """Shuffle bucket after bucket into ``target``; its sha256."""
    shuffle, digest = random.Random(f"{seed} order").shuffle, hashlib.sha256()
    with target.open("wb") as out:
        for path in _progress(buckets.paths, "shuffle"):
            if path.exists():
                lines = path.read_bytes().split(b"\n")[:-1]
                path.unlink()
                shuffle(lines)
                data = b"\n".join(lines) + b"\n"
                digest.update(data)
                out.write(data)
    return digest.hexdigest()

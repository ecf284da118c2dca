"""Mix reformatted data sets: replicate by portion, shuffle globally, in bounded memory.

Three passes over the data, each of them sequential: survey (check, count, hash), scatter (every copy of a row goes
to a bucket drawn at random), gather (each bucket is shuffled in memory and appended). A uniform draw of buckets
followed by a uniform order within each is a uniform order of all (Rao 1961; Sandelius 1962), and no step ever holds
more than one bucket. Draws come from ``random.Random``, whose ``random()`` is the same on every platform.
"""

from __future__ import annotations

import hashlib
import os
import random
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
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
    """What the first pass finds in a data set of ``rows`` rows: their ``size`` in bytes, and the file's ``sha256``.

    ``digests`` ``[rows, 2]`` tell which rows are equal, ``repeats`` ``[rows]`` marks those that equal an earlier one,
    also of another set; both are empty where duplicates are to stay. The last ``held_out`` rows are not mixed.
    """

    name: str
    path: Path
    rows: int
    size: int
    sha256: str
    digests: np.ndarray
    repeats: np.ndarray
    held_out: int

    @property
    def usable(self) -> int:
        """Rows at the beginning, of which none is held out."""
        return self.rows - self.held_out

    @property
    def distinct(self) -> int:
        """Rows that may be mixed."""
        return self.usable - int(self.repeats[: self.usable].sum())


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
    surveys = [_survey(name, path, plan) for name, path in paths.items()]
    if plan.dedup:
        _mark_repeats(surveys)
    wanted = {survey.name: plan.wanted(survey.name, survey.distinct) for survey in surveys}
    if not any(wanted.values()):
        raise UserError("the portions and caps leave no row of any data set: nothing to mix")
    with scratch_folder(folder) as scratch, writing(folder):
        size = sum(survey.size * wanted[survey.name] // survey.rows for survey in surveys)
        buckets = _Buckets(scratch, max(1, -(-size // BUCKET_BYTES)))
        for survey in surveys:
            _scatter(survey, wanted[survey.name], plan, buckets)
        buckets.flush()
        digest = _gather(buckets, plan.seed, scratch / "data.jsonl")
        report = {"rows": sum(wanted.values()), "sha256": digest, "seed": plan.seed, "dedup": plan.dedup}
        report["renderings"] = {name: float(weight) for name, weight in plan.renderings.items()}
        report["sets"] = {survey.name: _provenance(survey, plan, wanted[survey.name]) for survey in surveys}
        text = orjson.dumps(report, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)
        (scratch / "mix.json").write_bytes(text)
        for name in ("data.jsonl", "mix.json"):
            os.replace(scratch / name, folder / name)
    return report


def _provenance(survey: Survey, plan: MixPlan, mixed: int) -> dict:
    return {
        "file": f"{survey.path.parent.name}/{survey.path.name}",
        "sha256": survey.sha256,
        "rows": survey.rows,
        "held_out": survey.held_out,
        "duplicates": survey.usable - survey.distinct,
        "portion": str(plan.portions[survey.name]),
        "cap": plan.caps.get(survey.name),
        "mixed": mixed,
    }


def _survey(name: str, path: Path, plan: MixPlan) -> Survey:
    rows, size, digests = 0, 0, bytearray()
    for number, line in _progress(lines_of(path), f"check {name}", unit=" rows"):
        row = checked_row(line, f"{path}:{number}")
        if plan.dedup:
            digests += hashlib.blake2b(orjson.dumps(content_of(row)), digest_size=16).digest()
        rows += 1
        size += len(line) + 1
    if not rows:
        raise UserError(f"{path} holds no row; reformat {name} again, or mix without: --portion {name}=0")
    held_out = plan.held_out.get(name, 0)
    if held_out >= rows:
        raise UserError(f"{path}: held_out keeps {held_out} rows of {name} out of the mix, and it has {rows}")
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    found = np.frombuffer(digests, "<u8").reshape(-1, 2)
    return Survey(name, path, rows, size, sha256, found, np.zeros(0, bool), held_out)


def _mark_repeats(surveys: list[Survey]) -> None:
    digests = np.concatenate([survey.digests for survey in surveys])
    order = np.lexsort((digests[:, 0], digests[:, 1]))
    ranked = digests[order]
    repeats = np.zeros(len(digests), bool)
    repeats[order[1:]] = (ranked[1:] == ranked[:-1]).all(axis=1)
    ends = np.cumsum([survey.rows for survey in surveys])
    for survey, part in zip(surveys, np.split(repeats, ends[:-1]), strict=True):
        survey.repeats = part


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
    left = survey.distinct
    whole, extra = divmod(wanted, left)
    draw = random.Random(f"{plan.seed} {survey.name}").random
    choose = random.Random(f"{plan.seed} {survey.name} renderings").choices
    names, often = list(plan.renderings), [float(weight) for weight in plan.renderings.values()]
    count = len(buckets.paths)
    usable = islice(lines_of(survey.path), survey.usable)
    for index, (_, line) in enumerate(_progress(usable, f"scatter {survey.name}")):
        if len(survey.repeats) and survey.repeats[index]:
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

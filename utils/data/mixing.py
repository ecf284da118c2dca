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
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import orjson
from tqdm import tqdm

from router_tuning.data.blocks import SPACE
from router_tuning.data.mix_plan import MixPlan
from router_tuning.data.rows import checked_row, content_of
from router_tuning.data.writing import writing
from router_tuning.errors import UserError

BUCKET_BYTES = 16 << 20
BUFFERED_BYTES = 32 << 20


@dataclass(frozen=True)
class Source:
    """A surveyed set; ``repeats`` marks the rows that an earlier row equals (None: nobody asked)."""

    name: str
    path: Path
    rows: int
    size: int
    sha256: str
    repeats: np.ndarray | None = None

    @property
    def distinct(self) -> int:
        """Rows that may be mixed."""
        return self.rows if self.repeats is None else int(self.rows - self.repeats.sum())


def mix(plan: MixPlan, reformatted: Path, folder: Path) -> dict:
    """Write ``data.jsonl`` and ``mix.json`` into ``folder``; returns the content of the latter.

    Raises :class:`UserError` for a set that is missing or empty and, with file and line, for a row that is none.
    """
    sources = _survey_all(plan, reformatted)
    if not any(plan.wanted(source.name, source.distinct) for source in sources):
        raise UserError("the portions and caps leave no row of any data set: nothing to mix")
    with writing(folder):
        parts = folder / ".partial"
        shutil.rmtree(parts, ignore_errors=True)
        parts.mkdir(parents=True)
        try:
            return _mix(plan, sources, folder, parts)
        finally:
            shutil.rmtree(parts, ignore_errors=True)


def _mix(plan: MixPlan, sources: list[Source], folder: Path, parts: Path) -> dict:
    size = sum(source.size * plan.wanted(source.name, source.distinct) // source.rows for source in sources)
    buckets = _Buckets(parts, max(1, -(-size // BUCKET_BYTES)))
    taken = {source.name: _scatter(source, plan, buckets) for source in sources}
    buckets.flush()
    digest = _gather(buckets, plan.seed, parts / "data.jsonl")
    report = _report(plan, sources, taken, digest)
    (parts / "mix.json").write_bytes(orjson.dumps(report, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
    for name in ("data.jsonl", "mix.json"):
        os.replace(parts / name, folder / name)
    return report


def _report(plan: MixPlan, sources: list[Source], taken: dict[str, int], digest: str) -> dict:
    sets = {
        source.name: {
            "file": f"{source.path.parent.name}/{source.path.name}",
            "sha256": source.sha256,
            "rows": source.rows,
            "duplicates": source.rows - source.distinct,
            "portion": str(plan.portions[source.name]),
            "cap": plan.caps.get(source.name),
            "mixed": taken[source.name],
        }
        for source in sources
    }
    return {"rows": sum(taken.values()), "sha256": digest, "seed": plan.seed, "dedup": plan.dedup, "sets": sets}


def _lines(path: Path, label: str) -> Iterator[tuple[int, bytes]]:
    """Number and bytes of all lines, with a progress bar."""
    with open(path, "rb") as lines, tqdm(total=path.stat().st_size, desc=label, unit="B", unit_scale=True) as bar:
        for number, line in enumerate(lines, 1):
            bar.update(len(line))
            yield number, line


def _survey_all(plan: MixPlan, reformatted: Path) -> list[Source]:
    paths = {name: reformatted / name / "data.jsonl" for name in plan.names}
    absent = [name for name, path in paths.items() if not path.is_file()]
    if absent:
        raise UserError(
            f"{', '.join(absent)}: no data.jsonl under {reformatted}; make it with reformat_datasets.py, or mix "
            f"without: --portion {' '.join(f'{name}=0' for name in absent)}"
        )
    surveys = [_survey(name, path, plan.dedup) for name, path in paths.items()]
    sources = [source for source, _ in surveys]
    if not plan.dedup:
        return sources
    repeats = _repeats(np.concatenate([digests for _, digests in surveys]))
    ends = np.cumsum([source.rows for source in sources])
    parts = np.split(repeats, ends[:-1])
    return [Source(**{**vars(source), "repeats": part}) for source, part in zip(sources, parts, strict=True)]


def _survey(name: str, path: Path, dedup: bool) -> tuple[Source, np.ndarray]:
    digest, rows, size = hashlib.sha256(), 0, 0
    digests = bytearray()
    for number, line in _lines(path, f"check {name}"):
        digest.update(line)
        if not line.strip(SPACE):
            continue
        row = checked_row(line, f"{path}:{number}")
        if dedup:
            digests += hashlib.blake2b(orjson.dumps(content_of(row)), digest_size=16).digest()
        rows += 1
        size += len(line)
    if not rows:
        raise UserError(f"{path} holds no row; reformat {name} again, or mix without: --portion {name}=0")
    return Source(name, path, rows, size, digest.hexdigest()), np.frombuffer(digests, "<u8").reshape(-1, 2)


def _repeats(digests: np.ndarray) -> np.ndarray:
    """Which of the 128-bit digests ``[n, 2]`` equal an earlier one."""
    order = np.lexsort((digests[:, 0], digests[:, 1]))
    ranked = digests[order]
    repeats = np.zeros(len(digests), bool)
    repeats[order[1:]] = (ranked[1:] == ranked[:-1]).all(axis=1)
    return repeats


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


def _scatter(source: Source, plan: MixPlan, buckets: _Buckets) -> int:
    """Every copy of every row into a bucket drawn at random; the number of copies.

    Each row is taken ``wanted // rows`` times, and ``wanted % rows`` rows, drawn without replacement (Knuth 3.4.2,
    algorithm S), once more.
    """
    left = source.distinct
    wanted = plan.wanted(source.name, left)
    whole, extra = divmod(wanted, left)
    draw = random.Random(f"{plan.seed} {source.name}").random
    count = len(buckets.paths)
    rows = (line.rstrip(b"\r\n") for _, line in _lines(source.path, f"scatter {source.name}") if line.strip(SPACE))
    for index, line in enumerate(rows):
        if source.repeats is not None and source.repeats[index]:
            continue
        chosen = draw() * left < extra
        left, extra = left - 1, extra - chosen
        for _ in range(whole + chosen):
            buckets.add(int(draw() * count), line)
    return wanted


def _gather(buckets: _Buckets, seed: int, target: Path) -> str:
    """Shuffle bucket after bucket into ``target``; its sha256."""
    shuffle, digest = random.Random(f"{seed} order").shuffle, hashlib.sha256()
    with target.open("wb") as out:
        for path in tqdm(buckets.paths, desc="shuffle", unit=" buckets"):
            if not path.exists():
                continue
            lines = path.read_bytes().split(b"\n")[:-1]
            path.unlink()
            shuffle(lines)
            data = b"\n".join(lines) + b"\n"
            digest.update(data)
            out.write(data)
        out.flush()
        os.fsync(out.fileno())
    return digest.hexdigest()

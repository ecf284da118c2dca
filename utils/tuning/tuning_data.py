"""Conversations on disk → encoded rows, each checked, with a hash that says exactly what was trained on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import orjson
from datasets import Dataset, Features, Value
from transformers import PreTrainedTokenizerBase

from router_tuning.data.rows import checked_row, lines_of
from router_tuning.errors import UserError
from router_tuning.tuning.encoding import TemplateRefusal, encode_row, learns

_TEMPLATE = 1  # raised when the encoding changes, so that no cached encoding of an earlier one is taken


@dataclass(frozen=True)
class RawData:
    """A checked JSONL file: its first ``rows`` rows and the sha256 of their bytes."""

    path: Path
    rows: int
    sha256: str


@dataclass(frozen=True)
class TrainingData:
    """Encoded rows ``input_ids``, ``labels``, ``length``; ``unusable`` rows had no assistant token within the cut."""

    rows: Dataset
    unusable: int
    cut: int
    raw: RawData

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return list(self.rows["length"])


def check_file(path: Path, limit: int) -> RawData:
    """Read and check the first ``limit`` rows (0: all); UserError names file, line and fault."""
    if not path.is_file():
        raise UserError(
            f"{path} is missing; make it with entrypoints/data/reformat_datasets.py (mixed: then mix_datasets.py)"
        )
    digest, rows = hashlib.sha256(), 0
    for number, line in islice(lines_of(path), limit or None):
        checked_row(line, f"{path}:{number}")
        digest.update(line + b"\n")
        rows += 1
    if rows == 0:
        raise UserError(f"{path} holds no conversation; make it again with entrypoints/data/reformat_datasets.py")
    return RawData(path, rows, digest.hexdigest())


def encode_file(
    raw: RawData,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    chat_template: bool = False,
    processes: int | None = None,
) -> TrainingData:
    """Encode a checked file; rows without a token that carries loss are left out. UserError if none is left.

    The same rows are encoded once for a tokenizer and length, wherever the file is: the cache is keyed by content.
    """
    rows = Dataset.from_generator(
        _lines,
        features=Features({"line": Value("string")}),
        gen_kwargs={"path": str(raw.path), "limit": raw.rows},
        fingerprint=_fingerprint(raw.sha256, raw.rows),
    )
    key = (raw.sha256, raw.rows, _tokenizer_hash(tokenizer, chat_template), max_length, chat_template)
    encoded = rows.map(
        partial(_encode, tokenizer=tokenizer, max_length=max_length, chat_template=chat_template),
        remove_columns=rows.column_names,
        num_proc=processes if processes and processes < raw.rows else None,
        new_fingerprint=_fingerprint(*key),
        desc="encode",
    )
    usable = [number for number, learnt in enumerate(encoded["learnt"]) if learnt]
    unusable = len(encoded) - len(usable)
    if not usable:
        raise UserError(
            f"{raw.path}: no row has an assistant token within {max_length} tokens; raise --max_seq_length"
        )
    kept = encoded.select(usable) if unusable else encoded
    return TrainingData(kept.remove_columns(["learnt", "cut"]), unusable, sum(encoded["cut"]), raw)


def _fingerprint(*key: object) -> str:
    """What ``datasets`` caches a result under."""
    return hashlib.sha256(json.dumps([_TEMPLATE, *key]).encode()).hexdigest()[:32]


def _lines(path: str, limit: int) -> Iterator[dict[str, str]]:
    for _, line in islice(lines_of(Path(path)), limit):
        yield {"line": line.decode()}


def _encode(row: dict[str, str], tokenizer: PreTrainedTokenizerBase, max_length: int, chat_template: bool) -> dict:
    try:
        encoded = encode_row(orjson.loads(row["line"]), tokenizer, max_length, chat_template)
    except TemplateRefusal:
        encoded = {"input_ids": [], "labels": []}
    length = len(encoded["input_ids"])
    return {**encoded, "length": length, "learnt": learns(encoded["labels"]), "cut": length == max_length}


def _tokenizer_hash(tokenizer: PreTrainedTokenizerBase, chat_template: bool) -> str:
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    # Truncation and padding are set by each call and say nothing of the vocabulary.
    state.pop("truncation", None)
    state.pop("padding", None)
    rest = [tokenizer.eos_token, tokenizer.chat_template if chat_template else None]
    return hashlib.sha256(json.dumps([state, rest], sort_keys=True).encode()).hexdigest()

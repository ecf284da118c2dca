"""Conversations on disk → encoded rows, each checked, with a hash that says exactly what was trained on."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
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

_ENCODING = 2  # raised when the encoding changes, so that no cached encoding of an earlier one is taken
_NO_ANSWER, _CUT, _REFUSED = "without assistant text", "cut before their answer", "refused by the chat template"


@dataclass(frozen=True)
class RawData:
    """A checked JSONL file: its first ``rows`` rows and the sha256 of their bytes."""

    path: Path
    rows: int
    sha256: str


@dataclass(frozen=True)
class TrainingData:
    """Encoded rows ``input_ids``, ``labels``, ``length``.

    Attributes:
        left_out: how many rows of the file teach nothing, and why, as text.
        cut: rows that are longer than the cut and were shortened to it.
        largest_id: of all tokens.
    """

    rows: Dataset
    left_out: str
    cut: int
    largest_id: int
    raw: RawData

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return list(self.rows["length"])


def check_file(path: Path, limit: int) -> RawData:
    """Read and check the first ``limit`` rows (0: all); UserError names file, line and fault."""
    if not path.is_file():
        raise UserError(
            f"{path} is missing; the sample: python entrypoints/data/reformat_datasets.py --raw_data_root "
            "data/sample/raw (mixed: then python entrypoints/data/mix_datasets.py); own conversations: docs/data.md"
        )
    digest, rows = hashlib.sha256(), 0
    for number, line in islice(lines_of(path), limit or None):
        checked_row(line, f"{path}:{number}")
        digest.update(line + b"\n")
        rows += 1
    if rows == 0:
        raise UserError(f"{path} holds no conversation; how they are written: docs/data.md")
    return RawData(path, rows, digest.hexdigest())


def encode_file(
    raw: RawData, tokenizer: PreTrainedTokenizerBase, max_length: int, processes: int | None = None
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
    key = (raw.sha256, raw.rows, tokenizer_hash(tokenizer), max_length)
    encoded = rows.map(
        partial(_encode, tokenizer=tokenizer, max_length=max_length),
        remove_columns=rows.column_names,
        num_proc=processes if processes and processes < raw.rows else None,
        new_fingerprint=_fingerprint(*key),
        desc="encode",
    )
    faults = encoded["fault"]
    usable = [number for number, fault in enumerate(faults) if not fault]
    left_out = count_faults(faults)
    if not usable:
        raise UserError(f"{raw.path}: no row to learn from within {max_length} tokens ({left_out})")
    kept = encoded.select(usable) if left_out else encoded
    cut, largest = sum(kept["cut"]), max(kept["largest_id"])
    return TrainingData(kept.remove_columns(["fault", "cut", "largest_id"]), left_out, cut, largest, raw)


def count_faults(faults: Iterable[str]) -> str:
    """Rows by why they are left out, with the first refusal: ``refused by the chat template: 3 (no system role)``."""
    reasons, refusal = Counter(), ""
    for fault in filter(None, faults):
        reason, _, why = fault.partition(": ")
        reasons[reason] += 1
        refusal = refusal or why
    return ", ".join(f"{r}: {n}" + (f" ({refusal})" if r == _REFUSED else "") for r, n in reasons.items())


def encoded_or_fault(
    row: Mapping[str, object], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[dict[str, list[int]], str]:
    """The whole row encoded, and why it teaches nothing within ``max_length`` tokens (empty if it does)."""
    try:
        encoded = encode_row(row, tokenizer)
    except TemplateRefusal as refusal:
        return {"input_ids": [], "labels": []}, f"{_REFUSED}: {refusal}"
    if learns(encoded["labels"][:max_length]):
        return encoded, ""
    return encoded, _CUT if learns(encoded["labels"]) else _NO_ANSWER


def _fingerprint(*key: object) -> str:
    """What ``datasets`` caches a result under."""
    return hashlib.sha256(json.dumps([_ENCODING, *key]).encode()).hexdigest()[:32]


def _lines(path: str, limit: int) -> Iterator[dict[str, str]]:
    for _, line in islice(lines_of(Path(path)), limit):
        yield {"line": line.decode()}


def _encode(row: dict[str, str], tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict:
    encoded, fault = encoded_or_fault(orjson.loads(row["line"]), tokenizer, max_length)
    kept = {name: ids[:max_length] for name, ids in encoded.items()}
    length = len(encoded["input_ids"])
    facts = {"fault": fault, "cut": length > max_length, "largest_id": max(encoded["input_ids"], default=0)}
    return {**kept, "length": min(length, max_length), **facts}


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """What tells tokenizers, and the templates that they render with, apart."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    # Truncation and padding are set by each call and say nothing of the vocabulary.
    state.pop("truncation", None)
    state.pop("padding", None)
    rest = [tokenizer.special_tokens_map, tokenizer.chat_template]
    return hashlib.sha256(json.dumps([state, rest], sort_keys=True, default=str).encode()).hexdigest()

"""Conversations on disk → encoded rows, each checked, with a hash that says exactly what was trained on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import orjson
from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase

from utils.errors import UserError
from utils.pipeline.encoding import IGNORE_INDEX, encode_conversation

ROLES = ("system", "user", "assistant")
FEATURES = Features({"messages": List({"role": Value("string"), "content": Value("string")})})


@dataclass(frozen=True)
class RawData:
    """A checked JSONL file: its first ``rows`` conversations and the sha256 of their bytes."""

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
    digest, rows = hashlib.sha256(), 0
    for line in _checked_lines(path, limit):
        digest.update(line)
        rows += 1
    if rows == 0:
        raise UserError(f"{path} holds no conversation; run entrypoints/data/reformat_datasets.py again")
    return RawData(path, rows, digest.hexdigest())


def encode_file(
    raw: RawData, tokenizer: PreTrainedTokenizerBase, max_length: int, processes: int | None = None
) -> TrainingData:
    """Encode a checked file; rows without a token that carries loss are left out. UserError if none is left."""
    key = json.dumps([raw.sha256, raw.rows, _tokenizer_hash(tokenizer), max_length])
    fingerprint = hashlib.sha256(key.encode()).hexdigest()[:32]
    rows = Dataset.from_generator(
        _conversations,
        features=FEATURES,
        gen_kwargs={"path": str(raw.path), "limit": raw.rows, "sha256": raw.sha256},
    )
    encoded = rows.map(
        partial(_encode, tokenizer=tokenizer, max_length=max_length),
        remove_columns=rows.column_names,
        num_proc=processes if processes and processes < raw.rows else None,
        new_fingerprint=fingerprint,
        desc="encode",
    )
    usable = [number for number, learnt in enumerate(encoded["learnt"]) if learnt]
    cut = sum(encoded["cut"])
    unusable = len(encoded) - len(usable)
    if not usable:
        raise UserError(
            f"{raw.path}: no row has an assistant token within {max_length} tokens; raise --max_seq_length"
        )
    kept = encoded.select(usable) if unusable else encoded
    return TrainingData(kept.remove_columns(["learnt", "cut"]), unusable, cut, raw)


def _checked_lines(path: Path, limit: int) -> Iterator[bytes]:
    try:
        with open(path, "rb") as lines:
            rows = 0
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                _check_row(line, f"{path}:{number}")
                yield line
                rows += 1
                if rows == limit:
                    return
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing; make it with entrypoints/data/reformat_datasets.py (mixed: then mix_datasets.py)"
        ) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def _check_row(line: bytes, where: str) -> None:
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise UserError(f"{where} is no JSON ({error}); run the reformatting again") from None
    messages = row.get("messages") if isinstance(row, dict) else None
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where} has no list of messages; expected {{'messages': [{{'role', 'content'}}, …]}}")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise UserError(f"{where} has a message without text")
        if message.get("role") not in ROLES:
            raise UserError(f"{where} has the role {message.get('role')!r}; use {', '.join(ROLES)}")


def _conversations(path: str, limit: int, sha256: str) -> Iterator[dict]:
    """Rows for ``datasets``, whose cache is keyed by the arguments: the hash makes a changed file a new entry."""
    for line in _checked_lines(Path(path), limit):
        messages = orjson.loads(line)["messages"]
        yield {"messages": [{"role": turn["role"], "content": turn["content"]} for turn in messages]}


def _encode(row: dict, tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict:
    encoded = encode_conversation(row["messages"], tokenizer, max_length)
    # The first label is never predicted: a causal loss shifts by one.
    learnt = any(label != IGNORE_INDEX for label in encoded["labels"][1:])
    length = len(encoded["input_ids"])
    return {**encoded, "length": length, "learnt": learnt, "cut": length == max_length}


def _tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    backend = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else repr(tokenizer)
    state = json.loads(backend) if tokenizer.is_fast else {}
    # Truncation and padding are set by each call and say nothing of the vocabulary.
    state.pop("truncation", None)
    state.pop("padding", None)
    return hashlib.sha256(f"{json.dumps(state, sort_keys=True)}{tokenizer.eos_token}".encode()).hexdigest()

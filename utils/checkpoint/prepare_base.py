"""Bring a base model's weights and tokenizer into ``ckpt/<folder>`` by link, checked before anything is changed."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig

from router_tuning.errors import UserError
from router_tuning.files import write_text

RECORD = "base.json"
"""What this command brought into a folder: source, revision, files."""
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
OTHER_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "merges.txt",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)
ARCHITECTURE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "rms_norm_eps",
    "sliding_window",
    "tie_word_embeddings",
    "rope_parameters",
)


@dataclass(frozen=True)
class Prepared:
    """Outcome of :func:`prepare_base`: the folder, where the base came from, and the files that were linked anew."""

    folder: Path
    source: str
    linked: list[str]
    unchanged: list[str]


def prepare_base(
    folder: Path, source: str | None = None, revision: str | None = None, link: str = "symlink"
) -> Prepared:
    """Link base weights and tokenizer of ``source`` into ``folder``, whose ``config.json`` says what must fit.

    Args:
        folder: a variant's folder (``ckpt/mistral-7b-mod``).
        source: a local checkpoint folder or a hub id; the config's ``mod_base`` if None.
        revision: hub revision; refused for a local folder.
        link: ``symlink``, or ``hard`` (same file system; survives the removal of the source).

    Everything is checked first: architecture numbers, all shards there, readable and complete, safetensors only.
    A second call with the same source changes nothing. Raises :class:`UserError` otherwise, the folder untouched.
    """
    config = _read_config(folder)
    source = source or config.get("mod_base")
    if not source:
        raise UserError(f"{folder / 'config.json'} names no mod_base; say where the base is with --source")
    origin = _locate(source, revision)
    if origin.resolve() == folder.resolve():
        raise UserError(f"--source {source} is the folder itself; give the base model's folder or hub id")
    base = _check_architecture(config, _read_config(origin), folder, origin)
    weights = _weight_files(origin)
    _check_weights(origin, weights, base)
    tokenizer = [name for name in TOKENIZER_FILES if (origin / name).is_file()]
    if not tokenizer:
        raise UserError(f"{origin} holds no tokenizer (one of {', '.join(TOKENIZER_FILES)})")
    other = [name for name in OTHER_FILES if (origin / name).is_file()]
    linked, unchanged = _link_all(origin, folder, [*weights, *tokenizer, *other], link)
    record = {"source": source, "resolved": str(origin.resolve()), "link": link, "files": linked + unchanged}
    write_text(folder / RECORD, json.dumps(record, indent=2) + "\n")
    return Prepared(folder, source, linked, unchanged)


def _read_config(folder: Path) -> dict:
    path = folder / "config.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no config.json in {folder}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no JSON: {error}") from None


def _locate(source: str, revision: str | None) -> Path:
    """The folder that holds the base: ``source`` itself, or the hub cache's snapshot of it."""
    local = Path(source).expanduser()
    if local.is_dir():
        if revision:
            raise UserError(f"--revision {revision} needs a hub id, but {source} is a local folder")
        return local.absolute()
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source) or source.startswith("."):
        raise UserError(f"--source {source} is neither a folder nor a hub id such as mistralai/Mistral-7B-v0.1")
    patterns = ["config.json", SINGLE, INDEX, "model-*.safetensors", *TOKENIZER_FILES, *OTHER_FILES]
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the hub client raises many kinds: offline, gated, unknown, disk full
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{source} did not come from the hub: {reason} (gated models need `hf auth login`; without a network give "
            "--source a local folder)"
        ) from None


def _plain_config(values: Mapping[str, object], where: Path) -> PretrainedConfig:
    """The config of the dense architecture: routing fields and the ``_mod`` of the model type left out."""
    model_type = str(values.get("model_type", "")).removesuffix("_mod")
    if model_type not in CONFIG_MAPPING:
        raise UserError(f"{where / 'config.json'}: model_type {values.get('model_type')!r} is unknown to transformers")
    plain = {key: value for key, value in values.items() if key != "model_type" and not key.startswith("mod_")}
    return CONFIG_MAPPING[model_type](**plain)


def _check_architecture(config: dict, base: dict, folder: Path, origin: Path) -> PretrainedConfig:
    ours, theirs = _plain_config(config, folder), _plain_config(base, origin)
    if ours.model_type != theirs.model_type:
        raise UserError(f"{origin} is a {theirs.model_type} model, {folder} needs a {ours.model_type} model")
    pairs = [(name, getattr(theirs, name, None), getattr(ours, name, None)) for name in ARCHITECTURE]
    wrong = [f"{name} is {there}, not {here}" for name, there, here in pairs if there != here]
    if wrong:
        raise UserError(f"{origin} does not fit {folder / 'config.json'}: {'; '.join(wrong)}")
    return theirs


def _weight_files(origin: Path) -> list[str]:
    """Names of the weight files, the index last. Raises :class:`UserError` if one is missing."""
    if (origin / INDEX).is_file():
        try:
            shards = sorted(set(json.loads((origin / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        except (json.JSONDecodeError, KeyError, AttributeError, UnicodeDecodeError):
            raise UserError(f"{origin / INDEX} is no safetensors index with a weight_map") from None
        bad = [name for name in shards if Path(name).name != name or not name.endswith(".safetensors")]
        if bad:
            raise UserError(f"{origin / INDEX} names {bad[0]!r}, which is no safetensors file of that folder")
        missing = [name for name in shards if not (origin / name).is_file()]
        if missing:
            raise UserError(f"{origin} lacks {len(missing)} of {len(shards)} shards: {', '.join(missing)}")
        return [*shards, INDEX]
    if (origin / SINGLE).is_file():
        return [SINGLE]
    pickled = sorted(path.name for path in origin.glob("*.bin"))
    hint = f" ({pickled[0]} is a pickle, which is never loaded; convert it to safetensors)" if pickled else ""
    raise UserError(f"{origin} holds no {SINGLE} and no {INDEX}{hint}")


def _check_weights(origin: Path, files: list[str], base: PretrainedConfig) -> None:
    """Every tensor of the architecture is there in its shape; only headers are read."""
    found: dict[str, tuple[int, ...]] = {}
    for name in files:
        if name == INDEX:
            continue
        try:
            with safe_open(origin / name, framework="pt") as shard:
                found |= {key: tuple(shard.get_slice(key).get_shape()) for key in shard.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UserError(f"{origin / name} is no whole safetensors file: {error}") from None
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(base)
    tied = set(model.all_tied_weights_keys) if base.tie_word_embeddings else set()
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items() if key not in tied}
    missing = sorted(set(expected) - set(found))
    if missing:
        raise UserError(f"{origin}: {len(missing)} of {len(expected)} tensors are missing, the first is {missing[0]}")
    wrong = [key for key, shape in expected.items() if found[key] != shape]
    if wrong:
        raise UserError(f"{origin}: {wrong[0]} has shape {found[wrong[0]]}, the config needs {expected[wrong[0]]}")


def _link_all(origin: Path, folder: Path, names: list[str], link: str) -> tuple[list[str], list[str]]:
    """Link all files or none; returns the names linked and those that were right already."""
    brought = json.loads((folder / RECORD).read_text())["files"] if (folder / RECORD).is_file() else []
    stale_weights = {path.name for path in folder.glob("*.safetensors")} | {INDEX}
    for name in sorted({*names, *stale_weights}):
        place = folder / name
        if place.exists() and not (place.is_symlink() or name in brought or _same_file(place, origin / name)):
            raise UserError(f"{place} is there and was not brought by this command; move it away first")
    todo = [name for name in names if not _is_link(folder / name, origin / name, link)]
    staged: list[tuple[Path, Path]] = []
    try:
        for name in todo:
            temporary = folder / f".{name}.link"
            temporary.unlink(missing_ok=True)
            if link == "hard":
                os.link((origin / name).resolve(), temporary)
            else:
                temporary.symlink_to(origin / name)
            staged.append((temporary, folder / name))
    except OSError as error:
        for temporary, _ in staged:
            temporary.unlink()
        raise UserError(f"cannot link {origin / name} into {folder}: {error.strerror}; try the other --link") from None
    for temporary, place in staged:
        os.replace(temporary, place)
    for name in sorted((stale_weights | set(brought)) - set(names)):
        (folder / name).unlink(missing_ok=True)
    return todo, [name for name in names if name not in todo]


def _same_file(place: Path, target: Path) -> bool:
    return target.exists() and os.path.samefile(place, target)


def _is_link(place: Path, target: Path, link: str) -> bool:
    if link == "hard":
        return place.exists() and not place.is_symlink() and _same_file(place, target)
    return place.is_symlink() and os.readlink(place) == str(target)

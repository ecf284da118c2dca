"""Bring a base model's weights and tokenizer into ``ckpt/<folder>``, checked before anything is changed."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers import PretrainedConfig
from transformers.core_model_loading import revert_weight_conversion

from router_tuning.bases.description import dense_config, read_config, routed_fields, skeleton
from router_tuning.bases.gguf import convert_gguf
from router_tuning.bases.shards import INDEX, SMALL_FILES, WEIGHTS, bring, small_files, tensor_shapes, weight_map
from router_tuning.errors import UserError
from router_tuning.files import read_json, scratch_folder, write_json, writing
from router_tuning.places import is_hub_id

RECORD = "base.json"
"""What this command brought into a folder: source, revision, files."""
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
ARCHITECTURE = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "hidden_act hidden_activation rms_norm_eps sliding_window layer_types tie_word_embeddings rope_parameters"
).split()


def prepare_base(folder: Path, source: str | None = None, revision: str | None = None) -> tuple[str, list[str]]:
    """Bring the base's weights, by link, and its tokenizer, by copy, from ``source`` into ``folder``.

    The weights of a ``.gguf`` file are converted, and stay here. Everything is checked first: architecture, all shards
    there, readable and complete, safetensors only. Returns the source and the names of the files.

    Args:
        folder: a variant's folder (``ckpt/mistral-7b-mod``), whose ``config.json`` says what must fit; or a new name,
            whose ``config.json`` is made from the base's, with half of the layers routed.
        source: a local checkpoint folder, a ``.gguf`` file, or a hub id; the config's ``mod_base`` if None.
        revision: hub revision; refused for what is local.

    Raises:
        UserError: for what does not fit, is missing, damaged or of an unknown kind; the folder is then untouched.
    """
    known = _check_folder(folder)
    source = source or (read_config(folder).get("mod_base") if known else None)
    if not source:
        reason = f"{folder / 'config.json'} names no mod_base" if known else f"{folder} is a new name"
        raise UserError(f"{reason}: say where the base is with --source (hub id, folder or .gguf file)")
    with scratch_folder(folder.parent) as scratch, writing(folder):
        draft = scratch / folder.name
        origin = _locate(source, revision, draft)
        if origin.resolve() == folder.resolve():
            raise UserError(f"--source {source} is the folder itself; give the base model's folder or hub id")
        base = dense_config(origin)
        if known:
            _check_architecture(dense_config(folder), base, folder, source)
        names = _checked_files(origin)
        if origin != draft:
            draft.mkdir()
            for name in names:  # copies, so that editing a tokenizer here never edits the base's
                bring(origin / name, draft / name, link=name.endswith(".safetensors"))
        (draft / "config.json").unlink(missing_ok=True)
        if not known:
            hub_id = None if Path(source).expanduser().exists() else source
            write_json(draft / "config.json", dict(sorted(routed_fields(base, hub_id).items())))
        resolved = Path(source).expanduser() if origin == draft else origin
        write_json(draft / RECORD, {"source": source, "resolved": str(resolved.resolve()), "files": names})
        _move_in(draft, folder, names)
    return source, names


def _check_folder(folder: Path) -> bool:
    """Whether the folder is a variant's already; UserError for one that holds anything of the user's own."""
    known = (folder / "config.json").is_file()
    if not known and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there and holds no config.json; choose another name, or move it away")
    brought = read_json(folder / RECORD)["files"] if (folder / RECORD).is_file() else []
    mine = [path for path in _candidates(folder) if path.name not in brought and not path.is_symlink()]
    if mine:
        raise UserError(f"{mine[0]} is there and was not brought by this command; move it away first")
    return known


def _candidates(folder: Path) -> list[Path]:
    """The files of a folder that this command might have brought."""
    return [*sorted(folder.glob("*.safetensors")), *folder.glob(INDEX), *small_files(folder)]


def _locate(source: str, revision: str | None, converted: Path) -> Path:
    """The folder that holds the base: ``source`` itself, the hub cache's snapshot of it, or ``converted``."""
    local = Path(source).expanduser()
    if local.exists():
        if revision:
            raise UserError(f"--revision {revision} needs a hub id, but {source} is local")
        if local.is_dir():
            return local.absolute()
        if local.suffix != ".gguf":
            raise UserError(f"--source {source} is a file, but no .gguf file")
        convert_gguf(local.absolute(), converted)
        return converted
    if not is_hub_id(source) or source.endswith(".gguf"):
        raise UserError(f"--source {source} is no folder, no .gguf file, and no hub id such as Qwen/Qwen2.5-0.5B")
    patterns = ["config.json", WEIGHTS, INDEX, "model-*.safetensors", *SMALL_FILES]
    return downloaded(source, patterns, revision=revision)


def downloaded(hub_id: str, patterns: list[str], **options: Any) -> Path:
    """The hub cache's snapshot of a base; UserError where it cannot be had.

    Args:
        patterns: of the files to bring. options: of ``snapshot_download``.
    """
    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns, **options))
    except Exception as error:  # the hub client raises many kinds: offline, gated, unknown, disk full
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{hub_id} did not come from the hub: {reason} (gated models need `hf auth login`; without the hub name "
            "a local folder or .gguf file with --source of prepare_base.py: ckpt/README.md)"
        ) from None


def _check_architecture(ours: PretrainedConfig, theirs: PretrainedConfig, folder: Path, source: str) -> None:
    if ours.model_type != theirs.model_type:
        raise UserError(f"{source} is a {theirs.model_type} model, {folder} needs a {ours.model_type} model")
    pairs = [(name, getattr(theirs, name, None), getattr(ours, name, None)) for name in ARCHITECTURE]
    wrong = [f"{name} is {there}, not {here}" for name, there, here in pairs if not _equal(there, here)]
    if wrong:
        raise UserError(
            f"{source} does not fit {folder / 'config.json'}: {'; '.join(wrong)}; bring another base under a new name"
        )


def _equal(there: object, here: object) -> bool:
    """Numbers that went through float32 on their way, as in GGUF files, are those that they came from."""
    if isinstance(there, float) and isinstance(here, float):
        return math.isclose(there, here, rel_tol=1e-6)
    return there == here


def _checked_files(origin: Path) -> list[str]:
    """Names of the files to bring; UserError unless weights and tokenizer are there and whole. Reads headers only."""
    files = weight_map(origin)
    found = tensor_shapes(files)
    model = skeleton(origin)
    tied = set(model.all_tied_weights_keys) if model.config.tie_word_embeddings else set()
    state = {name: value for name, value in model.state_dict().items() if name not in tied}
    # Some families are stored by other names than those of their modules, as single experts for example.
    stored = min((state, revert_weight_conversion(model, state)), key=lambda names: len(set(names) - set(found)))
    missing = sorted(set(stored) - set(found))
    if missing:
        raise UserError(f"{origin}: {len(missing)} of {len(stored)} tensors are missing, the first is {missing[0]}")
    for name, value in stored.items():
        if found[name] != tuple(value.shape):
            raise UserError(f"{origin}: {name} has shape {found[name]}, the config needs {tuple(value.shape)}")
    small = [path.name for path in small_files(origin)]
    if not set(TOKENIZERS) & set(small):
        raise UserError(f"{origin} holds no tokenizer (one of {', '.join(TOKENIZERS)})")
    shards = sorted({path.name for path in files.values()})
    index = [] if shards == [WEIGHTS] else [INDEX]
    return [*shards, *index, *small]


def _move_in(draft: Path, folder: Path, names: list[str]) -> None:
    """Put all files of ``draft`` into ``folder``, the record last, and take away what an earlier base left."""
    folder.mkdir(exist_ok=True)
    mode = draft.stat().st_mode & 0o666
    for path in sorted(draft.iterdir(), key=lambda path: path.name == RECORD):
        if not path.is_symlink():
            path.chmod(mode)
        os.replace(path, folder / path.name)
    for path in _candidates(folder):
        if path.name not in names:
            path.unlink()

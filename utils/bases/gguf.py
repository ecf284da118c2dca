"""A ``.gguf`` file as an ordinary checkpoint folder: dequantised once, saved as bfloat16 safetensors."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from router_tuning.errors import UserError

ONE_MATRIX = 0.1
"""Embedding and output matrices that differ by less, relative to their norm, are one, rounded in two ways."""


def convert_gguf(file: Path, folder: Path) -> None:
    """Write configuration, weights, generation settings, tokenizer and chat template of ``file`` into ``folder``.

    transformers reads the file and dequantises tensor by tensor; twice the size of the result in memory is enough.

    Raises:
        UserError: without the package ``gguf``; for a file that is damaged, cut short or only partly downloaded, or of
            an architecture that transformers cannot read from this format.
    """
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"{file} needs the package gguf to be read: pip install gguf==0.19.0")
    try:
        model, tokenizer = _read(file)
    except Exception as error:  # readers of a damaged file raise whatever they stumble upon
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"{file} cannot be read as a GGUF model, is it whole? {reason}") from None
    _check_values(model, file)
    plain = _plain(model)
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _edit(folder / "config.json", lambda fields: fields.pop("_model_name_or_path", None))
    _edit(
        folder / "tokenizer_config.json",
        lambda fields: [fields.pop(name, None) for name in ("is_local", "local_files_only")],
    )
    _edit(folder / "tokenizer.json", lambda fields: _drop_foreign_tokens(fields, plain.config.vocab_size))


def _read(file: Path) -> tuple[PreTrainedModel, transformers.PreTrainedTokenizerBase]:
    options = {}
    if hasattr(transformers, "GgufConfig"):  # newer releases keep some architectures quantised unless told
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.bfloat16, local_files_only=True, **options
    )
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
    tokenizer.model_max_length = model.config.max_position_embeddings
    return model, tokenizer


def _check_values(model: PreTrainedModel, file: Path) -> None:
    """A download that stopped may have its full length, with zeros from some byte on."""
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise UserError(f"{file}: {name} holds values that are not finite; bring the file anew")
        if parameter.dim() > 1 and not parameter.any():
            raise UserError(f"{file}: {name} is zero throughout, the file was not brought whole; bring it anew")


def _plain(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights as a model that knows nothing of GGUF; embedding and output matrix are one where they were."""
    config, state = model.config, model.state_dict()
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    embedding, output = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    if not config.tie_word_embeddings and embedding.shape == output.shape:
        some = slice(None, None, 101)
        gap = (embedding[some].float() - output[some].float()).norm() / output[some].float().norm()
        config.tie_word_embeddings = bool(gap < ONE_MATRIX)
    if config.tie_word_embeddings:  # the output matrix is rounded the more finely of the two
        state |= {name: output for name, value in state.items() if value.data_ptr() == embedding.data_ptr()}
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    plain.load_state_dict(state, assign=True)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    return plain


def _drop_foreign_tokens(fields: dict[str, Any], size: int) -> None:
    """Readers add an end-of-text token to a vocabulary that has none; the model has no embedding for it."""
    fields["added_tokens"] = [token for token in fields["added_tokens"] if token["id"] < size]


def _edit(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Change a JSON file; float32 numbers are written as they were meant (1e-06, not 9.999999974752427e-07)."""
    fields = json.loads(path.read_text(encoding="utf-8"), parse_float=lambda text: float(str(numpy.float32(text))))
    edit(fields)
    path.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

"""The folders of ``ckpt/`` that hold a configuration alone: their numbers are those of the published models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from router_tuning.bases.description import dense_config, skeleton

ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = {
    "mistral-7b-mod": ("mistral", 32, 4096, 14336, 32, 8, 32000, 1e4, 4096, 7_241_732_096),
    "qwen-2.5-7b-mod": ("qwen2", 28, 3584, 18944, 28, 4, 152064, 1e6, None, 7_615_616_512),
    "llama3-8b-mod": ("llama", 32, 4096, 14336, 32, 8, 128256, 5e5, None, 8_030_261_248),
    "llama3-8b-instruct-mod": ("llama", 32, 4096, 14336, 32, 8, 128256, 5e5, None, 8_030_261_248),
    "smollm2-135m-instruct": ("llama", 30, 576, 1536, 9, 3, 49152, 1e5, None, 134_515_008),
    "qwen2.5-coder-0.5b-instruct": ("qwen2", 24, 896, 4864, 14, 2, 151936, 1e6, None, 494_032_768),
    "gemma-3-270m": ("gemma3_text", 18, 640, 2048, 4, 1, 262144, 1e6, 512, 268_098_176),
}


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_config_only_folders_hold_the_published_numbers(name: str):
    """The parameter count on the meta device is that of the public model, so no number can be off."""
    kind, layers, hidden, inner, heads, kv, vocab, theta, window, count = PUBLISHED[name]
    values = json.loads((ROOT / "ckpt" / name / "config.json").read_text())
    assert values["model_type"] == kind and values["mod_granularity"] == "attn_sequence"
    assert values["mod_layers"] == list(range(layers - 1 - layers // 2, layers - 1)) and "/" in values["mod_base"]
    config = dense_config(ROOT / "ckpt" / name)
    assert config.model_type == kind
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (layers, hidden, inner)
    assert (config.num_attention_heads, config.num_key_value_heads, config.vocab_size) == (heads, kv, vocab)
    ropes = config.rope_parameters.get("full_attention", config.rope_parameters)
    assert ropes == {"rope_theta": theta, "rope_type": "default"}
    assert getattr(config, "sliding_window", None) == window
    assert sum(parameter.numel() for parameter in skeleton(ROOT / "ckpt" / name).parameters()) == count

"""Exports of token-level routing in vLLM: ``vllm serve EXPORT`` works where this package and vLLM are installed.

vLLM finds :func:`register` by the entry point group ``vllm.general_plugins`` and calls it in each of its processes, so
this file imports nothing of weight. An export's ``config.json`` names ``LlamaModForCausalLM`` and the like, by which
vLLM finds its settings and the classes of :mod:`models`.
"""

from __future__ import annotations

from typing import Any

FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma3")
"""Families of vLLM that are served routed."""


def register() -> None:
    """Make the routed classes of all :data:`FAMILIES` known to vLLM."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

    class RoutedSettings(VerifyAndUpdateConfig):
        @staticmethod
        def verify_and_update_config(vllm_config: Any) -> None:
            from router_tuning.serving.served_routing import prepare

            prepare(vllm_config)

    for family in FAMILIES:
        name = f"{family}ModForCausalLM"
        ModelRegistry.register_model(name, f"router_tuning.serving.models:{name}")
        MODELS_CONFIG_MAP[name] = RoutedSettings

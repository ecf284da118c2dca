"""What is settled before vLLM starts: whether it can serve an export as it is, and at which thresholds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from router_tuning.model import ModConfig
from router_tuning.model.saving import CONFIG_NAME, thresholds_for
from router_tuning.serving.graphs import split_graphs

if TYPE_CHECKING:
    from transformers import PretrainedConfig
    from vllm.config import VllmConfig

BUDGETS = ("mod_capacity", "mod_flops")
"""Entries of ``--hf-overrides`` that set all thresholds from the dial of the export, in shares."""


def prepare(vllm_config: VllmConfig) -> None:
    """Refuse what would go wrong, set thresholds from the dial; without graphs, unless a mode of compilation is named.

    Raises:
        SystemExit: with one line, for a routing that cannot be served, or for settings that do not go with routing.
            It ends a server; an error would come out of the depths of vLLM's validation, with a page about it.
    """
    try:
        _prepare(vllm_config)
    except ValueError as error:
        raise SystemExit(f"error: {vllm_config.model_config.model}: {error}") from None


def _prepare(vllm_config: VllmConfig) -> None:
    from vllm.transformers_utils.repo_utils import get_hf_file_to_dict

    model = vllm_config.model_config
    routing = served_routing(model.hf_config)
    budgets = {name: getattr(model.hf_config, name) for name in BUDGETS if hasattr(model.hf_config, name)}
    if budgets:
        dial = get_hf_file_to_dict(CONFIG_NAME, model.model, model.revision)
        routing.threshold = threshold_at(budgets, dial or {}, model.model)
        routing.write_to(model.hf_config)
    if vllm_config.parallel_config.use_ubatching:
        raise ValueError("routed models are not served in microbatches: leave out --enable-dbo and --ubatch-size")
    if vllm_config.compilation_config.mode is None:
        model.enforce_eager = True
    else:
        split_graphs(vllm_config.compilation_config)


def served_routing(config: PretrainedConfig) -> ModConfig:
    """The routing of an export's configuration; ValueError in one line unless all of it is served."""
    routing = ModConfig.read_from(config)
    if routing is None:
        raise ValueError("config.json names no routed layers (mod_layers): export the run anew")
    known = {*routing.to_fields(), *BUDGETS}
    unknown = sorted(name for name in vars(config) if name.startswith("mod_") and name not in known)
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: no such setting of routing; one of {', '.join(sorted(known))}")
    for part, level in routing.parts.items():
        if level != "token" or part not in ("attn", "mlp"):
            raise ValueError(
                f"granularity {routing.granularity!r}: vLLM serves attn_token and mlp_token, not {part}_{level}: use "
                "generate(), or freeze_static.py for a fixed policy"
            )
    if routing.kv_policy != "keep" and "attn" in routing.parts:
        raise ValueError(f"kv_policy {routing.kv_policy!r}: vLLM's cache holds the keys of all tokens: use generate()")
    return routing


def threshold_at(budgets: dict[str, Any], config: dict[str, Any], where: str) -> dict[str, float]:
    """Thresholds by router for one of :data:`BUDGETS`, from the dial of an export's ``router_config.json``."""
    if len(budgets) > 1:
        raise ValueError(f"{' and '.join(budgets)}: name one of them")
    (name, share), *_ = budgets.items()
    if not isinstance(share, (int, float)) or isinstance(share, bool):
        raise ValueError(f"{name} {share!r} must be a number in [0, 1]")
    return thresholds_for(config, float(share), f"{where}/{CONFIG_NAME}", name.removeprefix("mod_"))

"""Dynamic depth for transformers: route a model, train its routers, save and load them."""

from .cache_mod import kv_cache_bytes
from .configuration_mod import GRANULARITIES, ModConfig
from .fit import fit_skip_paths
from .flops import flops_share
from .penalty import capacity_penalty
from .recording import RoutingLog, force_routing, record_routing
from .registry import defer
from .routed_model import prompt_length_from
from .routing import is_routed, route, routed_modules, set_thresholds, unroute
from .saving import load_routers, save_routers

defer()

__all__ = [
    "GRANULARITIES",
    "ModConfig",
    "RoutingLog",
    "fit_skip_paths",
    "flops_share",
    "capacity_penalty",
    "force_routing",
    "is_routed",
    "kv_cache_bytes",
    "load_routers",
    "prompt_length_from",
    "record_routing",
    "route",
    "routed_modules",
    "save_routers",
    "set_thresholds",
    "unroute",
]

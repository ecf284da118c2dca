"""A tiny base and a run on it, made once for the tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_checkpoint import write_base, write_run


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    return write_base(tmp_path_factory.mktemp("checkpoints") / "base")


@pytest.fixture(scope="session")
def run(tmp_path_factory, base) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "run", base)


def evaluation(score, capacity=None):
    meter = {"t_gen": {"seconds": 1.5, "requests": 2}, "t_mc": {"seconds": 0.5, "requests": 8}}
    if capacity is not None:
        meter["t_gen"]["capacity"] = {"total": capacity, "3": capacity}
    return {
        "scores": {
            "t_gen": {"exact_match,none": score, "exact_match_stderr,none": 0.01},
            "u_gen": {"exact_match,none": score / 2},
            "t_mc": {"acc,none": 0.9, "acc_norm,none": 0.8},
            "t_text": {"word_perplexity,none": 12.5},
            "g": {"exact_match,none": score * 0.75},
        },
        "groups": ["g"],
        "meter": meter,
        "model": {"routing": {"mod_router_pooling": "sequence"}},
        "provenance": {"date": "today", "device": "CPU", "git_commit": "abc", "versions": {"lm_eval": "0"}},
    }


@pytest.fixture
def evaluated():
    """What ``evaluate`` returns, shortened: ``evaluated(score, capacity)``."""
    return evaluation


@pytest.fixture
def comparison():
    """What ``compare`` returns, shortened."""
    times = {"seconds_dense": 2.0, "seconds_routed": 1.0, "time_ratio": 0.51}
    static = {"kept": [3, 5], "search_loss": 1.25, "search_method": "exhaustive"}
    return {
        "systems": [
            {"name": "dense", "capacity": 1.0, "flops_share": 1.0, "evaluation": evaluation(0.8)},
            {"name": "tuned", "capacity": 0.4, "flops_share": 0.7, "evaluation": evaluation(0.7, 0.4)},
            {"name": "static 2/4", "capacity": 0.5, "flops_share": 0.75, "evaluation": evaluation(0.6), **static},
        ],
        "cost": {
            "flops_dense": 2e9,
            "flops_routed": 1.4e9,
            "flops_share": 0.7,
            "kv_bytes_dense": 4000,
            "kv_bytes_routed": 3000,
            "kv_share": 0.75,
            "capacity": {"total": 0.4},
            "prefill": times,
            "generate": times,
            "new_tokens": 16,
            "prompts": 9,
            "repeats": 5,
        },
        "plan": {"limit": None},
    }

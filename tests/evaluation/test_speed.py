"""The speed benchmark measures what it says: exact capacities, an ideal without the skipped work, honest ratios."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from tiny_models import tiny_model
from tiny_routed import LAYERS

from utils.evaluation.cost import count_flops
from utils.evaluation.speed import Setting, benchmark, forced_mask, reduced
from utils.model import ModConfig, force_routing, route

GRANULARITIES = ["attn_sequence", "attn_token", "mlp_sequence", "mlp_token", "block_sequence", "block_token"]


def setting(phase, granularity, capacities=(0.0, 0.5, 1.0), batch=4):
    return Setting(phase, batch, 16, granularity, "keep", LAYERS, list(capacities), repeats=2)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_rows_hold_reached_capacity_work_and_memory(phase, granularity):
    none, half, everything = benchmark(tiny_model(), setting(phase, granularity))
    assert none["capacity"] == 0 and everything["capacity"] == 1
    # A decoding token of its own has a decision of its own: the capacity of the prompt is the exact one.
    assert half["capacity"] == pytest.approx(0.5, abs=0.1)
    assert none["flops_routed"] < half["flops_routed"] <= everything["flops_routed"] == everything["flops_dense"]
    assert everything["skip_efficiency"] is None
    for row in (none, half, everything):
        assert row["slower_than_dense"] == (row["time_ratio"] > 1)
        assert row["speed_up"] == pytest.approx(1 / row["time_ratio"])
        if row["skip_efficiency"] is not None:
            assert row["skip_efficiency"] == pytest.approx((1 - row["time_ratio"]) / (1 - row["ideal_ratio"]))
    stored = 1 - len(LAYERS) / 5 if granularity in ("attn_sequence", "block_sequence") else 1
    assert none["kv_bytes_routed"] == pytest.approx(stored * none["kv_bytes_dense"])


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_the_ideal_does_exactly_the_work_that_skipping_leaves(granularity):
    dense = tiny_model()
    parts = ModConfig(mod_layers=[0], granularity=granularity).parts
    keys_only = (parts.get("attn") or parts.get("block")) == "token"
    floor = reduced(dense, parts, LAYERS, keys_only)
    routed = route(tiny_model(), mod_layers=LAYERS, granularity=granularity)
    inputs = {"input_ids": torch.randint(3, 61, (2, 8))}
    with force_routing(routed, False):
        assert count_flops(routed, inputs, use_cache=True) == count_flops(floor, inputs, use_cache=True)


@pytest.mark.parametrize("capacity", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_forced_masks_have_the_capacity_asked_for(capacity):
    for level, tokens in (("sequence", 16), ("token", 16)):
        masks = forced_mask(setting("prefill", f"attn_{level}"), level, capacity, tokens)
        shares = torch.cat([mask.flatten().float() for mask in masks.values()])
        assert shares.mean().item() == pytest.approx(capacity, abs=1e-6)


def test_the_command_writes_its_rows_and_a_figure(root, tmp_path):
    command = [sys.executable, str(root / "entrypoints/analysis/benchmark_speed.py"), "--output", "speed.json"]
    command += ["--phases", "prefill", "--lengths", "8", "--batches", "2", "--repeats", "2", "--device", "cpu"]
    command += ["--granularities", "attn_token,mlp_sequence", "--kv_policies", "keep,drop", "--capacities", "0,1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "speed.json").read_text())
    assert len(content["rows"]) == 6 and "benchmark_speed.py" in content["command"]
    assert (tmp_path / "speed.svg").stat().st_size > 0
    wrong = subprocess.run([*command, "--mod_n", "9"], cwd=tmp_path, capture_output=True, text=True)
    assert wrong.returncode != 0 and "--mod_n 9 must lie in 1…7" in wrong.stderr and "Traceback" not in wrong.stderr

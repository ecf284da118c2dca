"""The speed benchmark measures what it says: exact capacities, an ideal without the skipped work, honest ratios."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from tiny_models import tiny_model
from tiny_routed import LAYERS

from router_tuning.evaluation.cost import count_flops
from router_tuning.model import ModConfig, force_routing, route
from router_tuning.speed.benchmark import Setting, benchmark, forced_mask
from router_tuning.speed.ideal import reduced

GRANULARITIES = ["attn_sequence", "attn_token", "mlp_sequence", "mlp_token", "block_sequence", "block_token"]


def setting(phase, granularity, capacities=(0.0, 0.5, 1.0), batch=4):
    return Setting(phase, batch, 16, granularity, "keep", LAYERS, list(capacities), repeats=2, builds=2)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_rows_hold_reached_capacity_work_and_memory(phase, granularity):
    none, half, everything = benchmark(tiny_model(), setting(phase, granularity))
    assert (none["capacity"], half["capacity"], everything["capacity"]) == (0, 0.5, 1)
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
    floor = reduced(dense, ModConfig(mod_layers=LAYERS, granularity=granularity))
    routed = route(tiny_model(), mod_layers=LAYERS, granularity=granularity)
    inputs = {"input_ids": torch.randint(3, 61, (2, 8))}
    with force_routing(routed, False):
        assert count_flops(routed, inputs, use_cache=True) == count_flops(floor, inputs, use_cache=True)


@pytest.mark.parametrize("capacity", [0.0, 0.25, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("level", ["sequence", "token"])
def test_forced_masks_have_the_capacity_asked_for(level, capacity):
    masks = forced_mask(setting("prefill", f"attn_{level}"), capacity)
    shares = torch.cat([mask.flatten().float() for mask in masks.values()])
    assert shares.mean().item() == pytest.approx(capacity, abs=1e-6)


def test_forced_masks_of_decoding_have_it_in_the_prompt_and_in_the_steps():
    decoding = Setting("decode", 2, 15, "attn_token", "keep", LAYERS, [0.25], repeats=8)
    for mask in forced_mask(decoding, 0.25).values():
        assert mask.shape == (2, 16 + 8)
        assert mask[:, :16].sum(1).tolist() == [4, 4] and mask[:, 16:].sum(1).tolist() == [2, 2]


@pytest.mark.parametrize("granularity", ["attn_token", "mlp_token", "attn_sequence+mlp_token"])
def test_the_capacity_of_decoding_is_that_of_the_timed_steps(granularity):
    """Own decisions, in a model whose tokens decide by their number: even ones are kept."""
    dense = tiny_model()
    routed = route(tiny_model(), mod_layers=[1], granularity=granularity)
    decoding = Setting("decode", 1, 12, granularity, "keep", [1], [None], repeats=6, builds=2)
    seen = []
    routed.model.register_forward_pre_hook(lambda _, __, kw: seen.append(kw["input_ids"]), with_kwargs=True)
    part = granularity.split("+")[-1].split("_")[0]
    module = routed.model.layers[1].self_attn if part == "attn" else routed.model.layers[1].mlp
    module.mod_router.register_forward_hook(lambda *_: torch.where(seen[-1] % 2 == 0, 1.0, -1.0)[..., None])
    (row,) = benchmark(dense, decoding, routed)
    steps = torch.cat([ids for ids in seen if ids.shape[1] == 1], dim=1)[0]
    assert len(steps) == 2 * 7 + 3, "two builds of seven steps; two in measuring, one of them for the peak"
    expected = (steps[-6:] % 2 == 0).float().mean().item()
    assert 0 < expected < 1
    assert row["capacity"] == pytest.approx(expected if "+" not in granularity else (1 + expected) / 2)


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of the resident set is read from Linux")
def test_peak_memory_is_that_of_the_step_though_freed_pages_are_kept(root):
    program = (
        "import torch; from router_tuning.data.pages import keep_freed_pages\n"
        "from router_tuning.speed.benchmark import _peak_bytes\n"
        "keep_freed_pages(); torch.ones(64 << 20)\n"
        "print(_peak_bytes(lambda: torch.ones(16 << 20), torch.device('cpu')))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    assert 63 << 20 < int(done.stdout) < 80 << 20


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

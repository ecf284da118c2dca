"""The speed benchmark measures what it says: exact capacities, an ideal without the skipped work, honest ratios."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys

import pytest
import torch
from counted_operations import counted
from tiny_models import tiny_model
from tiny_routed import LAYERS

from router_tuning.files import read_json_lines
from router_tuning.model import GRANULARITIES as EVERY
from router_tuning.model import ModConfig, force_routing, record_routing, route, routed_modules
from router_tuning.speed.benchmark import Setting, benchmark, imposed, random_masks
from router_tuning.speed.cells import measured
from router_tuning.speed.ideal import reduced

GRANULARITIES = (*(name for name in EVERY if "expert" not in name), "attn_token+mlp_token")


def setting(phase, granularity, capacities=(0.0, 0.5, 1.0), batch=4, length=16, repeats=2, builds=1):
    routing = ModConfig(mod_layers=LAYERS, granularity=granularity)
    return Setting(phase, batch, length, routing, capacities, repeats, builds=builds)


@pytest.mark.parametrize(
    "phase, batch, granularity",
    [*[("prefill", 4, g) for g in GRANULARITIES], *[("decode", 8, g) for g in ("attn_sequence", "mlp_token")]],
)
def test_rows_hold_reached_capacity_work_and_memory(phase, batch, granularity):
    none, half, everything = benchmark(tiny_model(), setting(phase, granularity, batch=batch, builds=2))
    assert (none["capacity"], half["capacity"], everything["capacity"]) == (0, 0.5, 1)
    assert none["share"] < half["share"] < everything["share"] == 1
    assert everything["skip_efficiency"] is None
    for row in (none, half, everything):
        assert row["time_ratio_spread"]["lower_quartile"] <= row["time_ratio"]
        if row["skip_efficiency"] is not None:
            assert row["skip_efficiency"] == pytest.approx((1 - row["time_ratio"]) / (1 - row["ideal_ratio"]))
    stored = 1 - len(LAYERS) / 5 if granularity in ("attn_sequence", "block_sequence") else 1
    assert none["kv_bytes_routed"] == pytest.approx(stored * none["kv_bytes_dense"])


@pytest.mark.parametrize(
    "granularity, kv_policy", [*[(g, "keep") for g in GRANULARITIES], ("attn_token", "drop"), ("block_token", "drop")]
)
def test_the_ideal_does_exactly_the_work_that_skipping_leaves(granularity, kv_policy):
    floor = reduced(tiny_model(), ModConfig(mod_layers=LAYERS, granularity=granularity, kv_policy=kv_policy))
    routed = route(tiny_model(), mod_layers=LAYERS, granularity=granularity, kv_policy=kv_policy)
    inputs = {"input_ids": torch.randint(3, 61, (2, 8)), "use_cache": True}
    with force_routing(routed, False):
        assert counted(routed, **inputs) == counted(floor, **inputs)


@pytest.mark.parametrize("capacity", [0.0, 0.25, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("level", ["sequence", "token"])
def test_random_masks_have_the_capacity_asked_for(level, capacity):
    masks = random_masks(setting("prefill", f"attn_{level}"), capacity)
    shares = torch.cat([mask.flatten().float() for mask in masks.values()])
    assert shares.mean().item() == pytest.approx(capacity, abs=1e-6)


def test_random_masks_of_decoding_have_it_in_the_prompt_and_in_the_steps():
    decoding = setting("decode", "attn_token", batch=2, length=15, repeats=8)
    for mask in random_masks(decoding, 0.25).values():
        assert mask.shape == (2, 16 + 8)
        assert mask[:, :16].sum(1).tolist() == [4, 4] and mask[:, 16:].sum(1).tolist() == [2, 2]


def test_imposed_masks_decide_though_every_router_runs():
    model = route(tiny_model(), mod_layers=LAYERS, granularity="attn_token+mlp_sequence")
    masks, ran = random_masks(setting("prefill", "attn_token+mlp_sequence", length=8), 0.5), []
    for module in routed_modules(model).values():
        module.mod_router.register_forward_pre_hook(lambda router, _: ran.append(router))
    with torch.no_grad(), imposed(model, masks), record_routing(model) as log:
        model(input_ids=torch.randint(3, 61, (4, 8)))
    assert len(ran) == len(masks) == len(log.decisions)
    assert all(torch.equal(log.decisions[key], mask) for key, mask in masks.items())


@pytest.mark.parametrize("granularity", ["attn_token", "mlp_token", "attn_sequence+mlp_token"])
def test_the_capacity_of_decoding_is_that_of_the_timed_steps(granularity):
    """Own decisions, in a model whose tokens decide by their number: even ones are kept."""
    routed = route(tiny_model(), mod_layers=[1], granularity=granularity)
    decoding = setting("decode", granularity, (None,), batch=1, length=12, repeats=6)
    seen = []
    routed.model.register_forward_pre_hook(lambda _, __, kw: seen.append(kw["input_ids"]), with_kwargs=True)
    part = granularity.split("+")[-1].split("_")[0]
    router = routed_modules(routed)[f"1.{part}"].mod_router
    router.register_forward_hook(lambda *_: torch.where(seen[-1] % 2 == 0, 1.0, -1.0)[..., None])
    (row,) = benchmark(tiny_model(), decoding, routed)
    steps = torch.cat([ids for ids in seen if ids.shape[1] == 1], dim=1)[0]
    assert len(steps) == 2 + 6, "twice the first step, to measure its memory and to warm up; then those that are timed"
    expected = (steps[-6:] % 2 == 0).float().mean().item()
    assert 0 < expected < 1
    assert row["capacity"] == pytest.approx(expected if "+" not in granularity else (1 + expected) / 2)


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of the resident set is read from Linux")
def test_peak_memory_is_that_of_the_step_though_freed_pages_are_kept(root):
    program = (
        "import torch; from router_tuning.speed.timing import keep_freed_pages\n"
        "from router_tuning.speed.timing import peak_bytes\n"
        "keep_freed_pages(); torch.ones(64 << 20)\n"
        "print(peak_bytes(lambda: torch.ones(16 << 20), torch.device('cpu')))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    assert 63 << 20 < int(done.stdout) < 80 << 20


@pytest.mark.full
def test_the_command_writes_its_rows(root, tmp_path):
    command = [sys.executable, str(root / "entrypoints/analysis/benchmark_speed.py"), "--output", "speed.jsonl"]
    command += ["--shape", "tiny", "--phases", "prefill:2x8,train:2x8", "--repeats", "2", "--device", "cpu"]
    command += ["--granularities", "attn_token,mlp_sequence", "--kv_policies", "keep,drop", "--capacities", "0,1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = read_json_lines(tmp_path / "speed.jsonl")
    assert len(measured(rows)) == 6 + 1 and "benchmark_speed.py" in rows[0]["run"]["command"]


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--mod_n 9", "--mod_n 9 must lie in 1…7"),
        ("--repeats 1", "--repeats 1 must be at least 2"),
        ("--phases p", "--phases 'p'"),
        ("--phases prefill:4", "--phases 'prefill:4'"),
        ("--granularities attn", "granularity 'attn'"),
        ("--skips low", "skip 'low'"),
        ("--capacities 2", "--capacities 2.0"),
        ("--model ckpt/tiny-llama-mod --skips mean", "--skips mean is what the checkpoint"),
    ],
)
def test_wrong_flags_are_one_line(root, tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(root)
    monkeypatch.setattr(sys, "argv", ["benchmark_speed.py", *flags.split(), "--output", str(tmp_path / "speed.jsonl")])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(root / "entrypoints/analysis/benchmark_speed.py"), run_name="__main__")
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ") and message in line


FAULTS = """
import json, resource, sys
import torch
from router_tuning.speed.timing import keep_freed_pages
kept = keep_freed_pages() if sys.argv[1] == "keep" else None

torch.ones(64 << 20)  # a hole that small blocks between the next ones do not fill
counts = []
for _ in range(8):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(12 << 20)
    counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(json.dumps([kept, min(counts)]))  # the system may take pages back at any time
"""


def faults(pages: str, root) -> tuple[bool | None, int]:
    command = [sys.executable, "-c", FAULTS, pages]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.full
def test_freed_memory_is_not_mapped_anew(root):
    kept, count = faults("keep", root)
    if not kept:
        pytest.skip("this C library takes no such option")
    assert count < 100 < faults("release", root)[1]

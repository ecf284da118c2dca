"""The speed benchmark measures what it says: exact capacities, an ideal without the skipped work, honest ratios."""

import pytest
import torch
from counted_operations import counted
from tiny_models import tiny_model
from tiny_routed import LAYERS

from router_tuning.files import read_json_lines
from router_tuning.model import GRANULARITIES as EVERY
from router_tuning.model import ModConfig, force_routing, record_routing, route, routed_modules
from router_tuning.places import ROOT
from router_tuning.speed.benchmark import Setting, benchmark, imposed, random_masks, reduced
from router_tuning.speed.cells import measured

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
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


def test_imposed_masks_decide_though_every_router_runs():
    model = route(tiny_model(), mod_layers=LAYERS, granularity="attn_token+mlp_sequence")
    masks, ran = random_masks(setting("prefill", "attn_token+mlp_sequence", length=8), 0.5), []
    for module in routed_modules(model).values():
        module.mod_router.register_forward_pre_hook(lambda router, _: ran.append(router))
    with torch.no_grad(), imposed(model, masks), record_routing(model) as log:
        model(input_ids=torch.randint(3, 61, (4, 8)))
    assert len(ran) == len(masks) == len(log.decisions)
    assert all(torch.equal(log.decisions[key], mask) for key, mask in masks.items())


def test_a_base_whose_configuration_says_what_to_route_is_timed_dense_beside_itself(command, tmp_path):
    cell = "--phases prefill:1x4 --granularities mlp_token --capacities 0.5 --repeats 2 --builds 1 --device cpu"
    base, output = ["--model", ROOT / "ckpt/tiny-llama-mod"], tmp_path / "speed.jsonl"
    assert command("analysis/benchmark_speed.py", *base, *cell.split(), "--output", output) == 0
    [row] = measured(read_json_lines(output))
    assert row["capacity"] == 0.5 and row["share"] < 1


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--mod_n 9", "--mod_n 9 must lie in 1…7"),
        ("--mod_n 0", "--mod_n: 0 must"),
        ("--repeats 1", "--repeats: 1 must be a whole number, at least 2"),
        ("--phases p", "--phases 'p'"),
        ("--phases prefill:4", "--phases 'prefill:4'"),
        ("--granularities attn", "granularity 'attn'"),
        ("--skips low", "skip 'low'"),
        ("--capacities 2", "--capacities 2.0"),
        ("--kv_policies drop --granularities mlp_token", "is for attn_token, block_token, not mlp_token"),
        (f"--model {ROOT / 'ckpt/tiny-llama-mod'} --shape tiny", "leave one of them out"),
        ("--device foo", "--device foo is no device of torch's"),
        ("--model /nowhere", "/nowhere/config.json: no such file"),
        pytest.param("--device cuda", "sees no GPU; rehearse on a CPU with --shape tiny", marks=NO_GPU),
    ],
)
def test_wrong_flags_are_one_line(command, tmp_path, capsys, flags, message):
    assert command("analysis/benchmark_speed.py", *flags.split(), "--output", tmp_path / "speed.jsonl") == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line and not list(tmp_path.iterdir())

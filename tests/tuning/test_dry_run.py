"""The plan of a run: real bases from their config.json alone."""

from __future__ import annotations

import pytest
import tiny_tuning

from router_tuning.errors import UserError
from router_tuning.tuning.command.command_line import parse_command
from router_tuning.tuning.dry_run import dry_run

# Parameters in billions, as published.
BASES = {"mistral-7b-mod": 7.242, "llama3-8b-mod": 8.030, "qwen-2.5-7b-mod": 7.616}


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("full", [False, True])
def test_real_bases_without_weights(root, name, full):
    assert not list((root / "ckpt" / name).glob("*.safetensors")), "the plan needs none"
    text = dry_run(parse_command(["--folder_name", name, "--dry_run", "--router_only", str(not full)]))
    billions, (layers, hidden) = BASES[name], (28, 3584) if "qwen" in name else (32, 4096)
    assert f"{billions:.3f} B parameters in {'float32' if full else 'bfloat16'}" in text
    assert f"the deepest {layers // 2} of {layers} but the last" in text
    assert full or f"routers: {layers // 2 * hidden:,} parameters" in text
    assert "steps        15 of 64 sequences, from 1,000 rows" in text
    weights, moments = (4 * billions, 12 * billions) if full else (2 * billions, 0)
    assert f"{weights:.1f} GB of weights, {moments:.1f} GB of gradients and moments" in text


def test_steps_count_the_rows_that_are_there(parts, tmp_path):
    settings = {"dry_run": True, "router_dir": None}
    text = dry_run(tiny_tuning.command(parts, tmp_path / "run", **settings))
    assert f"steps        6 of 8 sequences, from {tiny_tuning.ROWS} rows of {parts['data']}" in text
    with pytest.raises(UserError, match="--mod_n 6 must lie in 1…4: the base has 5 layers"):
        dry_run(tiny_tuning.command(parts, tmp_path / "run", mod_layers=None, mod_n=6, **settings))
    assert not (tmp_path / "run").exists()

"""The plan of a run: real bases from their config.json alone, on 1, 4 and 8 GPUs."""

from __future__ import annotations

import json

import pytest
import tiny_tuning

from router_tuning.errors import UserError
from router_tuning.tuning.command.command_line import parse_command
from router_tuning.tuning.dry_run import dry_run

# Parameters in billions, as published.
BASES = {"mistral-7b-mod": 7.242, "llama3-8b-mod": 8.030, "qwen-2.5-7b-mod": 7.616}


def table(text: str) -> dict[tuple[int, str], dict[str, float]]:
    """``{(GPUs, engine): {column: GB}}`` of a printed plan."""
    lines = text.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("GPUs"))
    columns = lines[start].split()[2:]
    rows = {}
    for line in lines[start + 1 :]:
        if not line:
            break
        values = line.split()[-len(columns) :]
        rows[int(line[:4]), line[6:21].strip()] = dict(zip(columns, map(float, values), strict=True))
    return rows


@pytest.mark.parametrize("name", BASES)
def test_real_bases_without_weights(root, name):
    assert not list((root / "ckpt" / name).glob("*.safetensors")), "the plan needs none"
    text = dry_run(parse_command(["--folder_name", name, "--dry_run", "--per_device_train_batch_size", "1"]))
    billions = BASES[name]
    assert f"{billions:.3f} B parameters in bfloat16" in text
    layers, hidden = (28, 3584) if "qwen" in name else (32, 4096)
    assert f"the deepest {layers // 2} of {layers} but the last" in text
    assert f"routers: {layers // 2 * hidden:,} parameters" in text
    assert "steps        15 of 64 sequences, from 1,000 rows" in text
    rows = table(text)
    assert {gpus for gpus, _ in rows} == {1, 4, 8}
    for (gpus, engine), row in rows.items():
        assert row["gradients"] == row["optimizer"] == 0.0, "routers alone: hundredths of a GB"
        assert row["total"] == pytest.approx(sum(row[part] for part in list(row)[:-1]) + 1.0, abs=0.03)
        if engine in ("one process", "DDP", "ZeRO-1", "ZeRO-2"):
            assert row["weights"] == pytest.approx(2 * billions, abs=0.01)
        elif engine in ("ZeRO-3", "FSDP2"):
            assert 2 * billions / gpus < row["weights"] < 2 * billions / gpus + 2.5
        # The upper half of the layers, each with its MLP's intermediate values, and logits in float32.
        assert 4 < row["activations"] < 12
        assert row["total"] < (24 if "mistral" in name else 26), "a 7-8B base fits on one 32 GB card"


def test_checkpointing_lowers_and_longer_rows_raise_activations(parts, tmp_path):
    def activations(tokens: int, **settings) -> float:
        settings |= {"dry_run": True, "router_dir": None, "per_device_train_batch_size": 1024}
        command = tiny_tuning.command(
            parts, tmp_path / "run", global_batch_size=1024, max_seq_length=tokens, **settings
        )
        return table(dry_run(command))[1, "one process"]["activations"]

    plain = activations(512)
    assert activations(512, gradient_checkpointing=True) < 0.8 * plain and activations(256) < 0.6 * plain


def test_the_number_of_processes_is_planned_for(parts, tmp_path):
    text = dry_run(tiny_tuning.command(parts, tmp_path / "run", dry_run=True, router_dir=None, num_processes=2))
    assert (2, "ZeRO-3 offload") in table(text)


def test_steps_count_the_rows_that_are_there(parts, tmp_path):
    settings = {"dry_run": True, "router_dir": None}
    text = dry_run(tiny_tuning.command(parts, tmp_path / "run", **settings))
    assert f"steps        6 of 8 sequences, from {tiny_tuning.ROWS} rows of {parts['data']}" in text
    with pytest.raises(UserError, match="--mod_n 6 must lie in 1…4: the base has 5 layers"):
        dry_run(tiny_tuning.command(parts, tmp_path / "run", mod_layers=None, mod_n=6, **settings))
    assert not (tmp_path / "run").exists()


def test_a_base_of_another_architecture(tmp_path, parts):
    """Experts, whose products have a shape function of their own."""
    import tiny_checkpoint

    base = tiny_checkpoint.write_base(tmp_path / "mixtral", family="mixtral")
    (base / "model.safetensors").unlink()
    for dtype in ("float32", "bfloat16"):
        settings = {"dry_run": True, "router_dir": None, "granularity": "expert_token", "dtype": dtype}
        text = dry_run(tiny_tuning.command({**parts, "base": base}, tmp_path / "run", **settings))
        config = json.loads((base / "config.json").read_text())
        assert f"{3 * config['num_local_experts'] * config['hidden_size']:,} parameters" in text

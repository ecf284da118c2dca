"""What a run will take: the plan of a real base from its config.json alone, the time that is told at the start."""

import pytest
from tiny_models import tiny_model
from tiny_tuning import ROWS, command

from router_tuning.errors import UserError
from router_tuning.tuning import duration
from router_tuning.tuning.command.command_line import parse_command
from router_tuning.tuning.dry_run import dry_run
from router_tuning.tuning.run import Run

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
    text = dry_run(command(parts, tmp_path / "run", dry_run=True, router_dir=None))
    assert f"steps        6 of 8 sequences, from {ROWS} rows of {parts['data']}" in text
    with pytest.raises(UserError, match="has no 'experts'"):
        dry_run(command(parts, tmp_path / "run", dry_run=True, router_dir=None, granularity="expert_token"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("seconds", "told"), [(90, "90 s"), (600, "10 minutes"), (10800, "3.0 hours")])
def test_a_long_run_is_told_how_to_be_short(parts, tmp_path, monkeypatch, caplog, seconds, told):
    run, model = Run(command(parts, tmp_path / "out", router_dir=None)), tiny_model()
    run.encode()
    assert duration.reading_rate(model, 2, 32) > 0 and duration.backward_passes(model, 32) > 0
    assert all(parameter.grad is None for parameter in model.parameters()), "nothing is learnt from it"
    monkeypatch.setattr(duration, "reading_rate", lambda *_: duration.tokens_read(run, 2.0) / seconds)
    monkeypatch.setattr(duration, "backward_passes", lambda *_: 2.0)
    caplog.set_level("INFO", logger="router_tuning")
    duration.tell_duration(run, model)
    assert f"estimate: about {told}" in caplog.text
    assert ("fewer --max_train_samples" in caplog.text) == (seconds > 3600)


@pytest.mark.parametrize("granularity", ["attn_token", "attn_sequence"])
def test_few_rows_are_not_counted_as_the_many_that_were_asked_for(parts, tmp_path, granularity):
    options = {"router_dir": None, "recipe": "budget", "gradient_scale": None}
    run = Run(command(parts, tmp_path / "out", granularity=granularity, **options))
    run.encode()
    run.steps, there = 0, sum(run.data.lengths)
    assert there < run.command.budget.calibration_tokens < run.command.budget.label_tokens
    assert duration.tokens_read(run) == 4 * there + 8 * there


def test_a_run_that_goes_on_is_told_what_is_left(parts, tmp_path):
    run = Run(command(parts, tmp_path / "out", router_dir=None))
    run.encode()
    whole, run.resume = duration.tokens_read(run), tmp_path / "out/checkpoint-4"
    assert duration.tokens_read(run) == whole * 2 / run.steps

"""How long a run takes is told before it starts, and where that is hours, the setting that makes it minutes."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_model
from tiny_tuning import command

from router_tuning.tuning import duration
from router_tuning.tuning.duration import LONG, backward_passes, in_words, reading_rate, tokens_read
from router_tuning.tuning.run import Run


def encoded_run(parts, folder, **settings) -> Run:
    run = Run(command(parts, folder / "out", router_dir=None, **settings))
    run.encode()
    return run


@pytest.mark.parametrize("hours", [0.5, 3.0])
def test_a_long_run_is_told_how_to_be_short(parts, tmp_path, monkeypatch, caplog, hours):
    run, model, before = encoded_run(parts, tmp_path), tiny_model(), torch.get_rng_state()
    assert reading_rate(model, 2, 32) > 0 and backward_passes(model, 32) > 0
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in model.parameters()), "nothing is learnt from it"
    monkeypatch.setattr(duration, "reading_rate", lambda *_: tokens_read(run, 2.0) / (hours * LONG))
    monkeypatch.setattr(duration, "backward_passes", lambda *_: 2.0)
    caplog.set_level("INFO", logger="router_tuning")
    duration.tell_duration(run, model)
    assert f"estimate: about {in_words(hours * LONG)}" in caplog.text
    assert ("fewer --max_train_samples" in caplog.text) == (hours > 1)


@pytest.mark.parametrize("granularity", ["attn_token", "attn_sequence"])
def test_few_rows_are_not_counted_as_the_many_that_were_asked_for(parts, tmp_path, granularity):
    run = encoded_run(parts, tmp_path, recipe="budget", granularity=granularity)
    there = sum(run.data.lengths)
    assert there < run.command.budget.calibration_tokens < run.command.budget.label_tokens
    run.steps = 0
    assert tokens_read(run) == 4 * there + 8 * there


@pytest.mark.parametrize(("seconds", "text"), [(0.2, "1 s"), (90, "90 s"), (600, "10 minutes"), (9000, "2.5 hours")])
def test_durations_in_words(seconds, text):
    assert in_words(seconds) == text

"""Signals: the run stops at a micro-batch, its checkpoint is the last whole step, and resuming loses nothing."""

from __future__ import annotations

import os
import signal

import pytest
import tiny_tuning

from router_tuning.tuning.trainer.customized_trainer import RouterTrainer
from router_tuning.tuning.trainer.interruption import StopOnSignal


@pytest.fixture
def stop():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield StopOnSignal().install()
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def signal_at(monkeypatch):
    """Send this process a signal when the given micro-batch begins."""

    def arrange(number: int, micro_batch: int) -> None:
        plain, seen = RouterTrainer.training_step, []

        def training_step(self, *args, **kwargs):
            if len(seen) == micro_batch:
                os.kill(os.getpid(), number)
            seen.append(1)
            return plain(self, *args, **kwargs)

        monkeypatch.setattr(RouterTrainer, "training_step", training_step)

    return arrange


@pytest.mark.parametrize(("number", "micro_batch", "step"), [(signal.SIGTERM, 9, 2), (signal.SIGINT, 11, 3)])
def test_interrupted_and_resumed_equals_undisturbed(
    parts, finished, tmp_path, stop, signal_at, monkeypatch, number, micro_batch, step
):
    """Four micro-batches make a step: the tenth lies within step 3, the twelfth ends it."""
    run = tmp_path / "run"
    signal_at(number, micro_batch)
    tiny_tuning.tune(parts, run, stop, save_steps=100)
    assert stop.signal == number
    assert sorted(path.name for path in run.glob("checkpoint-*")) == [f"checkpoint-{step}"]
    assert not (run / "router.safetensors").exists() and not (run / "run.json").exists()
    monkeypatch.undo()
    tiny_tuning.tune(parts, run, resume_from_checkpoint="auto", save_steps=100)
    assert (run / "router.safetensors").read_bytes() == (finished / "router.safetensors").read_bytes()


def test_before_the_first_step_there_is_nothing_to_save(parts, tmp_path, stop, signal_at):
    signal_at(signal.SIGTERM, 0)
    tiny_tuning.tune(parts, tmp_path / "run", stop)
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_a_signal_outside_of_training_and_a_late_second_one_end_the_process(stop, monkeypatch):
    told = []
    monkeypatch.setattr("router_tuning.tuning.trainer.interruption.logger.info", told.append)
    with pytest.raises(SystemExit) as ended:
        os.kill(os.getpid(), signal.SIGTERM)
    assert ended.value.code == 143 and "RESUME=auto" in told[0]
    stop.training = True
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)  # the terminal's and the launcher's: one wish
    assert stop.signal == signal.SIGINT
    stop.since -= 10
    with pytest.raises(SystemExit) as ended:
        os.kill(os.getpid(), signal.SIGINT)
    assert ended.value.code == 130

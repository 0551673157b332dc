import dataclasses
import signal
import threading

import jax
import numpy as np
import pytest

from qlora_jax.callbacks import Callback
from qlora_jax.lora import split_trainable
from qlora_jax.run import Run
from qlora_jax.train import Stopped, fit
from qlora_jax.train.stop import Interruption, StopRequest
from tests.train.tiny import SMALL, adapted, batches

CONFIG = dataclasses.replace(SMALL, save_every=100, eval_every=4)

# Runs are held to runs of the same programs, bit for bit.
pytestmark = [pytest.mark.unoptimized, pytest.mark.usefixtures("compiled_once")]


class SignalAt(Callback):
    def __init__(self, step, number):
        self.at, self.number, self.ended = step, number, False

    def step(self, report):
        if report.step == self.at:
            signal.raise_signal(self.number)

    def end(self):
        self.ended = True


def run(folder, callbacks=(), evaluate=None):
    there = Run(folder, {}, resume=True)
    there.begin()
    evaluate = evaluate or (lambda model: {"eval_loss": 1.0})
    model = fit(
        adapted(), batches(), CONFIG, run=there, callbacks=callbacks, evaluate=evaluate
    )
    return [np.asarray(leaf) for leaf in jax.tree.leaves(split_trainable(model)[0])]


def test_a_signal_saves_and_the_same_call_goes_on(tmp_path):
    unbroken = run(tmp_path / "unbroken")
    before = signal.getsignal(signal.SIGTERM)
    for number, step in ((signal.SIGTERM, 1), (signal.SIGINT, 3)):
        bar = SignalAt(step, number)
        with pytest.raises(Stopped, match=signal.Signals(number).name) as caught:
            run(tmp_path / "broken", [bar])
        # The signal came when step + 1 was under way.
        assert caught.value.step == step + 1 and bar.ended
        assert (
            Run(tmp_path / "broken", {}, resume=True).checkpoints.latest() == step + 1
        )
    assert signal.getsignal(signal.SIGTERM) == before
    for a, b in zip(run(tmp_path / "broken"), unbroken, strict=True):
        np.testing.assert_array_equal(a, b)


def test_an_evaluation_is_ended_at_once_and_made_up_for(tmp_path):
    calls = []

    def interrupted(model):
        calls.append("begun")
        signal.raise_signal(signal.SIGTERM)
        calls.append("ended")

    with pytest.raises(Stopped) as caught:
        run(tmp_path, evaluate=interrupted)
    assert caught.value.step == 4 and calls == ["begun"]

    def counted(model):
        calls.append("again")
        return {"eval_loss": 1.0}

    run(tmp_path, evaluate=counted)
    assert calls == ["begun", "again", "again"]  # after steps 4 and 6
    steps = [x["step"] for x in Run(tmp_path, {}, resume=True).log.read()]
    assert steps == [1, 2, 3, 4, 4, 5, 6, 6]


def test_the_second_signal_does_what_it_did_before():
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.signal == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_what_is_to_end_at_once_does_not_begin_after_a_signal():
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Interruption), stop.at_once():
            raise AssertionError


def test_other_threads_have_no_signals():
    found = []

    def work():
        with StopRequest() as stop:
            found.append(stop.signal)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [None]

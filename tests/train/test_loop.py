import dataclasses
import json

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from qlora_jax.callbacks import Callback
from qlora_jax.lora import split_trainable
from qlora_jax.optim import paged
from qlora_jax.run import Run
from qlora_jax.train import (
    evaluate,
    fit,
)
from tests.train.tiny import (
    SMALL,
    adapted,
    batches,
)


class Losses(Callback):
    def __init__(self):
        self.reports = []

    def step(self, report):
        self.reports.append(report)


def test_training_reaches_a_loss():
    model = adapted(dropout=0, rank=16)
    before = [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(model))]
    losses = Losses()
    config = dataclasses.replace(SMALL, dropout=0.0, steps=100, rank=16)
    tx = paged(config.optimizer(), min_size=0)
    trained = fit(model, batches(), config, tx, callbacks=[losses])
    assert losses.reports[0].loss > 4  # log(96) = 4.56
    assert losses.reports[-1].loss < 3.6
    assert [r.step for r in losses.reports] == list(range(1, 101))
    assert losses.reports[-1].tokens == 48 and losses.reports[-1].target_tokens == 40
    assert evaluate(trained, [batches().batch(0)]) < 3.6
    # The model that was given is as it was, and the base of the trained one too.
    after = jax.tree.leaves(nnx.state(model))
    assert all((a == b).all() for a, b in zip(before, after, strict=True))
    weight = nnx.state(trained)["layers"]["q_proj"]
    assert isinstance(jax.tree.leaves(weight)[0], jax.Array)


class Killed(Exception):
    pass


class KillAt(Callback):
    def __init__(self, step):
        self.at = step

    def step(self, report):
        if report.step == self.at:
            raise Killed


def leaves(model):
    return jax.tree.leaves(split_trainable(model)[0])


def test_a_killed_run_goes_on_bit_for_bit(tmp_path):
    config = dataclasses.replace(SMALL, accumulate=2, schedule="linear")

    def run(name, resume=False, callbacks=()):
        folder = Run(tmp_path / name, {"some": "settings"}, resume=resume)
        if folder.recorded(step=0) is None:
            folder.record(step=0)
        tx = paged(config.optimizer(), min_size=0)
        return fit(adapted(), batches(), config, tx, run=folder, callbacks=callbacks)

    def numbers(name):
        text = (tmp_path / name / "metrics.jsonl").read_text()
        lines = [json.loads(line) for line in text.splitlines()]
        timed = {"seconds", "tokens_per_s"}
        return [{k: v for k, v in line.items() if k not in timed} for line in lines]

    unbroken = run("unbroken")
    for step in (1, 5):  # before the first checkpoint, between two
        with pytest.raises(Killed):
            run("broken", resume=True, callbacks=[KillAt(step)])
    resumed = run("broken", resume=True)
    assert all(
        (np.asarray(a) == np.asarray(b)).all()
        for a, b in zip(leaves(unbroken), leaves(resumed), strict=True)
    )
    assert numbers("broken") == numbers("unbroken")
    assert [line["step"] for line in numbers("broken")] == list(range(7))
    # A finished run has nothing to do, and gives the same.
    again = run("broken", resume=True)
    assert all(
        (np.asarray(a) == np.asarray(b)).all()
        for a, b in zip(leaves(again), leaves(resumed), strict=True)
    )


def test_going_on_with_something_else_is_refused(tmp_path):
    def run(config=SMALL, seed=0, model=None, tx=None):
        folder = Run(tmp_path, {}, resume=True)
        folder.record(step=0)
        return fit(model or adapted(), batches(seed), config, tx, run=folder)

    run()
    for change, words in [
        ({"learning_rate": 2e-2}, r"learning_rate=0\.02 \(saved: 0\.01\)"),
        ({"seed": 3}, r"seed=3 \(saved: 0\)"),
        ({"schedule": "linear", "steps": 8}, r"schedule='linear'.*steps=8"),
    ]:
        with pytest.raises(ValueError, match=f"other settings: .*{words}"):
            run(dataclasses.replace(SMALL, **change))
    with pytest.raises(ValueError, match="not those that the saved run was using"):
        run(seed=1)
    with pytest.raises(ValueError, match="is of another model or optimizer"):
        run(tx=optax.sgd(1e-2))
    # Of what changes no number, and of a longer run, nothing is said.
    run(dataclasses.replace(SMALL, steps=8, save_every=3, remat="none"))
    assert Run(tmp_path, {}, resume=True).checkpoints.latest() == 8

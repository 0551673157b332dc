import dataclasses
import itertools
import json
import pathlib
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from qlora_jax.callbacks import Callback
from qlora_jax.lora import split_trainable
from qlora_jax.optim import paged, skip_nonfinite
from qlora_jax.run import Run
from qlora_jax.train import (
    NonfiniteError,
    evaluate,
    fit,
)
from tests.train.tiny import SMALL, KillAt, Killed, adapted, batches

# Runs are held to runs of the same programs, bit for bit.
pytestmark = [pytest.mark.unoptimized, pytest.mark.usefixtures("compiled_once")]


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


class Slow:
    """Batches that take a while to come."""

    seconds = 0.05

    def __init__(self):
        self.iterator = iter(batches())
        self.get_state = self.iterator.get_state

    def __iter__(self):
        return self

    def __next__(self):
        time.sleep(self.seconds)
        return next(self.iterator)


def test_a_step_lasts_as_long_as_its_data_takes(tmp_path):
    """Also the last one, and one that a checkpoint waits for: their rates are true."""
    losses = Losses()
    fit(adapted(), Slow(), SMALL, run=Run(tmp_path, {}), callbacks=[losses])
    assert [r.step for r in losses.reports] == list(range(1, 7))
    assert min(r.seconds for r in losses.reports) >= Slow.seconds


def laborious(tx):
    """An optimizer that takes the device some hundredths of a second."""

    def update(updates, state, params):
        updates, state = tx.update(updates, state, params)
        work = jnp.full(4096, optax.tree.norm(updates))
        work = jax.lax.fori_loop(0, 5000, lambda _, x: jnp.sin(x), work)
        return jax.tree.map(lambda x: x + 0 * work[0], updates), state

    return optax.GradientTransformation(tx.init, update)


def test_a_step_lasts_as_long_as_the_device_takes(tmp_path):
    """Also the first one after a checkpoint, which the host only hands over."""
    losses, tx = Losses(), laborious(SMALL.optimizer())
    config = dataclasses.replace(SMALL, steps=12)
    fit(adapted(), batches(), config, tx, run=Run(tmp_path, {}), callbacks=[losses])
    seconds = [r.seconds for r in losses.reports]
    assert len(seconds) == 12 and min(seconds) > np.median(seconds) / 3


def test_a_model_is_kept_or_consumed():
    results = []
    for consume in (False, True):
        given = adapted()
        leaves = jax.tree.leaves(split_trainable(given)[0])
        fitted = fit(given, batches(), SMALL, consume=consume)
        assert [leaf.is_deleted() for leaf in leaves] == [consume] * len(leaves)
        results.append(jax.tree.leaves(split_trainable(fitted)[0]))
    for kept, consumed in zip(*results, strict=True):
        np.testing.assert_array_equal(kept, consumed)


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
        timed = {"seconds", "tokens_per_s", "peak_gb"}
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


class Spoiled:
    """Batches some of which have a mask that is no number."""

    def __init__(self, bad):
        self.bad = bad

    def __iter__(self):
        for number in itertools.count():
            batch = batches().batch(number)
            if number in self.bad:
                batch["loss_mask"][1, 5] = np.nan
            yield batch


class Without:
    """The same batches without the spoiled ones."""

    def __init__(self, bad):
        self.bad = bad

    def __iter__(self):
        for number in itertools.count():
            if number not in self.bad:
                yield batches().batch(number)


def test_steps_without_a_finite_gradient_are_left_out():
    config = dataclasses.replace(SMALL, dropout=0.0, steps=6)
    tx = paged(config.optimizer(), min_size=0)
    losses = Losses()
    found = fit(adapted(dropout=0), Spoiled({1, 2, 4}), config, tx, callbacks=[losses])
    config = dataclasses.replace(config, steps=3)
    expected = fit(adapted(dropout=0), Without({1, 2, 4}), config)
    for a, b in zip(leaves(found), leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)
    assert [r.skipped for r in losses.reports] == [0, 1, 2, 2, 3, 3]


def test_too_many_of_them_end_the_run_and_the_batch_is_kept(tmp_path):
    config = dataclasses.replace(SMALL, max_skipped=3, steps=9)
    bad = {1, 3, 4, 5}
    with pytest.raises(NonfiniteError, match=r"3 steps in a row .* step 6 ") as caught:
        fit(adapted(), Spoiled(bad), config)
    path = re.search(r"is in (\S+\.npz)\.", str(caught.value))[1]
    with np.load(path) as batch:
        assert np.isnan(batch["loss_mask"][1, 5]) and batch["tokens"].shape == (4, 12)
    pathlib.Path(path).unlink()
    # An optimizer that is not guarded has taken the step: it is the last.
    with pytest.raises(NonfiniteError, match=r"1 steps in a row .* step 2 "):
        fit(adapted(), Spoiled(bad), config, optax.adam(1e-3))
    config = dataclasses.replace(config, steps=4)
    fit(adapted(), Spoiled(bad), config, skip_nonfinite(optax.adam(1e-3)))


class Evaluations(Callback):
    def __init__(self):
        self.found = []

    def evaluated(self, step, numbers, model, best):
        self.found.append((step, numbers["eval_loss"], best))


def scripted(losses):
    values = iter(losses)
    return lambda model: {"eval_loss": next(values)}


def test_the_best_checkpoint_stays_and_patience_ends_the_run(tmp_path):
    config = dataclasses.replace(
        SMALL, eval_every=1, patience=3, steps=9, save_every=1, keep=1
    )
    folder, seen = Run(tmp_path, {}), Evaluations()
    folder.begin()
    losses = [5.0, 3.0, 4.0, float("nan"), 3.0, 1.0]
    fit(
        adapted(),
        batches(),
        config,
        run=folder,
        callbacks=[seen],
        evaluate=scripted(losses),
    )
    assert [(step, best) for step, _, best in seen.found] == [
        (1, True), (2, True), (3, False), (4, False), (5, False),
    ]  # fmt: skip
    assert folder.checkpoints.steps() == [2, 5]
    lines = [line for line in folder.log.read() if "eval_loss" in line]
    assert [line["eval_loss"] for line in lines] == [5.0, 3.0, 4.0, None, 3.0]
    # Taken up again it is over, unless it is to have more patience.
    again = Run(tmp_path, {}, resume=True)
    fit(adapted(), batches(), config, run=again, evaluate=scripted([]))
    config = dataclasses.replace(config, patience=4)
    fit(adapted(), batches(), config, run=again, evaluate=scripted([9.0]))
    assert again.checkpoints.latest() == 6


def test_a_running_mean_is_what_comes_back(tmp_path):
    config = dataclasses.replace(SMALL, ema=0.5, dropout=0.0, steps=3)
    seen = []

    class Keep(Callback):
        def evaluated(self, step, numbers, model, best):
            seen.append([np.asarray(x) for x in leaves(model)])

    def without_mean(steps):
        own = dataclasses.replace(config, ema=0.0, steps=steps)
        return leaves(fit(adapted(dropout=0), batches(), own))

    folder = Run(tmp_path, {})
    folder.begin()
    found = fit(
        adapted(dropout=0),
        batches(),
        dataclasses.replace(config, eval_every=1),
        run=folder,
        callbacks=[Keep()],
        evaluate=scripted([3.0, 2.0, 1.0]),
    )
    mean = leaves(adapted(dropout=0))
    for steps in (1, 2, 3):
        new = without_mean(steps)
        mean = [0.5 * m + 0.5 * n for m, n in zip(mean, new, strict=True)]
        for a, b in zip(mean, seen[steps - 1], strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9)
    for a, b in zip(leaves(found), seen[-1], strict=True):
        np.testing.assert_array_equal(a, b)
    # Saved, and there when the run is taken up again.
    again = fit(
        adapted(dropout=0), batches(), config, run=Run(tmp_path, {}, resume=True)
    )
    for a, b in zip(leaves(again), seen[-1], strict=True):
        np.testing.assert_array_equal(a, b)


def test_evaluations_need_something_to_evaluate():
    with pytest.raises(ValueError, match=r"eval_every=2 asks for evaluations: give"):
        fit(adapted(), batches(), dataclasses.replace(SMALL, eval_every=2))

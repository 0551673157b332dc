import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from qlora_jax.lora import split_trainable
from qlora_jax.run import Run
from qlora_jax.train import (
    TrainConfig,
    fit,
    make_train_step,
    neftune,
    next_token_loss,
)
from tests.train.tiny import SMALL, adapted, batch, batches

pytestmark = [pytest.mark.unoptimized, pytest.mark.usefixtures("compiled_once")]
KEY = jax.random.key(3)
WIDTH = 64


def noise(batch, alpha=5.0, key=KEY, dtype=jnp.float32):
    shape = (*batch["tokens"].shape, WIDTH)
    return neftune(batch, alpha, key)(jnp.zeros(shape, dtype))


def row(length, learned, documents=()):
    """A batch of one row; a mask is 1 at its learned places, documents are packed."""
    mask = np.zeros((1, length), np.float32)
    mask[0, learned] = 1
    found = {"tokens": jnp.arange(length, dtype=jnp.int32)[None], "loss_mask": mask}
    if documents:
        ids = np.repeat(np.arange(1, len(documents) + 1), documents)
        found["segment_ids"] = np.pad(ids, (0, length - len(ids)))[None]
    return found


def test_the_noise_is_uniform_within_alpha_over_the_root_of_what_it_is_on():
    long = row(1000, [999])
    bound = 5.0 / math.sqrt(1000 * WIDTH)
    found = np.asarray(noise(long))
    assert bound * 0.999 < np.abs(found).max() <= bound
    assert found.min() < -0.999 * bound < 0.999 * bound < found.max()
    # Of 64,000 numbers, mean and square, within five of their deviations.
    assert abs(found.mean()) < 5 * bound / math.sqrt(3 * found.size)
    assert abs((found**2).mean() / bound**2 - 1 / 3) < 5 * 0.3 / math.sqrt(found.size)
    np.testing.assert_allclose(noise(long, alpha=10.0), 2 * found, rtol=1e-6)


def test_the_length_is_of_the_document_without_padding():
    def sizes(batch):
        return np.abs(noise(batch)[0]).max(axis=-1) * math.sqrt(WIDTH) / 5

    # The largest of 64 uniform numbers is above 0.85 of their bound but once in 30,000.
    for found, length in [
        (sizes(row(40, [5, 15]))[:16], 16),
        (sizes(row(40, [5], documents=(16, 20)))[:16], 16),
        (sizes(row(40, [5], documents=(16, 20)))[16:36], 20),
        (sizes({"tokens": jnp.zeros((1, 40), jnp.int32)}), 40),
    ]:
        assert (found <= 1 / math.sqrt(length) * 1.0001).all()
        assert (found > 0.85 / math.sqrt(length)).all()


def test_a_row_without_anything_to_learn_does_no_harm():
    assert np.isfinite(noise(row(8, []))).all()


def test_the_key_is_all_that_decides():
    one = batch()
    np.testing.assert_array_equal(noise(one), noise(one))
    assert (noise(one) != noise(one, key=jax.random.key(4))).mean() > 0.99
    assert noise(one, dtype=jnp.bfloat16).dtype == jnp.bfloat16


def test_the_model_sees_its_embeddings_with_the_noise_on_them(model):
    """As if the embeddings of these tokens, each there once, were others."""
    one = row(12, range(2, 12))
    added = neftune(one, 5.0, KEY)
    graph, state = nnx.split(model)
    other = nnx.merge(graph, state)
    table = other.embed[...]
    other.embed = nnx.Param(table.at[one["tokens"]].set(added(table[one["tokens"]])))
    found = model.hidden(one["tokens"], perturb=added)
    np.testing.assert_allclose(found, other.hidden(one["tokens"]), rtol=1e-6)
    without = model.hidden(one["tokens"])
    assert np.abs(found - without).max() > 0.01
    # The loss is of the hidden states with it, the head without.
    loss = next_token_loss(model, one, perturb=added)
    logits = jax.nn.log_softmax(model.head(found))[0, 1:-1]
    expected = -jnp.take_along_axis(logits, one["tokens"][0, 2:, None], 1).mean()
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_a_step_has_it_where_there_is_a_key(model):
    trainable, frozen = split_trainable(adapted(dropout=0))
    tx = optax.sgd(0.1)

    def loss(alpha, key, parts=1):
        step = make_train_step(tx, neftune_alpha=alpha, accumulate=parts)
        own = jax.tree.map(jnp.copy, trainable)
        return float(step(own, tx.init(own), frozen, batch(), key)[2]["loss"])

    plain = loss(0.0, None)
    assert loss(5.0, None) == loss(0.0, KEY) == plain
    noisy = loss(5.0, KEY)
    assert noisy == loss(5.0, KEY) != plain
    assert loss(5.0, jax.random.key(4)) != noisy
    assert loss(5.0, KEY, parts=2) not in (plain, noisy)  # each part has its own


def test_a_run_taken_up_again_has_the_same_noise(tmp_path):
    def trained(folder, *steps):
        for count in steps:
            config = dataclasses.replace(SMALL, neftune_alpha=5.0, dropout=0.0)
            config = dataclasses.replace(config, steps=count)
            run = Run(folder, {}, resume=True)
            model = fit(adapted(0), batches(), config, run=run)
        losses = [line["loss"] for line in run.log.read()]
        return losses, jax.tree.leaves(split_trainable(model)[0])

    losses, unbroken = trained(tmp_path / "a", 4)
    resumed_losses, resumed = trained(tmp_path / "b", 2, 4)
    assert losses == resumed_losses
    for a, b in zip(unbroken, resumed, strict=True):
        np.testing.assert_array_equal(a, b)


def test_it_is_not_negative():
    with pytest.raises(ValueError, match=r"neftune_alpha=-1 must not be negative"):
        TrainConfig(neftune_alpha=-1)

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from qlora_jax.lora import split_trainable
from qlora_jax.train import (
    make_train_step,
    next_token_loss,
    next_token_loss_sum,
)
from tests.train.tiny import CONFIG, batch, dense_loss

pytestmark = pytest.mark.unoptimized


@pytest.mark.parametrize("chunk_size", [7, 44, 1000])
def test_the_loss_in_chunks_is_the_loss(model, chunk_size):
    loss = next_token_loss(model, batch(), chunk_size=chunk_size)
    np.testing.assert_allclose(loss, dense_loss(model, batch()), rtol=1e-6)


def test_its_gradient_too(model):
    # Of the embedding, which is the head too; quantized codes have no gradient.
    graph, state, rest = nnx.split(model, lambda path, _: path[0] == "embed", ...)

    def gradient(loss):
        return jax.grad(lambda s: loss(nnx.merge(graph, s, rest), batch()))(state)

    chunked = gradient(functools.partial(next_token_loss, chunk_size=16))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        chunked,
        gradient(dense_loss),
    )


def test_nothing_to_predict_is_loss_0(model):
    empty = batch() | {"loss_mask": jnp.zeros((4, 12))}
    assert next_token_loss(model, empty) == 0


def test_the_mask_is_of_the_token_predicted(model):
    mask = jnp.zeros((4, 12)).at[0, 5].set(1)
    loss = next_token_loss(model, batch() | {"loss_mask": mask})
    logits = model(batch()["tokens"])[0, 4]
    expected = -jax.nn.log_softmax(logits)[batch()["tokens"][0, 5]]
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    everything = {"tokens": batch()["tokens"]}
    ones = everything | {"loss_mask": jnp.ones((4, 12))}
    assert next_token_loss(model, everything) == next_token_loss(model, ones)


def test_packed_documents_cost_what_they_cost_alone(model):
    """The first token of a document is predicted by nothing."""
    tokens = batch(rows=2)["tokens"]
    segment_ids = jnp.array([[1] * 5 + [2] * 7, [1] * 12])
    packed = {"tokens": tokens, "segment_ids": segment_ids}
    total, count = next_token_loss_sum(model, packed)
    parts = [tokens[:1, :5], tokens[:1, 5:], tokens[1:]]
    sums = [next_token_loss_sum(model, {"tokens": part}) for part in parts]
    np.testing.assert_allclose(total, sum(s for s, _ in sums), rtol=1e-5)
    assert count == sum(c for _, c in sums) == 4 + 6 + 11


def test_logits_are_never_whole(model):
    """No array of the program has as many numbers as [tokens, vocab]."""
    trainable, frozen = split_trainable(model)
    tx = optax.adam(1e-3)
    loss_sum = functools.partial(next_token_loss_sum, chunk_size=8)
    step = make_train_step(tx, loss_sum=loss_sum)
    wide = batch(rows=32)
    text = step.lower(trainable, tx.init(trainable), frozen, wide).as_text()
    assert f"tensor<8x{CONFIG.vocab_size}xf32>" in text
    assert f"x{CONFIG.vocab_size}xf32>" in text
    whole = {f"tensor<{n}x{CONFIG.vocab_size}xf32>" for n in (32 * 11, 32 * 12)}
    assert not any(shape in text for shape in whole)
    assert f"tensor<32x11x{CONFIG.vocab_size}xf32>" not in text

import jax.numpy as jnp
import pytest
from flax import nnx

from qlora_jax.lora import join_trainable, split_trainable
from qlora_jax.models import Llama
from qlora_jax.sharding import committed
from qlora_jax.train import (
    evaluate,
    next_token_loss_sum,
)
from qlora_jax.train.evaluate import _eval_step
from tests.train.tiny import CONFIG, batch


def test_a_model_is_evaluated_with_adapters_or_without(model):
    plain = Llama(CONFIG, rngs=nnx.Rngs(0))
    parts = [batch(seed=0), batch(seed=1) | {"loss_mask": jnp.ones((4, 12))}]
    sums = [next_token_loss_sum(plain, part) for part in parts]
    expected = sum(float(s) for s, _ in sums) / sum(float(c) for _, c in sums)
    assert evaluate(plain, parts) == pytest.approx(expected, rel=1e-6)
    assert abs(evaluate(model, parts) - expected) < 0.1  # the base in 4 bits
    with pytest.raises(ValueError, match="no token to predict"):
        evaluate(plain, [])


def test_a_trained_model_is_evaluated_by_the_same_program(model):
    trainable, frozen = split_trainable(model)
    # As a step returns them, where those before it are bound to no device.
    trained = join_trainable(committed(trainable), frozen)
    first = evaluate(model, [batch()], chunk_size=16)
    compiled = _eval_step(16, None)._cache_size()
    assert evaluate(trained, [batch()], chunk_size=16) == first
    assert _eval_step(16, None)._cache_size() == compiled == 1

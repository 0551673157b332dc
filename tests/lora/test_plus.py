"""LoRA+: the second factor, and magnitudes, learn faster by the ratio."""

import jax
import numpy as np
import optax
import pytest

from qlora_jax.lora import add_lora, lora_plus, split_trainable
from tests.lora.models import Model


@pytest.mark.parametrize("module", [False, True])
def test_b_and_magnitude_learn_faster(module):
    weight = jax.random.normal(jax.random.key(0), (8, 8))
    model = Model() if module else {"a": weight, "b": {"w": weight}}
    targets = "proj" if module else "a|b/w"
    model = add_lora(model, rank=2, targets=targets, dora=True, key=jax.random.key(0))
    trainable, _ = split_trainable(model)
    gradients = jax.tree.map(np.ones_like, trainable)

    def updates(tx):
        return jax.tree.leaves(tx.update(gradients, tx.init(trainable), trainable)[0])

    plain = optax.adamw(1e-3, weight_decay=0.1)
    plus = optax.chain(optax.adamw(1e-3, weight_decay=0.1), lora_plus(16))
    count = 0
    for slow, fast in zip(updates(plain), updates(plus), strict=True):
        ratio = 1 if slow.shape[-1] == 2 else 16  # a is the one of [..., in, rank]
        count += ratio == 16
        np.testing.assert_allclose(fast, ratio * slow, rtol=1e-6)
    assert count == 2 * len(jax.tree.leaves(trainable)) // 3


def test_wrong_ratio():
    with pytest.raises(ValueError, match="ratio=0 must be positive"):
        lora_plus(0)

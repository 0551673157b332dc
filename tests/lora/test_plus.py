"""LoRA+: the second factor, and magnitudes, learn faster by the ratio."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qlora_jax.lora import add_lora, lora_plus, split_trainable
from qlora_jax.optim import paged, with_master
from qlora_jax.train import TrainConfig
from tests.conftest import GOLDEN
from tests.lora.models import Model
from tests.tolerances import ULP_SLICED_OPTIMIZER

KEY = jax.random.key(0)


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


def test_the_rates_are_those_of_peft():
    """One step of its optimizer under a gradient of ones (make_peft.py --initial)."""
    lt = add_lora(jnp.ones((8, 6)), rank=2, targets="", dora=True, key=KEY)
    trainable, _ = split_trainable(lt)
    gradients = jax.tree.map(jnp.ones_like, trainable)
    tx = optax.chain(optax.sgd(1.0), lora_plus(16))
    moved = tx.update(gradients, tx.init(trainable))[0]
    with np.load(GOLDEN / "peft_lora" / "initial.npz") as archive:
        for leaf, name in (("a", "A"), ("b", "B"), ("magnitude", "magnitude_vector")):
            wanted = -archive[f"plus_lora_{name}"]
            np.testing.assert_allclose(getattr(moved, leaf), wanted, rtol=1e-5)


def test_slices_of_b_learn_faster_too():
    """The whole recipe of a lean run, its state in slices, against whole leaves."""
    model = {"w": jax.random.normal(KEY, (64, 64))}
    model = add_lora(model, rank=8, targets="w", key=KEY, dtype=jnp.bfloat16)
    trainable, _ = split_trainable(model)
    gradients = jax.tree.map(lambda x: jnp.cos(9 * x + 1), trainable)
    tx = with_master(TrainConfig(lora_plus=16.0).optimizer())

    def moved(tx):
        state = tx.init(trainable)
        return jax.tree.leaves(jax.jit(tx.update)(gradients, state, trainable)[0])

    sliced = paged(tx, page_size=1024, min_size=0, slice_leaves=True)
    state = jax.tree.leaves(sliced.init(trainable))
    assert len(state) > len(jax.tree.leaves(tx.init(trainable)))
    for a, b in zip(moved(sliced), moved(tx), strict=True):
        np.testing.assert_array_max_ulp(a, b, maxulp=ULP_SLICED_OPTIMIZER)


def test_wrong_ratio():
    with pytest.raises(ValueError, match="ratio=0 must be positive"):
        lora_plus(0)

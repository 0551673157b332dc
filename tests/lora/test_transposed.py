"""The second matrix of an adapter for the kernel: its values, and how it lies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import tuning
from qlora_jax.lora.transposed import transposed


@pytest.fixture(params=[False, True])
def hopper(request, monkeypatch):
    monkeypatch.setattr(tuning, "has_one_hopper", lambda: request.param)
    return request.param


def test_values_and_gradients_are_those_of_the_transpose(hopper):
    b = jax.random.normal(jax.random.key(0), (3, 4, 6))
    weights = jax.random.normal(jax.random.key(1), (6, 4))
    np.testing.assert_array_equal(jax.jit(lambda b: transposed(b))(b[0]), b[0].T)
    found = jax.jit(jax.grad(lambda b: (transposed(b) * weights).sum()))(b[0])
    np.testing.assert_array_equal(found, weights.T)
    batched = jax.jit(jax.vmap(lambda b: transposed(b)))(b)
    np.testing.assert_array_equal(batched, b.transpose(0, 2, 1))


def test_only_there_it_says_how_b_lies(hopper):
    b = jax.ShapeDtypeStruct((4, 6), jnp.bfloat16)
    lowered = jax.jit(lambda b: transposed(b)).lower(b)  # a function not traced before
    assert ("LayoutConstraint" in lowered.as_text()) == hopper

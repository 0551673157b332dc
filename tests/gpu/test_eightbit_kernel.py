"""The fused step of 8-bit moments on a GPU: against its rule, and the plain form."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pallas_kernels import eightbit_kernel as kernels
from pallas_kernels import tuning
from qlora_jax.optim import adamw8bit, lion8bit
from tests.pallas_kernels.test_eightbit_kernel import (
    DTYPES,
    RULES,
    gradients_with_edges,
    zeros,
)
from tests.tolerances import FUSED_UPDATE_RELATIVE

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", RULES)
def test_steps_equal_the_rule(name, dtype):
    """Codes and scales bit for bit, updates up to a root and a reciprocal."""
    _, rule, factors, books = RULES[name]
    size = 256 * 4000 + 100
    rng = np.random.default_rng(0)
    step = jax.jit(lambda *args: getattr(kernels, name)(*args, books))
    moments = zeros(size, books)
    for _ in range(3):
        g = gradients_with_edges(rng, size, dtype)
        update, found = step(jnp.asarray(g), jnp.asarray(factors, jnp.float32), moments)
        wanted, moments = rule(g.astype(np.float32), moments)
        for (codes, absmax), (wanted_codes, wanted_absmax) in zip(
            found, moments, strict=True
        ):
            np.testing.assert_array_equal(np.asarray(codes), wanted_codes)
            np.testing.assert_array_equal(np.asarray(absmax), wanted_absmax)
        with np.errstate(over="ignore"):  # of float16, in both
            wanted = wanted.astype(dtype).astype(np.float32)
        np.testing.assert_allclose(
            np.asarray(update).astype(np.float32),
            wanted,
            rtol=FUSED_UPDATE_RELATIVE[jnp.dtype(dtype).name],
            atol=2.0**-24 if dtype == jnp.float16 else 0,  # its smallest number
        )


@pytest.mark.parametrize("optimizer", [adamw8bit(1e-2), lion8bit(1e-3)])
def test_it_follows_the_plain_form_for_20_steps(optimizer, monkeypatch):
    shape = (1024, 4004)
    target = jax.random.normal(jax.random.key(1), shape)

    def train():
        @jax.jit
        def steps(params, state):
            def step(carry, i):
                params, state = carry
                key = jax.random.fold_in(jax.random.key(2), i)
                grads = params - target + 0.1 * jax.random.normal(key, shape)
                updates, state = optimizer.update(grads, state, params)
                return (optax.apply_updates(params, updates), state), None

            return jax.lax.scan(step, (params, state), jnp.arange(20))[0]

        params = jnp.zeros(shape)
        return jax.device_get(steps(params, optimizer.init(params)))

    params, (found, *_) = train()
    monkeypatch.setattr(tuning, "compute_capability", lambda: None)
    expected, (wanted, *_) = train()
    codes, wanted_codes = found.mu.codes.astype(int), wanted.mu.codes.astype(int)
    assert np.abs(codes - wanted_codes).max() <= 1
    assert (codes != wanted_codes).mean() < 1e-3
    apart = np.sqrt(np.mean((params - expected) ** 2))
    assert apart < 1e-4 * np.sqrt(np.mean(expected**2))

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qlora_jax.optim import paged, skip_nonfinite

PARAMS = {"w": jnp.ones((8, 4)), "b": jnp.arange(4.0)}


def gradient(seed, bad=None):
    rng = np.random.default_rng(seed)
    grads = jax.tree.map(lambda p: jnp.array(rng.normal(size=p.shape), p.dtype), PARAMS)
    return grads if bad is None else grads | {"b": grads["b"].at[1].set(bad)}


def run(tx, gradients):
    params, state = PARAMS, tx.init(PARAMS)

    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for grads in gradients:
        params, state = step(params, state, grads)
    return params, state


def inner():
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("wrap", [lambda tx: tx, lambda tx: paged(tx, min_size=0)])
def test_a_bad_gradient_leaves_no_trace(bad, wrap):
    tx = wrap(skip_nonfinite(inner()))
    good = [gradient(0), gradient(2)]
    params, state = run(tx, [good[0], gradient(1, bad), good[1]])
    expected, expected_state = run(inner(), good)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(
        jax.tree.leaves(state.inner), jax.tree.leaves(expected_state), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    assert state.skipped == 1


def test_pages_stay_apart():
    """Every leaf is chosen by itself: as many pages as the inner optimizer has."""

    def transfers(tx):
        state = tx.init(PARAMS)
        text = jax.jit(tx.update).lower(PARAMS, state, PARAMS).as_text()
        return text.count("optimization_barrier")

    guarded, plain = (
        transfers(paged(tx, min_size=0, page_size=260))
        for tx in (skip_nonfinite(inner()), inner())
    )
    assert guarded == plain > transfers(paged(inner(), min_size=0))

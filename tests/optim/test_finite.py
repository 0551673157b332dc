import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qlora_jax.optim import paged, pages, skip_nonfinite

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


def test_pages_stay_apart(monkeypatch):
    """Every leaf is chosen by itself; `apply_if_finite` ties all of them together."""
    counts, plan = [], pages.plan_pages

    def counted(*args):
        planned = plan(*args)
        counts.append(len(planned))
        return planned

    monkeypatch.setattr(pages, "plan_pages", counted)
    for tx in (inner(), skip_nonfinite(inner()), optax.apply_if_finite(inner(), 3)):
        tx = paged(tx, min_size=0, page_size=260)
        jax.jit(tx.update).lower(PARAMS, tx.init(PARAMS), PARAMS)
    assert counts == [2, 2, 1]

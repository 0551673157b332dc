"""Float32 masters of bfloat16 parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qlora_jax.optim import paged, with_master


def low_params():
    x = jax.random.normal(jax.random.key(0), (64, 32))
    return {"w": x.astype(jnp.bfloat16), "s": jnp.ones([32])}


def run(tx, params, grads, steps):
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
    return params, state


def test_parameters_are_the_rounded_masters_of_a_float32_run():
    params = low_params()
    grads = jax.tree.map(lambda p: jnp.sin(5 * p).astype(p.dtype), params)
    found, state = run(with_master(optax.adamw(1e-3)), params, grads, 20)
    high = jax.tree.map(lambda p: p.astype(jnp.float32), (params, grads))
    expected, _ = run(optax.adamw(1e-3), *high, 20)
    assert found["w"].dtype == jnp.bfloat16
    np.testing.assert_array_max_ulp(state.master["w"], expected["w"], 4)
    np.testing.assert_array_equal(found["w"], state.master["w"].astype(jnp.bfloat16))
    assert state.master["s"] is None  # float32 is its own master
    np.testing.assert_array_max_ulp(found["s"], expected["s"], 4)


def test_steps_below_the_precision_of_bfloat16_add_up():
    params = {"w": jnp.ones([100], jnp.bfloat16)}
    grads = {"w": jnp.ones([100], jnp.bfloat16)}
    # 2**-12 is a sixteenth of the gap below 1
    plain, _ = run(optax.sgd(2.0**-12), params, grads, 64)
    assert (plain["w"] == 1).all()
    found, _ = run(with_master(optax.sgd(2.0**-12)), params, grads, 64)
    assert (found["w"] == 1 - 64 * 2.0**-12).all()


def test_stochastic_rounding_is_right_on_average_and_repeatable():
    params = {"w": jnp.ones([20_000], jnp.bfloat16)}
    grads = {"w": jnp.full([20_000], -1, jnp.bfloat16)}
    step = 2.0**-9  # a quarter of the gap above 1, 2**-7
    tx = with_master(optax.sgd(step), stochastic_rounding=True)
    found, state = run(tx, params, grads, 1)
    values = np.asarray(found["w"], np.float32)
    assert set(np.unique(values)) == {1.0, 1.0 + 2.0**-7}
    # a quarter of 20,000 goes up, give or take five standard deviations
    assert abs((values > 1).mean() - 0.25) < 5 * (0.25 * 0.75 / 20_000) ** 0.5
    assert (state.master["w"] == 1 + step).all()
    again, _ = run(tx, params, grads, 1)
    np.testing.assert_array_equal(again["w"], found["w"])
    other, _ = run(
        with_master(optax.sgd(step), stochastic_rounding=True, seed=1), params, grads, 1
    )
    assert (other["w"] != found["w"]).any()


def test_stochastic_rounding_keeps_infinities():
    params = {"w": jnp.array([1.0, 2.0], jnp.bfloat16)}
    grads = {"w": jnp.array([jnp.inf, 0.0], jnp.bfloat16)}
    tx = with_master(optax.sgd(1.0), stochastic_rounding=True)
    found, _ = run(tx, params, grads, 1)
    assert found["w"].tolist() == [-jnp.inf, 2.0]


def test_paged_masters_are_in_host_memory():
    params = low_params()
    tx = paged(with_master(optax.adamw(1e-3)), min_size=1000, page_size=2**16)
    grads = jax.tree.map(jnp.ones_like, params)
    found, state = run(tx, params, grads, 3)
    expected, _ = run(with_master(optax.adamw(1e-3)), params, grads, 3)
    np.testing.assert_array_equal(found["w"], expected["w"])
    assert state.master["w"].sharding.memory_kind == "pinned_host"


def test_the_masters_of_float32_parameters_are_not_their_buffers():
    params = {"w": jnp.ones([64], jnp.bfloat16), "s": jnp.ones([64])}
    tx = with_master(optax.adam(1e-3))
    state = tx.init(params)
    step = jax.jit(
        lambda p, s: (lambda u, s: (optax.apply_updates(p, u), s))(*tx.update(p, s, p)),
        donate_argnums=(0, 1),
    )
    step(*step(params, state))  # donating one buffer twice would be an error


def test_wrong_calls_are_refused():
    tx = with_master(optax.adam(1e-3))
    params = low_params()
    with pytest.raises(ValueError, match="call update"):
        tx.update(params, tx.init(params))
    half = {"w": jnp.ones([8], jnp.float16)}
    tx = with_master(optax.adam(1e-3), stochastic_rounding=True)
    with pytest.raises(NotImplementedError, match="a parameter is float16"):
        tx.update(half, tx.init(half), half)

"""Properties that every optimizer must have, over `paged` of all of optax's by name."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from qlora_jax.optim import adam8bit, adamw8bit, lion8bit, paged

RATE = dict(learning_rate=1e-2)
OPTIMIZERS = {
    **{
        name: (getattr(optax, name), RATE)
        for name in [
            "adabelief",
            "adadelta",
            "adafactor",
            "adagrad",
            "adam",
            "adamax",
            "adamaxw",
            "adamw",
            "adan",
            "amsgrad",
            "fromage",
            "lamb",
            "lars",
            "lion",
            "nadam",
            "nadamw",
            "novograd",
            "optimistic_adam_v2",
            "optimistic_gradient_descent",
            "radam",
            "rmsprop",
            "rprop",
            "sgd",
            "sign_sgd",
            "signum",
            "sm3",
            "yogi",
        ]
    },
    "noisy_sgd": (optax.noisy_sgd, RATE | dict(key=0)),
    "polyak_sgd": (optax.polyak_sgd, dict(max_learning_rate=1.0)),
    "acprop": (optax.contrib.acprop, RATE),
    "ademamix": (optax.contrib.ademamix, RATE),
    "adopt": (optax.contrib.adopt, RATE),
    "cocob": (optax.contrib.cocob, {}),
    "dadapt_adamw": (optax.contrib.dadapt_adamw, {}),
    "dog": (optax.contrib.dog, {}),
    "madgrad": (optax.contrib.madgrad, RATE),
    "momo": (optax.contrib.momo, RATE),
    "muon": (optax.contrib.muon, RATE),
    "prodigy": (optax.contrib.prodigy, {}),
    "schedule_free_adamw": (optax.contrib.schedule_free_adamw, RATE),
    "adam8bit": (adam8bit, RATE | dict(min_8bit_size=64)),
    "adamw8bit": (adamw8bit, RATE | dict(min_8bit_size=64)),
    "lion8bit": (lion8bit, RATE | dict(min_8bit_size=64)),
}


def make_params(dtype=jnp.float32):
    return {
        "w": jnp.linspace(-1, 1, 128, dtype=dtype).reshape(8, 16),
        "v": jnp.linspace(0, 2, 96, dtype=dtype).reshape(6, 16),
        "b": jnp.ones([4], dtype),
    }


def gradients(params):
    return jax.tree.map(lambda p: jnp.sin(p) + jnp.asarray(0.25, p.dtype), params)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_common_properties(name):
    make, arguments = OPTIMIZERS[name]
    inner = optax.with_extra_args_support(make(**arguments))
    tx = paged(inner, page_size=512, min_size=32)
    # committed, as what comes back from a program with host memory is
    params = jax.device_put(make_params(), jax.devices()[0])
    grads = gradients(params)
    # extra arguments are passed on, and unknown ones accepted
    extra = dict(
        value=jnp.float32(1.0), loss=jnp.float32(1.0), unknown=jnp.float32(0.0)
    )

    def run(tx):
        state = tx.init(params)
        step = jax.jit(lambda g, s, p: tx.update(g, s, p, **extra))
        results = []
        for _ in range(2):
            updates, state = step(grads, state, params)
            results.append((updates, state))
        return results, step

    found, step = run(tx)
    expected, plain_step = run(inner)
    # the numbers and the tree of the inner optimizer, and its types
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    # no more programs for both steps than the inner optimizer: one
    assert step._cache_size() <= plain_step._cache_size() <= 2
    assert step._cache_size() == 1 or name == "noisy_sgd"  # its key is uncommitted
    # the state has one type from step to step: it can be carried by a scan
    types = [jax.tree.map(jax.typeof, state) for _, state in found]
    assert types[0] == types[1]


def test_only_scan_can_tell_a_carry_from_a_state():
    tx = paged(optax.adam(1e-2), page_size=512, min_size=32)
    params = make_params()

    @jax.jit
    def run(params, state):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(gradients(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, state), length=3)[0]

    _, state = run(params, tx.init(params))
    assert state[0].mu["w"].sharding.memory_kind == "pinned_host"


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_parameters_keep_their_type(dtype):
    params = make_params(dtype)
    tx = paged(optax.adamw(1e-2), page_size=512, min_size=32)
    updates, _ = jax.jit(tx.update)(gradients(params), tx.init(params), params)
    assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}


def test_trains_to_the_minimum_of_a_bowl():
    tx = paged(optax.adamw(5e-2, weight_decay=0.0), page_size=512, min_size=32)
    target = make_params()
    params = jax.tree.map(jnp.zeros_like, target)
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        loss, grads = jax.value_and_grad(
            lambda p: optax.tree.norm(optax.tree.sub(p, target), squared=True)
        )(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    for _ in range(200):
        params, state, loss = step(params, state)
    assert loss < 1e-4

"""8-bit optimizers by the fused kernel: when it serves, and what it is asked for."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pallas_kernels import eightbit_kernel, tuning
from qlora_jax.optim import adamw8bit, lion8bit, paged
from tests.pallas_kernels.test_eightbit_kernel import RULES

PARAMS = {"w": (64, 130), "other": (128, 64), "ragged": (41, 101), "small": (4092,)}


@pytest.fixture
def one_gpu(monkeypatch):
    """Tracing as on a machine with one Hopper GPU."""
    monkeypatch.setattr(tuning, "compute_capability", lambda: 9.0)
    monkeypatch.setattr(jax, "device_count", lambda: 1)


def shaped(value=0.0):
    params = {name: jnp.full(shape, value) for name, shape in PARAMS.items()}
    return jax.device_put(params, jax.devices()[0])


def kernels_in(tx) -> int:
    """Kernels in a step, compiled for CUDA."""
    params = shaped()
    traced = jax.jit(tx.update).trace(params, tx.init(params), params)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    return text.count("custom_call @mosaic_gpu")


@pytest.mark.parametrize("optimizer", [adamw8bit, lion8bit])
def test_parameters_that_it_can_do_go_to_the_kernel(one_gpu, optimizer):
    # Not those of a size that is no multiple of 4, nor those with float32 moments.
    assert kernels_in(optimizer(1e-3)) == 2
    assert kernels_in(optax.chain(optax.clip(1.0), optimizer(1e-3))) == 2


@pytest.mark.parametrize("optimizer", [adamw8bit, lion8bit])
def test_a_kernel_is_one_equation_of_a_page(one_gpu, optimizer):
    tx = paged(optimizer(1e-3), min_size=256, page_size=2**13)
    assert kernels_in(tx) == 2


def test_where_it_cannot_the_plain_form_serves(one_gpu, monkeypatch):
    assert kernels_in(adamw8bit(1e-3, block_size=128)) == 0
    assert kernels_in(adamw8bit(1e-3, stochastic_rounding=True)) == 0
    for capability in (None, 8.0, 12.0):
        monkeypatch.setattr(tuning, "compute_capability", lambda c=capability: c)
        assert kernels_in(adamw8bit(1e-3)) == 0
    monkeypatch.setattr(tuning, "compute_capability", lambda: 9.0)
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    assert kernels_in(adamw8bit(1e-3)) == 0


def test_a_sliced_leaf_is_refused_as_without_it(one_gpu):
    tx = paged(adamw8bit(1e-3), min_size=256, page_size=2**14, slice_leaves=True)
    params = {"w": jnp.zeros((512, 64))}  # five slices, all in 8 bits
    with pytest.raises(ValueError, match="treat every number alike"):
        jax.jit(tx.update).trace(params, tx.init(params), params)


def test_batches_and_scans_lower(one_gpu):
    tx = adamw8bit(1e-3)
    params = shaped()
    states = jax.vmap(tx.init)(jax.tree.map(lambda p: jnp.stack([p, p]), params))
    batch = jax.tree.map(lambda p: jnp.stack([p, p]), params)

    def steps(params, states):
        def step(carry, _):
            params, states = carry
            updates, states = jax.vmap(tx.update)(params, states, params)
            return (optax.apply_updates(params, updates), states), None

        return jax.lax.scan(step, (params, states), length=2)[0]

    text = jax.jit(steps).trace(batch, states).lower(lowering_platforms=("cuda",))
    assert text.as_text().count("custom_call @mosaic_gpu") == 2


@pytest.mark.parametrize("name", RULES)
def test_it_is_asked_for_the_step_of_the_plain_form(name, monkeypatch):
    """The kernel's rule in numpy in its place, against the plain form for 20 steps."""
    optimizer = {"adam": adamw8bit(1e-2), "lion": lion8bit(1e-3)}[name]
    _, rule, _, books = RULES[name]

    def by_rule(g, factors, moments, codebooks):
        assert codebooks == books
        if g.size % 4:
            raise NotImplementedError
        flat = [(np.asarray(codes).reshape(-1), absmax) for codes, absmax in moments]
        update, flat = rule(np.asarray(g).reshape(-1), flat, np.asarray(factors))
        moments = [
            (jnp.asarray(codes).reshape(g.shape), jnp.asarray(absmax))
            for codes, absmax in flat
        ]
        return jnp.asarray(update).reshape(g.shape), moments

    monkeypatch.setattr(eightbit_kernel, name, by_rule)

    def train(on_gpu):
        params = shaped()
        state = optimizer.init(params)
        update = optimizer.update if on_gpu else jax.jit(optimizer.update)
        with monkeypatch.context() as patch:
            if on_gpu:
                patch.setattr(tuning, "compute_capability", lambda: 9.0)
                patch.setattr(jax, "device_count", lambda: 1)
            for step in range(20):
                grads = jax.tree.map(
                    lambda p, i=step: (
                        jnp.sin(jnp.arange(p.size) + i).reshape(p.shape) + p
                    ),
                    params,
                )
                updates, state = update(grads, state, params)
                params = optax.apply_updates(params, updates)
        return params, state[0]

    (params, state), (expected, plain) = train(True), train(False)
    for leaf in PARAMS:
        moved = np.abs(np.asarray(expected[leaf])).max()
        apart = np.abs(np.asarray(params[leaf] - expected[leaf]))
        assert apart.mean() < 1e-4 * moved
    found, wanted = (np.asarray(s.mu["w"].codes, int) for s in (state, plain))
    assert np.abs(found - wanted).max() <= 1
    assert (found != wanted).mean() < 1e-3

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qlora_jax.lora import split_trainable
from qlora_jax.optim import paged, skip_nonfinite
from qlora_jax.quant import QuantizedTensor
from qlora_jax.train import (
    committed,
    make_train_step,
    next_token_loss_sum,
    step_options,
)
from tests.train.tiny import adapted, batch


def test_accumulation_is_normalised_over_all_tokens():
    """Parts with few and with many tokens give the step of the whole batch."""
    model = adapted(dropout=0)
    uneven = batch() | {"loss_mask": jnp.ones((4, 12)).at[:2, 3:].set(0)}
    tx = optax.sgd(1.0)

    def run(parts):
        trainable, frozen = split_trainable(model)
        trainable = jax.tree.map(jnp.copy, trainable)
        step = make_train_step(tx, accumulate=parts)
        trainable, _, metrics = step(trainable, tx.init(trainable), frozen, uneven)
        return trainable, metrics

    (whole, expected), (parts, metrics) = run(1), run(4)
    for name in ("loss", "grad_norm", "target_tokens"):
        np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        whole,
        parts,
    )
    with pytest.raises(ValueError, match="4 rows cannot be cut into parts=3"):
        run(3)


def test_the_norm_of_bfloat16_gradients_is_summed_in_float32(model):
    trainable, frozen = split_trainable(model)

    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), trainable)
    tx = optax.trace(1.0)  # whose state is the gradient
    _, state, metrics = make_train_step(tx)(low, tx.init(low), frozen, batch())
    norm = metrics["grad_norm"]
    wide = [np.asarray(g, np.float64) for g in jax.tree.leaves(state.trace)]
    assert norm.dtype == jnp.float32
    # Compilers leave out a rounding before a sum; a bfloat16 norm is off by 2e-3.
    np.testing.assert_allclose(norm, np.sqrt(sum((g**2).sum() for g in wide)), 1e-4)


def test_a_step_is_compiled_once_and_donates(model):
    trainable, frozen = split_trainable(model)
    trainable = committed(jax.tree.map(jnp.copy, trainable))
    tx = paged(optax.adam(1e-3), min_size=0)
    step = make_train_step(tx)
    state = committed(tx.init(trainable))
    for seed in range(3):
        old = jax.tree.leaves(trainable)
        key = jax.random.key(seed)
        trainable, state, metrics = step(
            trainable, state, frozen, batch(seed=seed), key
        )
        assert all(leaf.is_deleted() for leaf in old)
    assert step._cache_size() == 1
    assert np.isfinite(metrics["loss"])
    host = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state) if leaf.ndim}
    assert host == {"pinned_host"}


def test_a_loss_that_is_no_number_makes_no_step(model):
    trainable, frozen = split_trainable(model)
    before = [np.asarray(leaf) for leaf in jax.tree.leaves(trainable)]

    def loss_sum(model, batch):
        total, count = next_token_loss_sum(model, batch)
        return total + jnp.log(batch["bad"]), count  # its gradient is finite

    tx = skip_nonfinite(optax.adam(1e-2))
    step = make_train_step(tx, loss_sum=loss_sum)
    trainable, state = jax.tree.map(jnp.copy, trainable), tx.init(trainable)
    for bad in (0.0, -1.0):
        trainable, state, metrics = step(
            trainable, state, frozen, batch() | {"bad": jnp.float32(bad)}
        )
        assert not np.isfinite(metrics["loss"])
        assert np.isnan(metrics["grad_norm"])
    assert state.skipped == 2
    for a, b in zip(jax.tree.leaves(trainable), before, strict=True):
        np.testing.assert_array_equal(a, b)


def test_options_of_the_compiler_are_for_many_tokens_on_a_gpu(monkeypatch):
    assert step_options(8192, remat="offload") == {}
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert step_options(8192) == {"xla_gpu_enable_triton_gemm": False}
    assert step_options(512) == {}
    assert step_options(512, tune=False) == {
        "xla_gpu_enable_triton_gemm": False,
        "xla_gpu_autotune_level": 0,
        "xla_gpu_dot_merger_threshold_mb": 0,
    }
    # What travels to the host does so beside the kernels, not between them.
    (graphs,) = step_options(512, remat="offload").values()
    assert "FUSION" in graphs.split(",")
    assert not any("SLICE" in kind for kind in graphs.split(","))


def test_xla_knows_every_option(monkeypatch):
    """That of the JAX that is installed: an option that has gone fails the compile."""
    with monkeypatch.context() as patch:
        patch.setattr(jax, "default_backend", lambda: "gpu")
        options = step_options(512, remat="offload", tune=False)
    assert len(options) == 4
    assert jax.jit(lambda x: x + 1, compiler_options=options)(1) == 2
    with pytest.raises(Exception, match="xla_gpu_none_such"):
        jax.jit(lambda x: x + 1, compiler_options={"xla_gpu_none_such": 0})(1)


def test_codes_stay_codes(model):
    """The frozen part holds packed codes: no weight is dequantized for the gradient."""
    _, (_, rest) = split_trainable(model)
    held = jax.tree.leaves(rest, is_leaf=lambda x: isinstance(x, QuantizedTensor))
    assert sum(isinstance(x, QuantizedTensor) for x in held) == 6

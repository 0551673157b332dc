"""The whole training step where it is meant to run: kernels, cuDNN, paging."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import qlora_jax as ql
from benchmarks.models import SHAPES, random_model
from qlora_jax.train import (
    committed,
    next_token_loss,
    next_token_loss_sum,
    step_options,
)
from tests.gpu.shapes import SMALL
from tests.tolerances import (
    POLICY_COSINE,
    POLICY_COSINE_AFTER_ATTENTION,
    POLICY_CURVE_RELATIVE,
    POLICY_LOSS_RELATIVE,
    STEP_COSINE,
)
from tests.train.exact import cosines, gradient, models

pytestmark = pytest.mark.gpu

WIDE = dataclasses.replace(SHAPES["Llama-3-8B"], num_layers=2, vocab_size=4096)


def batch(rows, seq, packed=False):
    tokens = jax.random.randint(jax.random.key(3), (rows, seq), 0, 4096)
    if not packed:
        return {"tokens": tokens}
    ids = jnp.arange(seq) // (seq // 3) + 1
    return {"tokens": tokens, "segment_ids": jnp.broadcast_to(ids, (rows, seq))}


def assert_as_the_float32_model(models_of_both, data, remats):
    trainable, frozen, exact = models_of_both
    # XLA would try hundreds of its own float32 products, minutes of compilation.
    library = {"xla_gpu_enable_triton_gemm": False}
    with jax.default_matmul_precision("highest"):
        exact_loss, expected = gradient(
            trainable, exact, data, compiler_options=library
        )
    for remat in remats:
        options = step_options(data["tokens"].size, remat=remat)
        loss, found = gradient(
            trainable, frozen, data, compiler_options=options, remat=remat
        )
        assert abs(loss - exact_loss) < 0.01 * exact_loss
        for path, cosine in cosines(found, expected).items():
            assert cosine >= STEP_COSINE, (remat, path)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("rows, seq", [(1, 512), (4, 2048)])
def test_gradients_are_those_of_the_float32_model(rows, seq, packed):
    data = batch(rows, seq, packed)
    assert_as_the_float32_model(models(SMALL, rank=16), data, ("none", "full"))


def test_gradients_are_those_of_the_float32_model_at_the_widths_of_8b():
    both = models(WIDE, rank=16, embedding=200)
    assert_as_the_float32_model(both, batch(4, 512), ("none", "full", "offload"))


def test_what_waits_on_the_host_comes_back_as_it_was():
    """Each layer's, and before it is read: the copies go beside the kernels."""
    deep = dataclasses.replace(SMALL, num_layers=6)
    trainable, frozen, _ = models(deep, rank=16)
    data = batch(4, 2048)

    def found(remat):
        def loss(trainable, frozen):
            model = ql.join_trainable(trainable, frozen)
            return next_token_loss(model, data, remat=remat)

        options = step_options(4 * 2048, remat=remat)
        return jax.jit(jax.grad(loss), compiler_options=options)(trainable, frozen)

    expected = found("full")
    for path, cosine in cosines(found("offload"), expected).items():
        assert cosine >= STEP_COSINE, path


def test_adapters_are_not_laid_out_anew():
    """A loop over layers begins without a transposed copy of all second matrices."""
    layers, rank = 4, 16
    deep = dataclasses.replace(WIDE, num_layers=layers)
    model = ql.add_lora(random_model(deep), rank=rank, alpha=16, key=jax.random.key(0))
    trainable, frozen = committed(ql.split_trainable(model))

    def loss(trainable, frozen):
        model = ql.join_trainable(trainable, frozen)
        return next_token_loss(model, batch(1, 512), remat="full")

    compiled = jax.jit(jax.grad(loss), compiler_options=step_options(512, tune=False))
    text = compiled.lower(trainable, frozen).compile().as_text()
    for _, features in deep.linear_shapes().values():
        assert f"f32[{layers},{rank},{features}]" in text
        assert f"f32[{features},{layers},{rank}]" not in text


def trained(remat, tx, steps=8):
    """Losses of a repeated batch."""
    model = ql.add_lora(random_model(WIDE), rank=16, alpha=16, key=jax.random.key(0))
    trainable, frozen = committed(ql.split_trainable(model))
    state = committed(tx.init(trainable))

    def loss_sum(model, batch):
        return next_token_loss_sum(model, batch, remat=remat)

    options = step_options(2048, remat=remat)
    step = ql.make_train_step(tx, loss_sum=loss_sum, compiler_options=options)
    losses = []
    for _ in range(steps):
        trainable, state, metrics = step(trainable, state, frozen, batch(4, 512))
        losses.append(float(metrics["loss"]))
    assert step._cache_size() == 1
    return losses


def test_every_policy_learns_alike():
    # Training amplifies rounding, by 20 a step at a rate of 1e-3: there an initial
    # value nudged by 1e-6 moves the sixth loss by 1e-3, at this rate by 1e-5.
    tx = optax.adamw(2e-4)
    curves = {r: trained(r, tx) for r in ("none", "full", "attention", "offload")}
    curves["paged"] = trained("full", ql.paged(tx, min_size=1))
    first = np.array(curves["none"])
    assert np.isfinite(first).all() and first[-1] < first[0] - 0.1
    for name, losses in curves.items():
        np.testing.assert_allclose(
            losses, first, rtol=POLICY_CURVE_RELATIVE, err_msg=name
        )


def test_every_policy_gives_the_gradients_of_the_others_along_the_way():
    model = ql.add_lora(random_model(WIDE), rank=16, alpha=16, key=jax.random.key(0))
    trainable, frozen = committed(ql.split_trainable(model))
    tx = optax.adamw(1e-3)
    state = tx.init(trainable)

    def compiled(remat):
        def loss(trainable, frozen):
            model = ql.join_trainable(trainable, frozen)
            return next_token_loss(model, batch(4, 512), remat=remat)

        options = step_options(2048, remat=remat)
        return jax.jit(jax.value_and_grad(loss), compiler_options=options)

    @jax.jit
    def update(trainable, state, gradients):
        updates, state = tx.update(gradients, state, trainable)
        return optax.apply_updates(trainable, updates), state

    def least(found, expected, names, layers):
        """The smallest cosine of these weights' adapters in these layers."""
        own = [
            jax.tree_util.tree_map_with_path(
                lambda path, x: x[layers] if path[1].key in names else None, tree
            )
            for tree in (found, expected)
        ]
        by_path = cosines(*own)
        path = min(by_path, key=by_path.__getitem__)
        return by_path[path], path

    none = compiled("none")
    others = {remat: compiled(remat) for remat in ("full", "attention", "offload")}
    loss, expected = none(trainable, frozen)
    # Of the last layer these have no attention's backward before them.
    ends, last = ("o_proj", "gate_proj", "up_proj", "down_proj"), slice(-1, None)
    for step in range(4):
        # After a step, since b is zero before and with it the gradient of a.
        trainable, state = update(trainable, state, expected)
        loss, expected = none(trainable, frozen)
        for remat, policy in others.items():
            same, found = policy(trainable, frozen)
            assert abs(same - loss) <= POLICY_LOSS_RELATIVE * loss, (remat, step)
            cosine, path = least(found, expected, ends, last)
            assert cosine >= POLICY_COSINE, (remat, step, path)
            cosine, path = least(found, expected, WIDE.linear_shapes(), slice(None))
            assert cosine >= POLICY_COSINE_AFTER_ATTENTION, (remat, step, path)

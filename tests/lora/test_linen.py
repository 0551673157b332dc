"""Linen models over params with weights in them, against Flax's own layers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from qlora_jax.lora import (
    LoraTensor,
    add_lora,
    join_trainable,
    linen,
    merge_lora,
    split_trainable,
)
from qlora_jax.quant import QuantizedTensor, quantize
from tests.lora.trees import perturbed
from tests.tolerances import LOGITS_RELATIVE

pytestmark = pytest.mark.unoptimized

KEY = jax.random.key(3)
TOKENS = jnp.arange(10, dtype=jnp.int32).reshape(2, 5) * 7 % 24


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        attention = nn.MultiHeadDotProductAttention(num_heads=4)
        x = x + attention(nn.LayerNorm(name="norm")(x))
        x = x + nn.Dense(32, name="down")(nn.gelu(nn.Dense(64, name="up")(x)))
        return x, None


class Model(nn.Module):
    """Each kind of layer; the blocks are scanned and rematerialised."""

    layers: int = 2

    @nn.compact
    def __call__(self, tokens):
        table = nn.Embed(24, 32, name="embed")
        x = nn.Conv(32, (3,), name="conv")(table(tokens))
        x = nn.Conv(32, (2,), feature_group_count=4, name="grouped")(x)
        x = nn.ConvTranspose(16, (2,), name="up")(x)
        x = nn.ConvTranspose(32, (3,), transpose_kernel=True, name="back_up")(x)
        blocks = nn.scan(
            nn.remat(Block),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.layers,
        )
        x, _ = blocks(name="blocks")(x, None)
        x = nn.DenseGeneral((4, 8), bias_init=nn.initializers.normal(), name="heads")(x)
        x = nn.Einsum((4, 8, 16), "btnh,nhk->btnk", name="mix")(x)
        out = nn.DenseGeneral(32, axis=(-2, -1), dtype=jnp.bfloat16, name="out")
        return table.attend(out(x).astype(jnp.float32))


MODEL = Model()
RUN = jax.jit(linen.apply(MODEL))
PLAIN = jax.jit(MODEL.apply)


@pytest.fixture(scope="module")
def params():
    return jax.jit(MODEL.init)(KEY, TOKENS)["params"]


@pytest.fixture(scope="module")
def forms(params):
    return linen.forms(lambda p: MODEL.apply({"params": p}, TOKENS), params)


def relative(got, wanted):
    got, wanted = (np.asarray(v, np.float64) for v in (got, wanted))
    return np.linalg.norm(got - wanted) / np.linalg.norm(wanted)


def test_forms_are_found_by_tracing(forms):
    attention = "blocks/MultiHeadDotProductAttention_0"
    assert forms[f"{attention}/query/kernel"].matrix_shape == (32, 32)
    assert forms[f"{attention}/out/kernel"].shape == (4, 8, 32)
    assert forms["mix/kernel"].matrix_shape == (4, 8, 16)  # one for each head
    assert forms["conv/kernel"].kind == "conv" and forms["embed/embedding"]
    assert forms["grouped/kernel"].matrix_shape == (2 * 8, 32)
    assert forms["back_up/kernel"].shape == (3, 32, 16)
    assert forms["back_up/kernel"].matrix_shape == (3 * 16, 32) and len(forms) == 14


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_every_layer_computes_what_its_merged_kernel_does(params, forms, quantize):
    every = lambda path, w: path in forms
    adapted = add_lora(
        params, rank=2, targets=every, quantize=quantize, forms=forms, key=KEY
    )
    trainable, frozen = split_trainable(adapted)
    moved = join_trainable(perturbed(trainable), frozen)
    merged = merge_lora(moved, dtype=jnp.float32, report=None)
    assert jax.tree.map(jnp.shape, merged) == jax.tree.map(jnp.shape, params)
    got, wanted = (
        RUN({"params": moved}, TOKENS),
        PLAIN({"params": merged}, TOKENS),
    )
    assert relative(got, wanted) < LOGITS_RELATIVE["bfloat16"] / 5
    if quantize is None:
        zero = RUN({"params": adapted}, TOKENS)
        wanted = PLAIN({"params": params}, TOKENS)
        assert relative(zero, wanted) < LOGITS_RELATIVE["float32"]
    else:
        leaf = adapted["blocks"]["up"]["kernel"]
        assert isinstance(leaf.w, QuantizedTensor) and leaf.a.shape == (2, 32, 2)


def test_it_trains_by_defaults_with_biases_and_norms(params, forms):
    adapted = add_lora(params, rank=4, quantize="nf4", forms=forms, key=KEY)
    assert isinstance(adapted["embed"]["embedding"], jax.Array)
    trainable, frozen = split_trainable(adapted, also="bias$|norm")
    assert sum(isinstance(x, LoraTensor) for x in _leaves(trainable)) == 9
    tx = optax.adam(1e-2)
    apply = linen.apply(MODEL)

    @jax.jit
    def step(trainable, state):
        def loss_fn(t):
            logits = apply({"params": join_trainable(t, frozen)}, TOKENS)
            return optax.softmax_cross_entropy_with_integer_labels(
                logits, TOKENS[:, ::-1]
            ).mean()

        loss, grads = jax.value_and_grad(loss_fn)(trainable)
        updates, state = tx.update(grads, state, trainable)
        return optax.apply_updates(trainable, updates), state, loss

    state = tx.init(trainable)
    losses = []
    for _ in range(50):
        trainable, state, loss = step(trainable, state)
        losses.append(float(loss))
    assert losses[0] > 3 and losses[-1] < 0.05


def _leaves(tree):
    return jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, LoraTensor))


def test_quantized_kernels_without_adapters_and_wrapped_losses():
    model = nn.Dense(64)
    params = model.init(KEY, jnp.ones((1, 64)))["params"]
    held = {**params, "kernel": quantize(params["kernel"])}
    x = jax.random.normal(KEY, (3, 64))
    loss = linen.wrap(lambda p, x: model.apply({"params": p}, x).sum())
    wanted = (x @ held["kernel"] + params["bias"]).sum()
    np.testing.assert_allclose(loss(held, x), wanted, rtol=1e-6)
    with pytest.raises(Exception):  # noqa: B017 - whatever Flax says of the leaf
        model.apply({"params": held}, x)


def test_wrong_calls(params, forms):
    path = "heads/kernel"
    adapted = add_lora(params, rank=2, targets="heads/kernel", key=KEY)
    with pytest.raises(
        ValueError, match=r"'heads' multiplies by a kernel \[32, 4, 8\]"
    ):
        RUN({"params": adapted}, TOKENS)
    quantized = {"heads": {"kernel": quantize(params["heads"]["kernel"])}}
    with pytest.raises(ValueError, match=f"'{path}' is quantized as matrices"):
        add_lora(quantized, rank=2, targets=path, forms=forms, key=KEY)
    params = {"heads": {"kernel": jnp.ones((32, 5, 8))}}
    with pytest.raises(NotImplementedError, match="only stacks along leading axes"):
        add_lora(params, rank=2, targets=path, forms=forms, key=KEY)


class Refused(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.ConvLocal(4, (2,), padding="VALID", name="local")(x)
        return nn.Conv(4, (3,), mask=jnp.ones((3, 4, 4)), name="masked")(x)


def test_convolutions_that_cannot_be_adapted_are_named():
    model, x = Refused(), jnp.ones((2, 5, 4))
    params = model.init(KEY, x)["params"]
    run = lambda p: linen.apply(model)({"params": p}, x)
    assert not linen.forms(lambda p: model.apply({"params": p}, x), params)
    local = add_lora(params, rank=2, targets="local/kernel", key=KEY)
    with pytest.raises(NotImplementedError, match="'local' is a ConvLocal"):
        run(local)
    masked = add_lora(params, rank=2, targets="masked/kernel", key=KEY)
    with pytest.raises(NotImplementedError, match="'masked': a Conv with a mask"):
        run(masked)

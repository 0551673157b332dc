"""Layers of Flax NNX over adapted and quantized kernels, against Flax's own."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from qlora_jax.lora import (
    Frozen,
    LoRAParam,
    LoraTensor,
    add_lora,
    join_trainable,
    merge_lora,
    split_trainable,
    stack_adapters,
)
from qlora_jax.lora import nnx as adapted_layers
from qlora_jax.lora.forms import conv_form
from qlora_jax.quant import QuantizedTensor, dequantize
from tests.lora.trees import perturbed
from tests.tolerances import LOGITS_RELATIVE

pytestmark = pytest.mark.unoptimized

KEY = jax.random.key(3)
TOKENS = jnp.arange(10, dtype=jnp.int32).reshape(2, 5) * 7 % 24


class Zoo(nnx.Module):
    """Every kind of layer, with options that change what it computes."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        bias = nnx.initializers.normal()
        options = {"bias_init": bias, "rngs": rngs}
        self.embed = nnx.Embed(24, 64, rngs=rngs)
        self.conv = nnx.Conv(64, 32, (3,), strides=2, **options)
        self.point = nnx.Conv(32, 64, (1,), use_bias=False, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, 64, decode=False, **options)
        self.heads = nnx.Einsum("...td,ndh->...tnh", (4, 64, 16), (4, 16), **options)
        self.mix = nnx.Einsum("btnh,nhk->btnk", (4, 16, 8), (4, 8), **options)
        self.back = nnx.LinearGeneral((4, 8), (2, 32), axis=(-2, -1), **options)
        self.half = nnx.Linear(
            64, 64, dtype=jnp.bfloat16, preferred_element_type=jnp.float32, **options
        )
        self.each = nnx.LinearGeneral(64, 8, batch_axis={0: 2}, **options)
        self.grouped = nnx.Conv(8, 12, (3,), feature_group_count=2, **options)
        self.up = nnx.ConvTranspose(12, 6, (3,), strides=2, **options)
        self.back_up = nnx.ConvTranspose(
            6, 8, (4,), padding="CIRCULAR", transpose_kernel=True, **options
        )

    def __call__(self, tokens):
        x = self.point(nnx.gelu(self.conv(self.embed(tokens))))
        x = x + self.attention(x)
        x = self.back(self.mix(self.heads(x))).reshape(*x.shape)
        x = self.half(x)
        return self.embed.attend(x), self.back_up(self.up(self.grouped(self.each(x))))


KERNELS = "kernel|embedding"


def relative(got, wanted):
    got, wanted = (np.asarray(v, np.float64) for v in (got, wanted))
    return np.linalg.norm(got - wanted) / np.linalg.norm(wanted)


@pytest.fixture(scope="module")
def zoo():
    return Zoo()


@nnx.jit
def call(model, tokens):
    return model(tokens)


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_every_layer_computes_what_its_merged_kernel_does(zoo, quantize):
    adapted = add_lora(zoo, rank=2, targets=KERNELS, quantize=quantize, key=KEY)
    trainable, frozen = split_trainable(adapted)
    assert len(jax.tree.leaves(trainable)) == 2 * 15
    model = join_trainable(perturbed(trainable), frozen)
    merged = merge_lora(model, dtype=jnp.float32, report=None)
    wanted = call(merged, TOKENS)
    for got, want in zip(call(model, TOKENS), wanted, strict=True):
        assert relative(got, want) < LOGITS_RELATIVE["bfloat16"] / 5
        assert got.dtype == want.dtype
    # Merged, it is a model of Flax's own layers again, with kernels of their shapes.
    shapes = jax.tree.map(jnp.shape, nnx.state(merged))
    assert shapes == jax.tree.map(jnp.shape, nnx.state(zoo))
    assert type(merged.attention.query) is nnx.LinearGeneral
    if quantize is not None:
        again = merge_lora(model, report=None)
        assert isinstance(again.half, adapted_layers.Linear)
        kernel = again.half.kernel.get_value()
        assert isinstance(kernel, QuantizedTensor)
        assert relative(dequantize(kernel), merged.half.kernel[...]) < 0.1
        x = jax.random.normal(KEY, (3, 64))
        exact = x.astype(jnp.bfloat16) @ dequantize(kernel, jnp.bfloat16)
        exact = exact + again.half.bias[...]
        assert relative(again.half(x), exact) < LOGITS_RELATIVE["bfloat16"] / 5


@pytest.mark.optimized
def test_a_zero_adapter_changes_no_bit(zoo):
    targets = "attention|half|embed|conv|point|each|grouped|up"
    adapted = add_lora(zoo, rank=2, targets=targets, key=KEY)

    @nnx.jit
    def run(m, x):
        outputs = [m.attention(x), m.half(x), m.conv(x), m.each(x)]
        outputs += [m.grouped(x[..., :8]), m.up(x[..., :12]), m.back_up(x[..., :6])]
        return [*outputs, m.point(x[..., :32]), m.embed(TOKENS)]

    x = jax.random.normal(KEY, (2, 5, 64))
    for got, wanted in zip(run(adapted, x), run(zoo, x), strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_defaults_are_the_linear_layers(zoo):
    adapted = add_lora(zoo, rank=2, key=KEY)
    found = {
        name
        for name, value in vars(adapted).items()
        if isinstance(getattr(value, "kernel", None), LoraTensor)
    }
    assert found == {"heads", "mix", "back", "half", "each"}
    assert isinstance(adapted.attention.out.kernel, LoraTensor)
    kernel = adapted.attention.out.kernel
    assert kernel.shape == (64, 64) and isinstance(kernel.w, Frozen)
    assert type(zoo.half) is nnx.Linear  # stayed as it was
    assert isinstance(adapted.half, nnx.Linear)
    # A matrix is not copied.
    assert adapted.half.kernel.w.get_value() is zoo.half.kernel.get_value()


def test_rows_of_an_embedding_are_those_dequantized(zoo):
    adapted = add_lora(zoo, rank=2, targets="embed", quantize="nf4", key=KEY)
    weight = adapted.embed.embedding.w.get_value()
    assert weight.shape == (64, 24)
    wanted = dequantize(weight).T[TOKENS]
    np.testing.assert_array_equal(adapted.embed(TOKENS), wanted)


class Stacked(nnx.Module):
    """Layers made by vmap, run by scan, with a shared one."""

    def __init__(self, layers=3):
        @nnx.split_rngs(splits=layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def make(rngs):
            return Inner(rngs)

        self.layers = make(nnx.Rngs(0))
        self.head = nnx.Linear(32, 8, rngs=nnx.Rngs(1))
        self.tied = self.head

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def body(x, layer):
            return layer(x)

        x = body(x, self.layers)
        return self.tied(x + nnx.tanh(self.head(x)) @ jnp.eye(8, 32))


class Inner(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(32, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, 32, decode=False, rngs=rngs)
        self.up = nnx.Linear(32, 64, rngs=rngs)
        self.down = nnx.Linear(64, 32, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm(x))
        return x + self.down(nnx.gelu(self.up(x)))


@pytest.fixture(scope="module")
def stacked():
    return add_lora(
        Stacked(), rank=4, alpha=8, targets="kernel", quantize="nf4", key=KEY
    )


def test_stacks_of_layers_and_shared_ones_train(stacked):
    assert stacked.layers.up.kernel.a.get_value().shape == (3, 32, 4)
    assert stacked.layers.attention.query.kernel.shape == (3, 32, 32)
    assert stacked.head is stacked.tied
    trainable, frozen = split_trainable(stacked, also="bias$|norm")
    paths = ["/".join(map(str, path)) for path, _ in nnx.to_flat_state(trainable)]
    assert "layers/norm/scale" in paths and "layers/up/bias" in paths
    assert len(paths) == 2 * 7 + 2 + 7
    tx = optax.adam(1e-2)
    x = jax.random.normal(KEY, (2, 4, 32))
    y = jnp.sin(jnp.arange(64.0)).reshape(2, 4, 8)

    @jax.jit
    def step(trainable, state, frozen):
        def loss_fn(t):
            return ((join_trainable(t, frozen)(x) - y) ** 2).mean()

        loss, grads = jax.value_and_grad(loss_fn)(trainable)
        updates, state = tx.update(grads, state, trainable)
        return optax.apply_updates(trainable, updates), state, loss

    state = tx.init(trainable)
    first = None
    for _ in range(60):
        trainable, state, loss = step(trainable, state, frozen)
        first = loss if first is None else first
    assert float(first) > 0.5 and float(loss) < 0.05
    assert step._cache_size() == 1


def test_nnx_grad_optimizer_and_state(stacked):
    model = nnx.clone(stacked)
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=LoRAParam)
    x = jnp.ones((1, 2, 32))

    @nnx.jit
    def step(model, optimizer):
        loss_fn = lambda model: (model(x) ** 2).mean()
        wrt = nnx.DiffState(0, LoRAParam)
        loss, grads = nnx.value_and_grad(loss_fn, argnums=wrt)(model)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(3)]
    assert losses[2] < losses[1] < losses[0]
    # A checkpoint of the adapters alone brings the model back.
    saved = nnx.to_pure_dict(nnx.state(model, LoRAParam))
    other = nnx.clone(stacked)
    state = nnx.state(other, LoRAParam)
    nnx.replace_by_pure_dict(state, saved)
    nnx.update(other, state)
    for got, wanted in zip(
        *(jax.tree.leaves(nnx.state(m, LoRAParam)) for m in (other, model)), strict=True
    ):
        np.testing.assert_array_equal(got, wanted)


def test_rows_with_different_adapters():
    targets = "embed|conv|half|heads|grouped|up"
    model = add_lora(Zoo(), rank=2, targets=targets, key=KEY)
    first, frozen = split_trainable(model)
    adapters = [perturbed(first, seed) for seed in range(2)]
    ids = jnp.array([1, -1])

    def run(model):
        x = model.embed(TOKENS)
        wide = model.grouped(x[..., :8])
        return (
            model.heads(model.half(x)).reshape(2, 5, 64),
            model.conv(x),
            wide,
            model.back_up(model.up(wide)),
        )

    run = nnx.jit(run)
    got = run(join_trainable(stack_adapters(adapters), frozen, adapter_ids=ids))
    base = run(model)
    one = run(join_trainable(adapters[1], frozen))
    for g, b, o in zip(got, base, one, strict=True):
        np.testing.assert_allclose(g[0], o[0], rtol=2e-2, atol=2e-2)
        np.testing.assert_allclose(g[1], b[1], rtol=1e-5, atol=1e-5)
        assert relative(o, b) > 0.1


@pytest.mark.parametrize("groups, quantize", [(8, None), (4, "nf4")])
@pytest.mark.parametrize("dora", [False, True])
def test_groups_of_channels(groups, quantize, dora):
    """A depthwise and other grouped convolutions: the kernel plus scale a b."""
    layer = nnx.Conv(
        8, 16, (5, 5), feature_group_count=groups, strides=2, rngs=nnx.Rngs(0)
    )
    model = nnx.Dict(conv=layer)
    adapted = add_lora(
        model, rank=3, targets="conv", dora=dora, quantize=quantize, key=KEY
    )
    kernel = adapted.conv.kernel
    assert kernel.shape == (25 * 8 // groups, 16)
    trainable, frozen = split_trainable(adapted)
    trainable = perturbed(trainable)
    moved = join_trainable(trainable, frozen)
    merged = merge_lora(moved, dtype=jnp.float32, report=None)
    assert merged.conv.kernel.shape == layer.kernel.shape
    x = jax.random.normal(KEY, (2, 9, 9, 8))
    assert relative(moved.conv(x), merged.conv(x)) < LOGITS_RELATIVE["float32"]
    assert relative(moved.conv(x), layer(x)) > 0.1
    if dora:
        return
    # The gradients of a and b are those of the kernel that is made whole.
    loss = lambda layer: (jnp.sin(layer(x)) ** 2).sum()
    grad = nnx.grad(loss)(merged.conv)["kernel"].get_value()
    grad = kernel.scale * conv_form(grad.shape).matrix(grad)
    lt = moved.conv.kernel
    wanted = {"a": grad @ lt.b.get_value().T, "b": lt.a.get_value().T @ grad}
    got = jax.grad(lambda t: loss(join_trainable(t, frozen).conv))(trainable)
    for path, value in nnx.to_flat_state(got):
        assert relative(value.get_value(), wanted[path[-1]]) < 1e-5


class Mine(nnx.Linear):
    """A user's own layer, over Flax's."""

    def __call__(self, inputs):
        return 2 * super().__call__(inputs)


def test_subclasses_and_direct_use_of_a_kernel():
    class Model(nnx.Module):
        def __init__(self):
            self.mine = Mine(8, 8, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.mine(x) + x @ self.mine.kernel[...]

    model, x = Model(), jnp.ones((3, 8))
    adapted = add_lora(model, rank=2, key=KEY)
    assert isinstance(adapted.mine, Mine | adapted_layers.Linear)
    np.testing.assert_array_equal(adapted(x), model(x))
    trainable, frozen = split_trainable(adapted)
    moved = join_trainable(perturbed(trainable), frozen)
    merged = merge_lora(moved, report=None)
    assert type(merged.mine) is Mine
    np.testing.assert_allclose(moved(x), merged(x), rtol=1e-5)


def test_what_cannot_be_adapted():
    zoo = Zoo()
    zoo.masked = nnx.Conv(2, 4, (3,), mask=jnp.ones((3, 2, 4)), rngs=nnx.Rngs(0))
    masked = "'masked/kernel': a Conv with a mask .* train it whole by split_trainable"
    with pytest.raises(NotImplementedError, match=masked):
        add_lora(zoo, rank=2, targets="masked", key=KEY)
    del zoo.masked
    zoo.odd = nnx.Einsum("ab,bc->c", (4, 4), rngs=nnx.Rngs(0))
    with pytest.raises(NotImplementedError, match="only contractions of an input"):
        add_lora(zoo, rank=2, targets="odd", key=KEY)
    zoo.odd = nnx.Linear(4, 8, rngs=nnx.Rngs(0))
    zoo.odd.kernel = nnx.Param(jnp.ones((4, 3, 8)))
    with pytest.raises(NotImplementedError, match="only stacks along leading axes"):
        add_lora(zoo, rank=2, targets="odd/kernel", key=KEY)
    adapted = add_lora(zoo, rank=2, targets="half|embed|heads", key=KEY)
    with pytest.raises(NotImplementedError, match="out_sharding='x' of an adapted"):
        adapted.half(jnp.ones((2, 64)), out_sharding="x")
    with pytest.raises(ValueError, match="looked up by integers: float32"):
        adapted.embed(jnp.ones(3))
    with pytest.raises(NotImplementedError, match=r"adapted for '\.\.\.td,ndh"):
        adapted.heads(jnp.ones((2, 16)), "th,ndh->tnd")
    with pytest.raises(ValueError, match="in the path of no weight with two"):
        add_lora(zoo, rank=2, targets="half/bias", key=KEY)
    with pytest.raises(ValueError, match="also 'nothing' is found in"):
        split_trainable(adapted, also="nothing")
    with pytest.raises(ValueError, match="'half/kernel' is LoraTensor and cannot be"):
        split_trainable(adapted, also=lambda path, w: path == "half/kernel")

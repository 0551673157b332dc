import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params
from jax.interpreters import partial_eval

from qlora_jax.lora import add_lora, join_trainable, split_trainable
from qlora_jax.models import Llama, LlamaConfig, llama
from qlora_jax.plan import plan_memory
from qlora_jax.quant import quantize
from qlora_jax.train import TrainConfig

CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
)
TOKENS = jnp.array(np.random.default_rng(0).integers(0, 64, (2, 16)))
# What they are held to is compiled once.
pytestmark = [pytest.mark.unoptimized, pytest.mark.usefixtures("compiled_once")]


@pytest.fixture(scope="module")
def parts():
    model = Llama(CONFIG, rngs=nnx.Rngs(0))
    for name in CONFIG.linear_shapes():
        weight = getattr(model.layers, name)[...]
        setattr(model.layers, name, nnx.Param(quantize(weight)))
    model = add_lora(model, rank=4, dropout=0.2, key=jax.random.key(1))
    trainable, frozen = split_trainable(model)
    # So that both factors of an adapter have gradients.
    keys = iter(jax.random.split(jax.random.key(2), 99))
    trainable = jax.tree.map(
        lambda x: x + 0.05 * jax.random.normal(next(keys), x.shape), trainable
    )
    return trainable, frozen


def loss(trainable, frozen, key, remat, unroll=False):
    model = join_trainable(trainable, frozen, key=key)
    hidden = model.hidden(TOKENS, remat=remat, unroll=unroll)
    return jnp.sum(jnp.sin(hidden))


def gradient(parts, key=None, **options):
    trainable, frozen = parts
    return jax.jit(jax.value_and_grad(lambda t, f: loss(t, f, key, **options)))(
        trainable, frozen
    )


def assert_equal(found, expected):
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-4),
        found[1],
        expected[1],
    )


@pytest.mark.parametrize(
    "remat, unroll",
    [("none", False), ("attention", False), ("offload", False), ("none", True)],
)
def test_what_is_recomputed_changes_no_number(parts, remat, unroll):
    key = jax.random.key(3)  # the mask of dropout is the same too
    expected = gradient(parts, key, remat="full")
    assert_equal(gradient(parts, key, remat=remat, unroll=unroll), expected)


@pytest.mark.parametrize("with_key", [False, True])
def test_an_mlp_in_chunks_changes_no_number(parts, with_key, monkeypatch):
    key = jax.random.key(3) if with_key else None
    expected = gradient(parts, key, remat="full")
    monkeypatch.setattr(llama, "_MLP_ROWS", 8)  # of 32 tokens
    widths = mlp_widths(parts, key)
    # A mask is a function of where a row stands: then all rows go at once.
    assert widths == ({32} if with_key else {8})
    assert_equal(gradient(parts, key, remat="full"), expected)


def programs(jaxpr):
    yield jaxpr
    for equation in jaxpr.eqns:
        for inner in jaxprs_in_params(equation.params):
            yield from programs(inner)


def program(parts, key, remat):
    trainable, frozen = parts
    f = jax.grad(lambda t: loss(t, frozen, key, remat))
    return jax.make_jaxpr(f)(trainable).jaxpr


def equations(jaxpr):
    return [equation for inner in programs(jaxpr) for equation in inner.eqns]


def mlp_widths(parts, key):
    """Tokens of the arrays that are as wide as the MLP."""
    return {
        int(np.prod(v.aval.shape[:-1]))
        for equation in equations(program(parts, key, "full"))
        if equation.primitive.name == "logistic"
        for v in equation.outvars
    }


def count(parts, remat, primitive):
    found = equations(program(parts, None, remat))
    return sum(equation.primitive.name == primitive for equation in found)


# Products of a layer without recomputation. Forward 7 of the base, 2 x 4 of the
# adapters, whose first products are shared by q, k, v and by gate, up (7 + 4);
# backward 7, and 2 x (7 + 4). Scores and values, and their gradients; XLA's form makes
# the scores again.
BASE, ADAPTERS, ATTENTION = 7, 7 + 4, 2
ONCE = 2 * BASE + 3 * ADAPTERS + (3 * ATTENTION + 1)


def test_without_recomputation_no_product_is_computed_twice(parts):
    assert count(parts, "none", "dot_general") == ONCE
    assert count(parts, "full", "dot_general") > ONCE + BASE


def count_backward(parts, primitive):
    """Of a layer under `offload`, without what nobody reads."""
    found = equations(program(parts, None, "offload"))
    (loop,) = [e for e in found if e.primitive.name == "while"]
    backward = loop.params["body_jaxpr"].jaxpr
    backward = partial_eval.dce_jaxpr(backward, [True] * len(backward.outvars))[0]
    return sum(e.primitive.name == primitive for e in equations(backward))


def test_of_what_is_on_the_host_no_product_is_computed_twice(parts):
    found = count_backward(parts, "dot_general")
    # Again: gate and up, their adapters, whose first product is shared, and attention;
    # the first products of the adapters of q, k, v and of o.
    again = 2 + (1 + 2) + ATTENTION + (1 + 1)
    assert found == ONCE - (BASE + ADAPTERS + ATTENTION) + again


def test_what_is_kept_of_a_layer_is_on_the_host(parts):
    def on_host(value):
        space = getattr(value.aval, "memory_space", None)
        return space == jax.memory.Space.Host

    outputs = [
        v.aval
        for e in equations(program(parts, None, "offload"))
        if e.primitive.name == "scan"
        for v in e.outvars
        if on_host(v)
    ]
    layers, (rows, tokens), hidden = CONFIG.num_layers, TOKENS.shape, 64
    heads = CONFIG.num_heads + 2 * CONFIG.num_kv_heads
    assert [aval.shape for aval in outputs] == [
        (layers, rows, tokens, hidden),
        (layers, rows, tokens, heads, CONFIG.head_dim),
        (layers, rows * tokens, hidden),
    ]
    train = TrainConfig(rank=4, batch_size=rows, seq_len=tokens, remat="offload")
    planned = plan_memory(CONFIG, train, dtype="float32", paged=False).host
    found = sum(aval.size * aval.dtype.itemsize for aval in outputs)
    assert planned == {"activations": found}


@pytest.mark.parametrize("remat", ["full", "attention"])
def test_the_gate_is_computed_twice_and_not_three_times(parts, remat):
    # Forward, and with its gradients, from which comes what down's adapter reads.
    assert count(parts, remat, "logistic") == 2


def test_the_gate_of_what_is_on_the_host_is_computed_once_more(parts):
    assert count_backward(parts, "logistic") == 1


def test_the_last_of_the_layers_one_by_one_is_not_recomputed(parts):
    trainable, frozen = parts

    def products(remat):
        f = jax.grad(lambda t: loss(t, frozen, None, remat, unroll=True))
        found = equations(jax.make_jaxpr(f)(trainable).jaxpr)
        return sum(e.primitive.name == "dot_general" for e in found)

    # A loop's program has the products of one layer: that is what the first of two
    # computes again. The last makes one of down's adapter from the gate's backward.
    again = count(parts, "full", "dot_general") - count(parts, "none", "dot_general")
    assert CONFIG.num_layers == 2
    assert products("full") - products("none") == again + 1


def test_layers_one_by_one_are_no_loop(parts):
    trainable, frozen = parts
    f = jax.grad(lambda t: loss(t, frozen, None, "none", unroll=True))
    names = {e.primitive.name for e in equations(jax.make_jaxpr(f)(trainable).jaxpr)}
    assert "scan" not in names
    assert "scan" in {e.primitive.name for e in equations(program(parts, None, "none"))}

"""Plain functions called with weights, against the same functions of arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.lora import (
    add_lora,
    functions,
    join_trainable,
    merge_lora,
    split_trainable,
    stack_adapters,
)
from tests.lora.trees import perturbed

pytestmark = pytest.mark.unoptimized

KEY = jax.random.key(3)


def params():
    shapes = {"w": (64, 32), "layers": (3, 32, 32), "heads": (2, 32, 16)}
    keys = jax.random.split(KEY, 4)
    named = zip(shapes.items(), keys, strict=False)
    tree = {name: jax.random.normal(key, shape) / 8 for (name, shape), key in named}
    return {**tree, "bias": jnp.ones(32)}


def every_way(p, x):
    """Products with weights as people write them."""
    x = jnp.dot(x, p["w"]) + p["bias"]

    @jax.checkpoint
    def body(x, w):
        return jax.nn.relu(jnp.einsum("bi,ij->bj", x, w)), x.sum()

    x, sums = jax.lax.scan(body, x, p["layers"])
    for i in range(3):
        x = x + jax.jit(lambda x, w: jnp.tanh(x @ w))(x, p["layers"][i])
    x = jax.lax.cond(x.sum() > 0, lambda x, w: x @ w, lambda x, w: x, x, p["layers"][1])
    y = jax.vmap(jnp.matmul, (None, 0))(x, p["heads"])  # [2, b, 16]
    z = jnp.einsum("nbi,nij->bnj", jnp.stack([x, 2 * x]), p["heads"])
    return sums, jax.nn.softplus(y), z


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_every_product_is_one_with_the_weight(quantize):
    adapted = add_lora(
        params(),
        rank=2,
        targets=["w", "layers", "heads"],
        quantize=quantize,
        key=KEY,
    )
    trainable, frozen = split_trainable(adapted)
    trainable = perturbed(trainable)
    model = join_trainable(trainable, frozen)
    merged = merge_lora(model, dtype=jnp.float32, report=None)
    x = jax.random.normal(KEY, (5, 64))
    wrapped = functions.wrap(every_way)

    @jax.jit
    def outputs_and_gradients(trainable):
        def loss(t):
            outputs = wrapped(join_trainable(t, frozen), x)
            return sum(y.sum() for y in outputs), outputs

        return jax.value_and_grad(loss, has_aux=True)(trainable)

    (_, outputs), gradients = outputs_and_gradients(trainable)
    for got, wanted in zip(outputs, jax.jit(every_way)(merged, x), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=3e-3, atol=3e-4)
    assert all(bool(leaf.any()) for leaf in jax.tree.leaves(gradients))


def test_no_array_of_the_weight_is_made():
    adapted = add_lora(
        params(), rank=2, targets="w", quantize="nf4", dropout=0.5, key=KEY
    )
    model = join_trainable(*split_trainable(adapted), key=KEY)
    # With dropout no array could be made, so that this would be refused.
    run = functions.wrap(lambda p, x: jnp.einsum("ij,bi->jb", p["w"], x))
    x = jnp.ones((3, 64))
    np.testing.assert_allclose(run(model, x), (x @ model["w"]).T)


def test_what_is_no_product_is_made_an_array_and_said():
    tree = {"w": params()["w"]}
    adapted = add_lora(tree, rank=2, targets="w", key=KEY)
    with pytest.warns(UserWarning, match="A weight meets `integer_pow` and is made an"):
        got = functions.wrap(lambda p: (p["w"] ** 2).sum())(adapted)
    np.testing.assert_allclose(got, (tree["w"] ** 2).sum(), rtol=1e-6)
    trainable, frozen = split_trainable(adapted)
    both = stack_adapters([trainable, trainable])
    several = join_trainable(both, frozen, adapter_ids=jnp.int32(0))
    with pytest.raises(NotImplementedError, match=r"meets `mul`, .* several adapters"):
        functions.wrap(lambda p: p["w"] * 2)(several)
    assert (
        functions.wrap(lambda p, n: {"n": n, "x": p["w"].shape})(adapted, 3)["n"] == 3
    )

"""Several weights over one input: one first product, and gradients at one time."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.lora import LoraTensor
from qlora_jax.lora.initial import with_magnitude
from qlora_jax.lora.low_rank import gradients_together
from qlora_jax.quant import quantize
from tests.lora.test_lora import draw, relative
from tests.tolerances import GRADIENT_RELATIVE, MATMUL_RELATIVE

pytestmark = pytest.mark.usefixtures("strict_dtypes")

WIDTHS, RANKS, ALPHAS = (96, 32, 32), (8, 8, 4), (16.0, 16.0, 4.0)


def make(dtype=jnp.float32, format=None, **options):
    """q, k and v of unlike widths, ranks and scales."""
    weights = []
    for i, (width, rank, alpha) in enumerate(zip(WIDTHS, RANKS, ALPHAS, strict=True)):
        w = draw(3 * i, 64, width, dtype=dtype) / 8
        weights.append(
            LoraTensor(
                w if format is None else quantize(w, format),
                draw(3 * i + 1, 64, rank) / 8,
                draw(3 * i + 2, rank, width) / 3,
                alpha=alpha,
                **options,
            )
        )
    return weights


def separately(x, weights):
    return [x @ w for w in weights]


def dots(function, *args):
    """How many products there are in what a function computes, kernels left out."""

    def count(jaxpr):
        found = 0
        for equation in jaxpr.eqns:
            found += equation.primitive.name == "dot_general"
            for value in jax.tree.leaves(
                list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")
            ):
                inner = getattr(value, "jaxpr", value)
                found += count(inner) if hasattr(inner, "eqns") else 0
        return found

    return count(jax.make_jaxpr(function)(*args).jaxpr)


@pytest.mark.parametrize("format", [None, "nf4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_is_the_separate_products(dtype, format):
    weights, x = make(dtype, format), draw(9, 2, 5, 64, dtype=dtype)
    together = jax.jit(LoraTensor.multiply_together)(x, weights)
    alone = jax.jit(separately)(x, weights)
    for got, wanted, weight in zip(together, alone, weights, strict=True):
        assert got.dtype == wanted.dtype == dtype and got.shape == wanted.shape
        base = np.asarray(x @ weight.w, np.float64)
        # Against the product of each alone: the adapter's part moves by the order of
        # the sums alone, and is then rounded and added as it was.
        assert relative(got, wanted) < MATMUL_RELATIVE[dtype]
        assert relative(base, wanted) > 0.1


def test_while_b_is_zero_it_is_the_base_bit_for_bit():
    weights, x = make(format="nf4"), draw(9, 5, 64)
    weights = [dataclasses.replace(w, b=jnp.zeros_like(w.b)) for w in weights]
    together = jax.jit(LoraTensor.multiply_together)(x, weights)
    alone = jax.jit(separately)(x, [w.w for w in weights])
    for got, wanted in zip(together, alone, strict=True):
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_are_those_of_the_separate_products(dtype):
    weights, x = make(dtype, "nf4"), draw(9, 5, 64, dtype=dtype)
    cotangents = [draw(20 + i, 5, n, dtype=dtype) for i, n in enumerate(WIDTHS)]

    def gradients(multiply):
        def loss(x, factors):
            moved = [
                dataclasses.replace(w, a=a, b=b)
                for w, (a, b) in zip(weights, factors, strict=True)
            ]
            pairs = zip(multiply(x, moved), cotangents, strict=True)
            return sum((y * c).astype(jnp.float32).sum() for y, c in pairs)

        return jax.jit(jax.grad(loss, (0, 1)))(x, [(w.a, w.b) for w in weights])

    together, alone = map(gradients, (LoraTensor.multiply_together, separately))
    for got, wanted in zip(*map(jax.tree.leaves, (together, alone)), strict=True):
        assert got.dtype == wanted.dtype
        # In bfloat16 the three parts of dx are added in another order.
        assert relative(got, wanted) < 2 * GRADIENT_RELATIVE[dtype]


def test_there_are_fewer_products():
    weights, x = make(), draw(9, 5, 64)
    assert dots(separately, x, weights) == 9  # w, a and b of each
    assert dots(LoraTensor.multiply_together, x, weights) == 7  # all a in one

    def loss(multiply):
        return lambda x, weights: sum(y.sum() for y in multiply(x, weights))

    alone = dots(jax.grad(loss(separately), (0, 1)), x, weights)
    together = dots(jax.grad(loss(LoraTensor.multiply_together), (0, 1)), x, weights)
    assert alone - together >= 6  # forwards, d[a ...] and dx one each instead of three


@pytest.mark.parametrize(
    "special",
    [
        dict(dropout=0.5, key=jax.random.key(0)),
        dict(merged=jnp.ones((64, 32))),
        dict(magnitude=True),
        dict(ids=jnp.array([0, -1, 1])),
    ],
    ids=["dropout", "merged", "DoRA", "ids"],
)
def test_what_is_special_multiplies_as_it_does_alone(special):
    *others, last = make()
    if "magnitude" in special:
        last = with_magnitude(last)
    else:
        last = dataclasses.replace(last, **special)
    if "ids" in special:
        last = dataclasses.replace(
            last, a=draw(1, 2, 64, 4), b=draw(2, 2, 4, WIDTHS[-1])
        )
    x = draw(9, 3, 5, 64)
    weights = [*others, last]
    together = LoraTensor.multiply_together(x, weights)
    for got, wanted in zip(together, separately(x, weights), strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_dropout_without_a_key_is_no_reason_to_multiply_alone():
    weights, x = make(dropout=0.5), draw(9, 5, 64)
    assert dots(LoraTensor.multiply_together, x, weights) == 7


def test_wrong_calls_are_named_as_they_are_alone():
    weights = make()
    with pytest.raises(ValueError, match=r"last axis of x, of shape \[2, 63\].*64, 96"):
        LoraTensor.multiply_together(jnp.ones((2, 63)), weights)
    with pytest.raises(ValueError, match="x is int32 and the adapter computes"):
        LoraTensor.multiply_together(jnp.ones((2, 64), jnp.int32), weights)


def test_the_backward_pass_keeps_x_once_and_the_thin_products():
    weights, x = make(jnp.bfloat16, "nf4"), draw(9, 5, 64, dtype=jnp.bfloat16)

    def run(x, factors):
        moved = [
            dataclasses.replace(w, a=a, b=b)
            for w, (a, b) in zip(weights, factors, strict=True)
        ]
        return LoraTensor.multiply_together(x, moved)

    _, vjp = jax.vjp(run, x, [(w.a, w.b) for w in weights])
    kept = [leaf for leaf in jax.tree.leaves(vjp) if hasattr(leaf, "shape")]
    of_rows = {id(leaf): leaf for leaf in kept if leaf.shape[:1] == (5,)}
    # x and the first products of all three; no product of a whole width.
    assert sum(leaf.size for leaf in of_rows.values()) <= 5 * (64 + sum(RANKS))


def testgradients_together_changes_no_number_and_binds_all_three():
    x, a, b = draw(0, 5, 64), draw(1, 64, 8), draw(2, 8, 32)

    def loss(bind, x, a, b):
        x, a, b = bind(x, a, b)
        return jnp.sin(x @ a @ b).sum()

    plain = jax.jit(jax.grad(loss, (1, 2, 3)), static_argnums=0)(
        lambda *args: args, x, a, b
    )
    bound = jax.jit(jax.grad(loss, (1, 2, 3)), static_argnums=0)(
        gradients_together, x, a, b
    )
    for got, wanted in zip(bound, plain, strict=True):
        np.testing.assert_array_equal(got, wanted)
    jaxpr = jax.make_jaxpr(jax.grad(loss, (1, 2, 3)), static_argnums=0)(
        gradients_together, x, a, b
    )
    (barrier,) = [e for e in jaxpr.eqns if e.primitive.name == "optimization_barrier"]
    # All gradients go through one barrier, and are what is returned.
    assert [v.aval.shape for v in barrier.invars] == [(5, 64), (64, 8), (8, 32)]
    assert list(jaxpr.jaxpr.outvars) == list(barrier.outvars)


def test_which_weights_treat_every_row_alike():
    """A model may cut the rows of x in chunks where all weights do."""
    lt, key = make()[0], jax.random.key(0)
    assert lt.rowwise
    assert dataclasses.replace(lt, key=key).rowwise  # its rate is zero
    assert dataclasses.replace(lt, dropout=0.5).rowwise  # no key
    assert not dataclasses.replace(lt, dropout=0.5, key=key).rowwise
    assert dataclasses.replace(lt, ids=jnp.int32(0)).rowwise  # one for all
    assert not dataclasses.replace(lt, ids=jnp.array([0, 1])).rowwise

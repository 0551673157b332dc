"""The adapted product of quantized weights, each of its ways against float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.lora.product import adapted_products
from qlora_jax.models.inputs import Gated, Normed
from qlora_jax.quant import dequantize, quantize
from tests.lora.test_lora import draw, relative
from tests.tolerances import GRADIENT_RELATIVE, MATMUL_RELATIVE

pytestmark = pytest.mark.usefixtures("strict_dtypes")

RANK, SCALES = 8, (0.5, 2.0, 0.25)
# One weight, three of which two are narrow, two wide ones.
WIDTHS = {"one": (64,), "narrow": (64, 16, 16), "wide": (384, 320), "tall": (24,)}


def arrays(widths, dtype):
    """Weights and factors."""
    bases = [quantize(draw(i, 64, n, dtype=dtype) / 8) for i, n in enumerate(widths)]
    a = [draw(10 + i, 64, RANK) / 8 for i in range(len(widths))]
    b = [draw(20 + i, RANK, n) / 3 for i, n in enumerate(widths)]
    return bases, a, b


def exact(x, bases, a, b, onto=None):
    """The definition in float32."""
    weights = [dequantize(w, jnp.float32) for w in bases]
    ys = [
        x @ w + x @ one @ two * scale
        for w, one, two, scale in zip(weights, a, b, SCALES, strict=False)
    ]
    return ys if onto is None else [onto + y for y in ys]


def input_of(kind, dtype):
    """What gives x, and its parts."""
    x = draw(30, 2, 5, 64, dtype=dtype)
    match kind:
        case "array":
            return (lambda x: x), (x,)
        case "normed":
            scale = 1 + draw(31, 64, dtype=dtype) / 8
            return (lambda x, scale: Normed(x, scale, 1e-5)), (x, scale)
        case "gated":
            return Gated, (x, draw(32, 2, 5, 64, dtype=dtype))
    raise AssertionError(kind)


def whole(x):
    return x.whole() if hasattr(x, "whole") else x


def check(kind, widths, dtype, onto=False):
    """Products and gradients of all that is not frozen, against float32."""
    bases, a, b = arrays(widths, dtype)
    make, parts = input_of(kind, dtype)
    onto = draw(40, 2, 5, widths[0], dtype=dtype) if onto else None
    cotangents = [draw(50 + i, 2, 5, n) for i, n in enumerate(widths)]

    def loss(multiply, parts, onto, a, b):
        ys = multiply(make(*parts), bases, a, b, onto=onto)
        pairs = zip(ys, cotangents, strict=True)
        return sum((y.astype(jnp.float32) * c).sum() for y, c in pairs), ys

    def ours(x, *args, **options):
        return adapted_products(x, *args, scales=SCALES[: len(widths)], **options)

    def defined(x, *args, **options):
        return exact(whole(x), *args, **options)

    run = lambda multiply, *args: jax.jit(
        jax.grad(lambda *args: loss(multiply, *args), (0, 1, 2, 3), has_aux=True)
    )(*args)
    wanted, ys = run(
        defined, *jax.tree.map(lambda v: v.astype(jnp.float32), (parts, onto, a, b))
    )
    got, zs = run(ours, parts, onto, a, b)
    for z, y in zip(zs, ys, strict=True):
        assert z.dtype == dtype
        # Of x the parts are rounded before the product too.
        assert relative(z, y) < 2 * MATMUL_RELATIVE[dtype]
    for path, leaf in jax.tree.leaves_with_path(got):
        reference = dict(jax.tree.leaves_with_path(wanted))[path]
        assert relative(leaf, reference) < 3 * GRADIENT_RELATIVE[dtype], path


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("widths", WIDTHS)
def test_products_and_gradients_are_those_of_float32(widths, dtype):
    check("array", WIDTHS[widths], dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["normed", "gated"])
def test_an_input_given_as_its_parts(kind, dtype):
    check(kind, WIDTHS["narrow"], dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_product_is_added_to_what_is_given(dtype):
    check("gated", WIDTHS["one"], dtype, onto=True)


def test_several_products_are_not_added_to_one_array():
    bases, a, b = arrays(WIDTHS["narrow"], jnp.float32)
    x = draw(30, 5, 64)
    with pytest.raises(ValueError, match="3 products cannot be added to one array"):
        adapted_products(x, bases, a, b, scales=SCALES, onto=x)


def test_while_b_is_zero_it_is_the_base_bit_for_bit():
    bases, a, b = arrays(WIDTHS["wide"], jnp.float32)
    x = draw(30, 5, 64)
    b = [jnp.zeros_like(one) for one in b]
    got = jax.jit(lambda x: adapted_products(x, bases, a, b, scales=SCALES[:2]))(x)
    wanted = jax.jit(lambda x: [x @ w for w in bases])(x)
    for y, z in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(y, z)

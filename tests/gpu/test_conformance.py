"""Every implementation x op x format x shape against the float64 product.

A shape that an implementation says it cannot do (NotImplementedError) is passed over,
but each must do some on its own chip; what the table of choices picks must always run.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import tuning
from qlora_jax.quant import FORMATS, dequantize, quantize
from tests.tolerances import MATMUL_RELATIVE

pytestmark = pytest.mark.gpu

SHAPES = [
    # m, k, n: whole tiles, ragged rows, narrow heads of GQA, few rows
    (256, 1024, 1024),
    (300, 1024, 1536),
    (2048, 2048, 512),
    (77, 4096, 1024),
    (1, 4096, 4096),
    (5, 2048, 1024),
    (16, 3584, 512),
    (64, 1024, 2816),
]


def product(op, spec, implementation):
    """The op as a compiled function of x and the packed weight."""
    from pallas_kernels import quantized_matmul, quantized_matmul_dx

    f = {"matmul": quantized_matmul, "matmul_dx": quantized_matmul_dx}[op]
    return jax.jit(
        lambda x, p, addend=None, onto=None: f(
            x, p, spec, addend=addend, onto=onto, implementation=implementation
        )
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("format", ["nf4", "fp4", "int4"])
@pytest.mark.parametrize("op", ["matmul", "matmul_dx"])
@pytest.mark.parametrize(
    "implementation", [None, "xla", "two_pass", "sm90", "sm80", "matvec", "skinny"]
)
def test_product(implementation, op, format, dtype):
    ran = 0
    for m, k, n in SHAPES:
        for double_quant in (True, False):
            weight = jax.random.normal(jax.random.key(n), (k, n)) * 0.02
            w = quantize(weight, format, double_quant=double_quant)
            width = k if op == "matmul" else n
            x = jax.random.normal(jax.random.key(m), (m, width), jnp.dtype(dtype))
            multiply = product(op, w.spec, implementation)
            try:
                y = multiply(x, w.packed)
            except NotImplementedError as error:
                if implementation is None:
                    raise
                reason = str(error)
                continue
            ran += 1
            exact = np.asarray(dequantize(w, jnp.float32), np.float64)
            if op == "matmul_dx":
                exact = exact.T
            expected = np.asarray(x, np.float64) @ exact
            error = np.linalg.norm(np.asarray(y, np.float64) - expected)
            error /= np.linalg.norm(expected)
            where = f"{m=} {k=} {n=} {double_quant=}"
            assert error < MATMUL_RELATIVE[dtype], where
            again = multiply(x, w.packed)
            np.testing.assert_array_equal(y, again, err_msg=f"two runs, {where}")
    if implementation in ("matvec", "skinny") and op == "matmul_dx":
        assert not ran  # they have no backward pass
    elif tuning.has_hopper():
        assert ran, f"{implementation} refused every shape: {reason}"
    elif not ran:
        pytest.skip(f"{implementation}: {reason}")


@pytest.mark.parametrize("op", ["matmul", "matmul_dx"])
@pytest.mark.parametrize("implementation", [None, "xla", "two_pass", "sm90"])
def test_what_is_added(implementation, op):
    if implementation == "sm90" and not tuning.has_hopper():
        pytest.skip("needs compute capability 9.0")
    for m, k, n in SHAPES[:4]:
        w = quantize(jax.random.normal(jax.random.key(n), (k, n)) * 0.02)
        width, features = (k, n) if op == "matmul" else (n, k)
        shapes = (m, width), (m, 16), (features, 16), (m, features)
        x, t, u, onto = (
            jax.random.normal(jax.random.key(i), shape, jnp.bfloat16)
            for i, shape in enumerate(shapes)
        )
        exact = np.asarray(dequantize(w, jnp.float32), np.float64)
        exact = exact if op == "matmul" else exact.T
        expected = np.asarray(x, np.float64) @ exact
        thin = np.asarray(t, np.float64) @ np.asarray(u, np.float64).T
        multiply = product(op, w.spec, implementation)
        for pair, array in (((t, u), None), (None, onto), ((t, u), onto)):
            wanted = expected + (0 if pair is None else thin)
            wanted += 0 if array is None else np.asarray(array, np.float64)
            y = multiply(x, w.packed, pair, array)
            error = np.linalg.norm(np.asarray(y, np.float64) - wanted)
            error /= np.linalg.norm(wanted)
            where = f"{m=} {k=} {n=} {pair is None=} {array is None=}"
            assert error < MATMUL_RELATIVE["bfloat16"], where


@pytest.mark.parametrize("m", [1, 16, 512])
def test_layers_of_a_stack_under_scan(m):
    k, n, layers = 2048, 2048, 3
    stack = quantize(jax.random.normal(jax.random.key(0), (layers, k, n)) / k**0.5)
    x = jax.random.normal(jax.random.key(1), (m, k), jnp.bfloat16)

    @jax.jit
    def by_slice(x, stack):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, stack)[0]

    @jax.jit
    def by_index(x, stack):
        def body(x, i):
            return x @ stack.at_layer(i), None

        return jax.lax.scan(body, x, jnp.arange(layers))[0]

    np.testing.assert_array_equal(by_slice(x, stack), by_index(x, stack))


@pytest.mark.parametrize("m", [1, 2048])
def test_gradient_keeps_packed_arrays_only(m):
    k = n = 2048
    w = quantize(jax.random.normal(jax.random.key(0), (k, n)) / k**0.5)
    x = jax.random.normal(jax.random.key(1), (m, k), jnp.bfloat16)
    dy = jax.random.normal(jax.random.key(2), (m, n), jnp.bfloat16)
    _, vjp = jax.vjp(lambda x: x @ w, x)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(vjp)) <= w.nbytes
    (dx,) = vjp(dy)
    exact = np.asarray(dequantize(w, jnp.float32), np.float64)
    expected = np.asarray(dy, np.float64) @ exact.T
    error = np.linalg.norm(np.asarray(dx, np.float64) - expected)
    assert error / np.linalg.norm(expected) < MATMUL_RELATIVE["bfloat16"]


def distance(w, quantized, format):
    """How far each number is from the number of its code, in units of its absmax."""
    blocks = np.asarray(w, np.float64).T.reshape(-1, quantized.block_size)
    absmax = np.abs(blocks).max(axis=1, keepdims=True)
    codes = np.asarray(quantized.codes).reshape(blocks.shape)
    return np.abs(blocks / absmax - np.asarray(FORMATS[format].codebook)[codes])


@pytest.mark.parametrize("format", ["nf4", "fp4", "int8", "dynamic8"])
def test_quantizing_is_the_same_on_both_devices(format):
    w = jax.random.normal(jax.random.key(0), (768, 520), jnp.bfloat16)
    here = quantize(w, format)
    cpu = jax.devices("cpu")[0]
    with jax.default_device(cpu):
        there = quantize(jax.device_put(w, cpu), format)
    if format in ("nf4", "fp4"):
        np.testing.assert_array_equal(here.codes, there.codes)
    else:
        # XLA's division on a GPU may be off by a unit in the last place. A number may
        # then get another code, but only one that is as near to it.
        differs = distance(w, here, format) - distance(w, there, format)
        assert np.abs(differs).max() <= 4 * np.finfo(np.float32).eps
    offset = np.asarray(there.offset)
    assert abs(np.asarray(here.offset) - offset) <= 4 * np.spacing(offset)
    same = np.mean(np.asarray(here.absmax) == np.asarray(there.absmax))
    assert same > 0.999  # the offset's last place may move a code across a midpoint
    for dtype in (jnp.float32, jnp.bfloat16):
        decoded = np.asarray(dequantize(here, dtype))
        with jax.default_device(cpu):
            moved = jax.tree.map(lambda leaf: jax.device_put(leaf, cpu), here)
            np.testing.assert_array_equal(decoded, dequantize(moved, dtype))

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import PackedSpec, PackedWeight, reference
from tests.tolerances import GRADIENT_RELATIVE, MATMUL_RELATIVE

pytestmark = pytest.mark.usefixtures("strict_dtypes")

RAMP = tuple(float(x) for x in np.linspace(-1, 1, 16, dtype=np.float32))
SPEC = PackedSpec(RAMP, n=96, k=128)


def weight(spec=SPEC, seed=0):
    w = jax.random.normal(jax.random.key(seed), (spec.n, spec.k))
    return pallas_kernels.quantize(w, spec)


def relative(out, expected):
    out = np.asarray(out, np.float64)
    return np.linalg.norm(out - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("batch", [(), (3,), (2, 5)])
def test_both_products(dtype, batch):
    packed = weight()
    w = np.asarray(pallas_kernels.dequantize(packed, SPEC), np.float64)
    x = jax.random.normal(jax.random.key(1), (*batch, 128), jnp.dtype(dtype))
    dy = jax.random.normal(jax.random.key(2), (*batch, 96), jnp.dtype(dtype))
    y = pallas_kernels.quantized_matmul(x, packed, SPEC)
    dx = pallas_kernels.quantized_matmul_dx(dy, packed, SPEC)
    assert y.shape == (*batch, 96) and dx.shape == (*batch, 128)
    assert y.dtype == dx.dtype == x.dtype
    assert relative(y, np.asarray(x, np.float64) @ w.T) < MATMUL_RELATIVE[dtype]
    assert relative(dx, np.asarray(dy, np.float64) @ w) < GRADIENT_RELATIVE[dtype]


def test_the_gradient_is_dx():
    packed = weight()
    x = jax.random.normal(jax.random.key(1), (4, 128))
    dy = jax.random.normal(jax.random.key(2), (4, 96))
    _, vjp = jax.vjp(lambda x: pallas_kernels.quantized_matmul(x, packed, SPEC), x)
    np.testing.assert_array_equal(
        vjp(dy)[0], pallas_kernels.quantized_matmul_dx(dy, packed, SPEC)
    )


def test_only_packed_arrays_are_kept_for_the_gradient():
    packed = weight()
    x = jnp.ones((4, 128))
    _, vjp = jax.vjp(lambda x: pallas_kernels.quantized_matmul(x, packed, SPEC), x)
    kept = sorted((leaf.shape, leaf.dtype.name) for leaf in jax.tree.leaves(vjp))
    assert kept == [((96, 2), "float32"), ((96, 64), "uint8")]


def addend(features, dtype=jnp.float32, rank=8, batch=(4,)):
    keys = jax.random.key(7), jax.random.key(8)
    shapes = (*batch, rank), (features, rank)
    return tuple(
        jax.random.normal(*each, dtype) for each in zip(keys, shapes, strict=True)
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("batch", [(), (2, 5)])
def test_an_addend_is_further_columns(dtype, batch):
    packed = weight()
    w = np.asarray(pallas_kernels.dequantize(packed, SPEC), np.float64)
    x = jax.random.normal(jax.random.key(1), (*batch, 128), jnp.dtype(dtype))
    dy = jax.random.normal(jax.random.key(2), (*batch, 96), jnp.dtype(dtype))
    forward, backward = (addend(i, x.dtype, batch=batch) for i in (96, 128))
    y = pallas_kernels.quantized_matmul(x, packed, SPEC, addend=forward)
    dx = pallas_kernels.quantized_matmul_dx(dy, packed, SPEC, addend=backward)
    assert y.dtype == dx.dtype == x.dtype
    for got, left, right, (t, u) in ((y, x, w.T, forward), (dx, dy, w, backward)):
        t, u = np.asarray(t, np.float64), np.asarray(u, np.float64)
        expected = np.asarray(left, np.float64) @ right + t @ u.T
        assert relative(got, expected) < MATMUL_RELATIVE[dtype]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("batch", [(), (2, 5)])
@pytest.mark.parametrize("with_addend", [False, True])
def test_what_results_are_added_to(with_addend, dtype, batch):
    packed = weight()
    w = np.asarray(pallas_kernels.dequantize(packed, SPEC), np.float64)
    x, dy, onto_y, onto_dx = (
        jax.random.normal(jax.random.key(i), (*batch, size), jnp.dtype(dtype))
        for i, size in enumerate((128, 96, 96, 128))
    )
    forward, backward = (
        addend(i, x.dtype, batch=batch) if with_addend else None for i in (96, 128)
    )
    y = pallas_kernels.quantized_matmul(x, packed, SPEC, addend=forward, onto=onto_y)
    dx = pallas_kernels.quantized_matmul_dx(
        dy, packed, SPEC, addend=backward, onto=onto_dx
    )
    assert y.dtype == dx.dtype == x.dtype
    for got, left, right, pair, onto in (
        (y, x, w.T, forward, onto_y),
        (dx, dy, w, backward, onto_dx),
    ):
        expected = np.asarray(left, np.float64) @ right + np.asarray(onto, np.float64)
        if pair is not None:
            t, u = (np.asarray(one, np.float64) for one in pair)
            expected += t @ u.T
        assert relative(got, expected) < MATMUL_RELATIVE[dtype]


def test_gradients_of_what_is_added():
    packed, (t, u) = weight(), addend(96)
    x = jax.random.normal(jax.random.key(1), (4, 128))
    dy = jax.random.normal(jax.random.key(2), (4, 96))
    onto = jax.random.normal(jax.random.key(3), (4, 96))

    def product(x, t, u, onto):
        return pallas_kernels.quantized_matmul(
            x, packed, SPEC, addend=(t, u), onto=onto
        )

    def plain(x, t, u, onto):
        return onto + pallas_kernels.quantized_matmul(x, packed, SPEC) + t @ u.T

    with jax.default_matmul_precision("highest"):
        found, expected = (jax.vjp(f, x, t, u, onto)[1](dy) for f in (product, plain))
    for got, wanted in zip(found, expected, strict=True):
        assert got.dtype == wanted.dtype
        assert (
            relative(got, np.asarray(wanted, np.float64)) < GRADIENT_RELATIVE["float32"]
        )


def test_layer_of_a_stack():
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), weight(), weight(seed=5))
    x = jnp.ones((4, 128))
    view = PackedWeight(stack.codes, stack.absmax, layer=jnp.asarray(1, jnp.int32))
    np.testing.assert_array_equal(
        pallas_kernels.quantized_matmul(x, view, SPEC),
        pallas_kernels.quantized_matmul(x, weight(seed=5), SPEC),
    )


def test_layout_does_not_reach_the_result():
    """8-bit codes, odd rows, blocks across rows: all are one definition."""
    rng = np.random.default_rng(0)
    for n, k, codebook in ((5, 13, RAMP), (6, 90, RAMP), (6, 90, RAMP * 16)):
        spec = PackedSpec(codebook, n, k, block_size=32)
        w = jnp.asarray(rng.normal(size=(n, k)), jnp.float32)
        packed = pallas_kernels.quantize(w, spec)
        codes, absmax = reference.quantize_blocks(w.reshape(-1), codebook, 32)
        flat = reference.dequantize_blocks(codes, absmax, codebook, 32)
        np.testing.assert_array_equal(
            pallas_kernels.dequantize(packed, spec), flat.reshape(n, k)
        )


def test_what_does_not_fit():
    packed = weight()
    x = jnp.ones((4, 128))
    with pytest.raises(
        ValueError, match=r"must be k=128 of the weight; x.shape=\(4, 64"
    ):
        pallas_kernels.quantized_matmul(x[:, :64], packed, SPEC)
    with pytest.raises(ValueError, match=r"dy must be n=96 of the weight"):
        pallas_kernels.quantized_matmul_dx(x, packed, SPEC)
    with pytest.raises(
        ValueError, match=r"codes of shape \(96, 64\) must be \(95, 64\)"
    ):
        pallas_kernels.quantized_matmul(x, packed, PackedSpec(RAMP, n=95, k=128))
    with pytest.raises(ValueError, match="A stack of weights is multiplied one layer"):
        stack = jax.tree.map(lambda leaf: leaf[None], packed)
        pallas_kernels.quantized_matmul(x, stack, SPEC)
    with pytest.raises(
        ValueError, match="nested_absmax and nested_codebook go together"
    ):
        spec = PackedSpec(RAMP, n=96, k=128, nested_codebook=RAMP * 16)
        pallas_kernels.quantized_matmul(x, packed, spec)
    for t, u in (((4, 8), (128, 8)), ((3, 8), (96, 8)), ((4, 8), (96, 4))):
        with pytest.raises(ValueError, match=r"\[n, r\] with n=96 of the weight"):
            pair = jnp.ones(t), jnp.ones(u)
            pallas_kernels.quantized_matmul(x, packed, SPEC, addend=pair)
    with pytest.raises(ValueError, match="must be float32 as x is: cast it"):
        pair = addend(96, jnp.bfloat16)
        pallas_kernels.quantized_matmul(x, packed, SPEC, addend=pair)
    with pytest.raises(ValueError, match=r"onto.shape=\(4, 128\) must be \[..., n\]"):
        pallas_kernels.quantized_matmul(x, packed, SPEC, onto=x)
    with pytest.raises(ValueError, match=r"onto.dtype=.* must be float32 as x is"):
        onto = jnp.ones((4, 96), jnp.bfloat16)
        pallas_kernels.quantized_matmul(x, packed, SPEC, onto=onto)
    with pytest.raises(ValueError, match="Unknown implementation='triton'"):
        pallas_kernels.quantized_matmul(x, packed, SPEC, implementation="triton")
    with pytest.raises(ValueError, match=r"w.shape=\(4, 128\) must be \(spec.n=96"):
        pallas_kernels.quantize(x, SPEC)

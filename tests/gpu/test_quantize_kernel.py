"""The quantize and dequantize kernels on a GPU, bit for bit against the rules."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import quantize_kernel as kernels
from qlora_jax.quant.formats import DYNAMIC8
from tests.pallas_kernels.test_matvec import make_weight
from tests.pallas_kernels.test_quantize_kernel import (
    CODEBOOKS,
    DTYPES,
    dequantize_by_rule,
    quantize_by_rule,
    quantize_scales_by_rule,
    weight_with_edges,
)
from tests.tolerances import ULP_NESTED_OFFSET

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CODEBOOKS)
@pytest.mark.parametrize("block_size", [32, 64, 256])
def test_quantize_equals_the_rule(name, dtype, block_size):
    _, spec = make_weight(512, 1024, block_size, nested=False)
    spec = dataclasses.replace(spec, codebook=CODEBOOKS[name])
    w = weight_with_edges(np.random.default_rng(0), spec.n, spec.k, dtype)
    out = jax.jit(lambda w: kernels.quantize(w, spec))(jnp.asarray(w))
    codes, absmax = quantize_by_rule(w, spec)
    np.testing.assert_array_equal(np.asarray(out.codes), codes)
    np.testing.assert_array_equal(np.asarray(out.absmax).reshape(-1), absmax)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CODEBOOKS)
@pytest.mark.parametrize("block_size, nested", [(64, True), (64, False), (256, True)])
def test_dequantize_equals_the_rule(name, block_size, nested, dtype):
    packed, spec = make_weight(512, 1024, block_size, nested)
    spec = dataclasses.replace(spec, codebook=CODEBOOKS[name])
    y = jax.jit(lambda p: kernels.dequantize(p, spec, dtype))(
        jax.tree.map(jnp.asarray, packed)
    )
    assert np.asarray(y).tobytes() == dequantize_by_rule(packed, spec, dtype).tobytes()


@pytest.mark.parametrize("n, k", [(512, 1024), (24, 4160), (4096, 14336)])
def test_double_quantization_equals_the_rule(n, k):
    """Scales that fill their blocks of 256 and do not, few and many."""
    _, spec = make_weight(16, 64)
    spec = dataclasses.replace(spec, n=n, k=k, nested_codebook=DYNAMIC8.codebook)
    w = np.random.default_rng(0).normal(size=(n, k)).astype(jnp.bfloat16)
    quantize = jax.jit(lambda w: kernels.quantize(w, spec))
    out = quantize(jnp.asarray(w))
    absmax = np.abs(w.astype(np.float32)).reshape(-1, 64).max(1)
    offset = np.asarray(out.offset)
    exact = np.float32(absmax.astype(np.float64).mean())
    assert abs(offset - exact) <= ULP_NESTED_OFFSET * np.spacing(exact)
    q, nested_absmax = quantize_scales_by_rule(absmax, offset, spec)
    np.testing.assert_array_equal(np.asarray(out.absmax).reshape(-1), q)
    np.testing.assert_array_equal(np.asarray(out.nested_absmax), nested_absmax)
    again = quantize(jnp.asarray(w))
    assert np.asarray(again.offset).tobytes() == offset.tobytes(), "two runs"


def test_a_layer_of_a_stack_is_decoded():
    packed, spec = make_weight(512, 1024, layers=3)
    stack = jax.tree.map(jnp.asarray, packed)
    decode = jax.jit(lambda p: kernels.dequantize(p, spec, jnp.bfloat16))
    for i in range(3):
        y = decode(dataclasses.replace(stack, layer=jnp.int32(i)))
        one = jax.tree.map(lambda leaf, i=i: leaf[i], packed)
        expected = dequantize_by_rule(one, spec, jnp.bfloat16)
        assert np.asarray(y).tobytes() == expected.tobytes()

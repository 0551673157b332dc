"""The kernel for tens of rows on a GPU, against float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import skinny
from pallas_kernels.packed import PackedWeight
from tests.pallas_kernels.test_matvec import decoded, make_weight, relative_error
from tests.pallas_kernels.test_quantize_kernel import CODEBOOKS
from tests.tolerances import MATMUL_RELATIVE

pytestmark = pytest.mark.gpu


def product(x, packed, spec):
    packed = jax.tree.map(jnp.asarray, packed)
    return jax.jit(lambda x, p: skinny.matmul(x, p, spec))(jnp.asarray(x), packed)


@pytest.mark.parametrize("m", [1, 17, 32, 50, 64, 128])
@pytest.mark.parametrize(
    "n, k",
    [
        (1024, 4096),
        (1008, 1088),  # rows that fill no tile, a short chunk
        (2048, 14336),
        (7008, 2560),
    ],
)
def test_equals_the_product(m, n, k):
    packed, spec = make_weight(n, k)
    x = np.random.default_rng(m).normal(size=(m, k)).astype(jnp.bfloat16)
    expected = x.astype(np.float64) @ decoded(packed, spec).T
    error = relative_error(product(x, packed, spec), expected)
    assert error <= MATMUL_RELATIVE["bfloat16"]


@pytest.mark.parametrize("name", CODEBOOKS)
@pytest.mark.parametrize("block_size, nested", [(64, True), (64, False), (256, True)])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=str)
def test_every_format_and_scale(name, block_size, nested, dtype):
    packed, spec = make_weight(512, 1024, block_size, nested)
    spec = dataclasses.replace(spec, codebook=CODEBOOKS[name])
    x = np.random.default_rng(0).normal(size=(40, 1024)).astype(dtype)
    expected = x.astype(np.float64) @ decoded(packed, spec).T
    error = relative_error(product(x, packed, spec), expected)
    assert error <= MATMUL_RELATIVE[np.dtype(dtype).name]


def test_a_layer_of_a_stack_is_read_in_place():
    packed, spec = make_weight(512, 1024, layers=3)
    x = np.random.default_rng(0).normal(size=(20, 1024)).astype(jnp.bfloat16)

    @jax.jit
    def scan(x, packed: PackedWeight):
        def step(_, layer):
            one = dataclasses.replace(packed, layer=layer)
            return None, skinny.matmul(x, one, spec)

        return jax.lax.scan(step, None, jnp.arange(3, dtype=jnp.int32))[1]

    y = scan(jnp.asarray(x), jax.tree.map(jnp.asarray, packed))
    for i in range(3):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], packed)
        expected = x.astype(np.float64) @ decoded(one, spec).T
        assert relative_error(y[i], expected) <= MATMUL_RELATIVE["bfloat16"]


def test_the_result_is_the_same_every_time():
    packed, spec = make_weight(4096, 4096)
    x = np.random.default_rng(0).normal(size=(64, 4096)).astype(jnp.bfloat16)
    packed = jax.tree.map(jnp.asarray, packed)
    multiply = jax.jit(lambda x, p: skinny.matmul(x, p, spec))
    first = np.asarray(multiply(x, packed))
    for _ in range(20):
        np.testing.assert_array_equal(first, np.asarray(multiply(x, packed)))

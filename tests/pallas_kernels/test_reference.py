import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import PackedSpec, PackedWeight, reference
from tests.tolerances import ULP_NESTED_OFFSET

pytestmark = pytest.mark.usefixtures("strict_dtypes")

RAMP = tuple(float(x) for x in np.linspace(-1, 1, 16, dtype=np.float32))


def test_nibbles_even_column_high():
    codes = jnp.asarray([[1, 2, 3, 4]], jnp.uint8)
    packed = reference.pack_nibbles(codes)
    np.testing.assert_array_equal(packed, [[0x12, 0x34]])
    np.testing.assert_array_equal(reference.unpack_nibbles(packed, 3), [[1, 2, 3]])


def test_words_are_as_documented():
    """Eight columns a little-endian word, from the lowest nibble 1 0 3 2 5 4 7 6."""
    codes = jnp.arange(8, dtype=jnp.uint8)[None]
    word = np.asarray(reference.pack_nibbles(codes)).view("<u4")[0, 0]
    nibbles = [(int(word) >> (4 * i)) & 15 for i in range(8)]
    assert nibbles == [1, 0, 3, 2, 5, 4, 7, 6]


@pytest.mark.parametrize("size", [16, 256])
def test_lookup_is_indexing(size):
    codebook = tuple(float(x) for x in np.random.default_rng(0).uniform(-1, 1, size))
    codes = jnp.arange(size, dtype=jnp.uint8)
    expected = np.asarray(codebook, np.float32)
    np.testing.assert_array_equal(reference.lookup(codes, codebook), expected)


def test_nearest_code_of_unsorted_numbers():
    codebook = (0.0, 1.0, -1.0, 0.5) + (0.0,) * 12
    x = jnp.asarray([-0.9, -0.5, -0.49, 0.2, 0.25, 0.26, 0.9])
    # Halfway between two numbers goes to the lower one; zeros are code 0.
    np.testing.assert_array_equal(
        reference.nearest_code(x, codebook), [2, 2, 0, 0, 0, 3, 1]
    )


def test_nested_scales_round_twice():
    """Product and sum each round, under jit too, where XLA likes to contract them."""
    rng = np.random.default_rng(0)
    n, blocks = 64, 128
    nested_map = np.sort(rng.uniform(-1, 1, 256)).astype(np.float32)
    spec = PackedSpec(
        RAMP, n, blocks * 64, nested_codebook=tuple(float(x) for x in nested_map)
    )
    q = rng.integers(0, 256, (n, blocks)).astype(np.uint8)
    nested = rng.uniform(0.5, 1, n * blocks // 256).astype(np.float32)
    offset = np.float32(0.7310023)
    packed = PackedWeight(
        jnp.zeros((n, blocks * 32), jnp.uint8),
        jnp.asarray(q),
        jnp.asarray(nested),
        jnp.asarray(offset),
    )
    product = nested_map[q] * np.repeat(nested, 256).reshape(n, blocks)
    absmax = jax.jit(lambda packed: reference.decode_absmax(packed, spec))(packed)
    np.testing.assert_array_equal(absmax, product + offset)


def test_mean_is_near_the_float64_one():
    x = np.random.default_rng(0).lognormal(size=1_000_003).astype(np.float32)
    mean = float(reference.mean(jnp.asarray(x)))
    ulp = np.spacing(np.float32(mean))
    assert abs(mean - x.astype(np.float64).mean()) <= ULP_NESTED_OFFSET * ulp

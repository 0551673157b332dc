import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.quant import FORMATS, dequantize_blockwise, quantize_blockwise
from tests.tolerances import MEAN_ABS_ERROR, MEAN_ABS_ERROR_SPREAD

pytestmark = pytest.mark.usefixtures("strict_dtypes")


def nearest_by_definition(x, codebook, block_size):
    """Codes' numbers and scales by numpy, straight from the definition."""
    codebook = np.unique(np.asarray(codebook, np.float32) + np.float32(0))
    midpoints = (codebook[1:] + codebook[:-1]) / np.float32(2)
    numbers, scales = [], []
    for start in range(0, x.size, block_size):
        block = x[start : start + block_size]
        scale = np.abs(block).max()
        inverse = np.float32(1) / scale if scale else np.float32(0)
        rank = np.searchsorted(midpoints, block * inverse, side="left")
        numbers.append(codebook[rank])
        scales.append(scale)
    return np.concatenate(numbers), np.array(scales, np.float32)


@pytest.mark.parametrize(
    "format, block_size",
    [(format, 64) for format in FORMATS] + [("nf4", 32), ("nf4", 4096), ("fp4", 256)],
)
def test_codes_follow_the_definition(format, block_size):
    x = np.random.default_rng(0).normal(size=9000).astype(np.float32)
    x[:block_size] = 0
    if format == "dynamic8-unsigned":
        x = np.abs(x)
    codes, absmax = quantize_blockwise(jnp.asarray(x), format, block_size=block_size)
    numbers, scales = nearest_by_definition(x, FORMATS[format].codebook, block_size)
    codebook = np.asarray(FORMATS[format].codebook, np.float32)
    np.testing.assert_array_equal(codebook[np.asarray(codes)], numbers)
    np.testing.assert_array_equal(absmax, scales)


def test_a_block_of_zeros_is_code_seven():
    codes, absmax = quantize_blockwise(jnp.zeros(128), "nf4", block_size=64)
    np.testing.assert_array_equal(codes, np.full(128, 7))
    np.testing.assert_array_equal(absmax, [0, 0])


def test_a_tie_goes_to_the_lower_code():
    # The known block of bitsandbytes: thresholds, their neighbours, both ends.
    block = [1.0, 0.03979014977812767, 0.0397902, -0.045525018125772476, 0.5, -1.0]
    block = jnp.asarray(block + [0.0, 0.25] + [0.0] * 56)
    codes, _ = quantize_blockwise(block, "nf4", block_size=64)
    np.testing.assert_array_equal(codes[:8], [15, 7, 8, 6, 12, 0, 7, 10])


@pytest.mark.parametrize("format", ["nf4", "fp4"])
def test_error_of_normal_data_is_the_published_one(format):
    x = jax.random.normal(jax.random.key(0), (2**20,))
    codes, absmax = quantize_blockwise(x, format, block_size=64)
    back = dequantize_blockwise(codes, absmax, format, block_size=64)
    error = float(jnp.abs(back - x).mean())
    assert error == pytest.approx(MEAN_ABS_ERROR[format], abs=MEAN_ABS_ERROR_SPREAD)


@pytest.mark.parametrize("block_size", [32, 64, 100])
def test_ragged_blocks_come_back(block_size):
    x = jax.random.normal(jax.random.key(1), (7, 29))
    codes, absmax = quantize_blockwise(x, "int8", block_size=block_size)
    assert absmax.shape == (-(-7 * 29 // block_size),)
    back = dequantize_blockwise(codes, absmax, "int8", block_size=block_size)
    # Half a step of 1/127 of the largest magnitude of a block.
    np.testing.assert_allclose(back, x, atol=float(absmax.max()) / 254 * 1.001)


def test_decoding_rounds_once():
    codes, absmax = quantize_blockwise(
        jax.random.normal(jax.random.key(2), (640,)), "nf4", block_size=64
    )
    exact = dequantize_blockwise(codes, absmax, "nf4", block_size=64)
    once = dequantize_blockwise(codes, absmax, "nf4", block_size=64, dtype=jnp.bfloat16)
    np.testing.assert_array_equal(once, exact.astype(jnp.bfloat16))


def test_wrong_number_of_scales():
    with pytest.raises(ValueError, match=r"must be \(2,\): one scale for each block"):
        dequantize_blockwise(
            jnp.zeros(100, jnp.uint8), jnp.zeros(3), "nf4", block_size=64
        )


def test_integers_are_refused():
    with pytest.raises(ValueError, match="Only floating point is quantized, got int32"):
        quantize_blockwise(jnp.arange(64), "nf4", block_size=64)

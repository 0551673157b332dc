"""Blockwise codes of flat arrays, and double quantization of their scales.

The definitions live beside the kernels, in `pallas_kernels.reference`; here they get
names, checks and formats.
"""

from typing import TYPE_CHECKING

import jax.numpy as jnp

from pallas_kernels import reference
from qlora_jax.quant.formats import Format, get_format

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Float32, Shaped, UInt8

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


def check_block_size(block_size: int) -> None:
    """Raises ValueError unless `block_size` is one that bitsandbytes knows."""
    if block_size not in BLOCK_SIZES:
        raise ValueError(
            f"{block_size=} must be one of {BLOCK_SIZES}; 64 is QLoRA's choice."
        )


def quantize_blockwise(
    x: "Shaped[Array, '*shape']", format: str | Format, *, block_size: int
) -> "tuple[UInt8[Array, '*shape'], Float32[Array, ' blocks']]":
    """Rounds each number to the nearest code of its block.

    The array is flattened row-major and cut into blocks of `block_size`;

        absmax[b] = max |x[i]|  over i in block b
        code[i]   = argmin_c |x[i] / absmax[b] - codebook[c]|

    Args:
        x: floating point, any shape; computed in float32.
        format: which numbers the codes stand for.
        block_size: numbers that share a scale, 32 to 4096, or any positive number that
            suits the caller: only `quantize` holds weights to bitsandbytes' choices.

    Returns:
        codes: uint8, one a number, in x's shape.
        absmax: float32 `[ceil(x.size / block_size)]`.

    Raises:
        ValueError: if the format is unknown, `block_size` is not positive, or `x` is
            not floating point.
    """
    if block_size < 1:
        raise ValueError(f"{block_size=} must be positive.")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"Only floating point is quantized, got {x.dtype}.")
    codebook = get_format(format).codebook
    codes, absmax = reference.quantize_blocks(x.reshape(-1), codebook, block_size)
    return codes.reshape(x.shape), absmax


def dequantize_blockwise(
    codes: "UInt8[Array, '*shape']",
    absmax: "Float32[Array, ' blocks']",
    format: str | Format,
    *,
    block_size: int,
    dtype=jnp.float32,
) -> "Float[Array, '*shape']":
    """Undoes `quantize_blockwise`: `codebook[code] * absmax`, rounded once to `dtype`.

    Args:
        codes: uint8, one a number, any shape.
        absmax: float32 `[ceil(codes.size / block_size)]`.
        format: the format of the codes.
        block_size: numbers that share a scale.
        dtype: of the result.

    Returns:
        The numbers, in the shape of `codes`.

    Raises:
        ValueError: if `absmax` does not have one number a block.
    """
    num_blocks = -(-codes.size // block_size)
    if absmax.shape != (num_blocks,):
        raise ValueError(
            f"{absmax.shape=} must be ({num_blocks},): one scale for each block of "
            f"{block_size=} in {codes.size} codes."
        )
    codebook = get_format(format).codebook
    flat = reference.dequantize_blocks(
        codes.reshape(-1), absmax, codebook, block_size, dtype
    )
    return flat.reshape(codes.shape)

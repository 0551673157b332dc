"""Quantizing and dequantizing a weight at the speed of memory, bit for bit.

The kernels are streams: what a thread does is in `dequantize_body`, `quantize_body`
and, for the scales of a double-quantized weight, `quantize_scales_body`. The arithmetic
is that of `reference`, rounding for rounding.
"""

import functools

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np

from pallas_kernels import (
    dequantize_body,
    quantize_body,
    quantize_scales_body,
    reference,
    tuning,
)
from pallas_kernels.nearest import even_cells, float_cells
from pallas_kernels.packed import PackedSpec, PackedWeight
from pallas_kernels.quantize_body import PIECE


def _check(spec: PackedSpec, dtype) -> None:
    """Refuses what neither kernel can do."""
    tuning.require(8, "bfloat16 came with 8.0")
    if dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise NotImplementedError(f"{dtype=} must be bfloat16, float16 or float32.")
    if spec.bits != 4:
        raise NotImplementedError(f"codes of {spec.bits} bits must have 4.")
    if spec.k % PIECE:
        raise NotImplementedError(f"k={spec.k} must be a multiple of {PIECE}.")
    if spec.n * spec.k >= 2**32:
        raise NotImplementedError(f"{spec.n} x {spec.k} numbers are more than 2**32.")
    size = spec.block_size
    if size < PIECE or size & (size - 1):
        raise NotImplementedError(
            f"block_size={size} must be a power of two from {PIECE} on."
        )


def _kernel(emitter, names, out_type, smem_bytes, name, threads, blocks):
    """The Pallas kernel around an emitter; `names` are its operands, then results."""

    def body(*refs, smem):
        named = dict(zip(names, refs, strict=True)) | {"smem": smem}

        @plgpu.inline_mgpu(arg_types=({key: plgpu.RefType() for key in named},))
        def run(_, refs):
            emitter(refs).build()

        run(named)  # pyright: ignore[reportCallIssue]

    return plgpu.kernel(
        body,
        out_type=out_type,
        grid=(blocks,),
        grid_names=("i",),
        num_threads=threads // 128,
        thread_name="wg",
        scratch_types={"smem": plgpu.SMEM((smem_bytes,), jnp.uint8)},
        kernel_name=name,
    )


def dequantize(packed: PackedWeight, spec: PackedSpec, dtype=jnp.float32) -> jax.Array:
    """Returns the [n, k] weight: `codebook[code] * absmax`, one rounding to `dtype`.

    Equal to `reference.dequantize` bit for bit.

    Args:
        packed: the weight, 4-bit codes.
        spec: what its arrays mean.
        dtype: bfloat16, float16 or float32.

    Returns:
        [n, k] of `dtype`.

    Raises:
        NotImplementedError: if this kernel cannot: other types, codes of 8 bits, k not
            a multiple of 8, block sizes that are not powers of two from 8 on.
    """
    dtype = jnp.dtype(dtype)
    _check(spec, dtype)
    table = np.asarray(spec.codebook, np.float32)
    operands = {"codes": packed.codes, "absmax": packed.absmax}
    if spec.nested_codebook is not None:
        nested = np.asarray(spec.nested_codebook, np.float32)
        table = np.concatenate([table, nested])
        operands["nested_absmax"] = packed.nested_absmax
        operands["offset"] = jnp.reshape(packed.offset, (-1,))
    operands["table"] = jnp.asarray(table)
    if packed.layer is not None:
        operands["layer"] = jnp.reshape(packed.layer, (1,)).astype(jnp.int32)
    kernel = _kernel(
        functools.partial(dequantize_body.Dequantize, spec, dtype),
        (*operands, "y"),
        jax.ShapeDtypeStruct((spec.n, spec.k), dtype),
        dequantize_body.smem_bytes(spec),
        "dequantize",
        dequantize_body.THREADS,
        dequantize_body.BLOCKS_OF_THREADS,
    )
    return kernel(*operands.values())


def quantize(w: jax.Array, spec: PackedSpec) -> PackedWeight:
    """Quantizes an [n, k] weight, one row per output feature, in one pass.

    Codes and float32 scales equal those of `reference.quantize` bit for bit. If the
    scales are quantized in turn, their mean is a sum in another order than
    `reference.mean`'s, within 4 units in the last place of the float64 one; what
    follows from it is equal bit for bit. That is a second kernel for nested blocks of
    256, and `reference.double_quantize` for others.

    Args:
        w: [n, k], bfloat16, float16 or float32.
        spec: codebook, shape and block size.

    Returns:
        The codes and scales.

    Raises:
        NotImplementedError: if this kernel cannot: other types, codes of 8 bits, k not
            a multiple of 8, block sizes other than 8, 16, ... 256 or not dividing
            n * k, codebooks with two midpoints nearer than 1/128.
    """
    _check(spec, w.dtype)
    tuning.require(8.6, "max.xorsign.abs came with 8.6")
    if spec.block_size > 32 * PIECE or spec.n * spec.k % spec.block_size:
        raise NotImplementedError(
            f"block_size={spec.block_size} must be at most {32 * PIECE} and divide "
            f"the {spec.n * spec.k} numbers."
        )
    table = even_cells(spec.codebook)
    names = ["codes", "absmax"]
    results = [
        jax.ShapeDtypeStruct((spec.n, spec.k // 2), jnp.uint8),
        jax.ShapeDtypeStruct((spec.num_blocks,), jnp.float32),
    ]
    blocks = quantize_body.BLOCKS_OF_THREADS
    doubly = _has_second_pass(spec)
    if doubly:
        names.append("sums")
        results.append(jax.ShapeDtypeStruct((blocks,), jnp.float32))
    kernel = _kernel(
        functools.partial(quantize_body.Quantize, spec, w.dtype),
        ("w", "table", *names),
        results,
        quantize_body.smem_bytes(),
        "quantize",
        quantize_body.THREADS,
        blocks,
    )
    codes, absmax, *sums = kernel(w, jnp.asarray(table))
    if doubly:
        return _quantize_scales(codes, absmax, sums[0], spec)
    return reference.double_quantize(codes, absmax, spec)


def _has_second_pass(spec: PackedSpec) -> bool:
    """Whether `_quantize_scales` can quantize the scales."""
    if spec.nested_codebook is None:
        return False
    if spec.nested_block_size != quantize_scales_body.BLOCK_SIZE:
        return False
    try:
        float_cells(spec.nested_codebook)
    except NotImplementedError:
        return False
    return True


def _quantize_scales(codes, absmax, sums, spec: PackedSpec) -> PackedWeight:
    """The second pass of double quantization; `sums` are of the scales."""
    assert spec.nested_codebook is not None
    cells = float_cells(spec.nested_codebook)
    num_nested = quantize_scales_body.num_nested(spec)
    threads = quantize_scales_body.THREADS
    shape = (spec.n, -1) if spec.blocks_in_rows else (-1,)
    kernel = _kernel(
        functools.partial(quantize_scales_body.QuantizeScales, spec, sums.size),
        ("absmax", "sums", "table", "codes", "nested_absmax", "offset"),
        (
            jax.ShapeDtypeStruct((spec.num_blocks,), jnp.uint8),
            jax.ShapeDtypeStruct((num_nested,), jnp.float32),
            jax.ShapeDtypeStruct((1,), jnp.float32),
        ),
        quantize_scales_body.smem_bytes(cells),
        "quantize_scales",
        threads,
        -(-num_nested // (threads // 32)),
    )
    q, nested_absmax, offset = kernel(absmax, sums, jnp.asarray(cells.entries))
    return PackedWeight(codes, q.reshape(shape), nested_absmax, offset.reshape(()))

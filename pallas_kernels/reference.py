"""Every op of the package in plain jax: its definition, its fallback, its oracle.

These run on any backend and under any sharding. What a kernel computes is what the
function of the same name here computes, within the error stated in `api`.
"""

import itertools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.packed import PackedSpec, PackedWeight

# Below this, the reciprocal of a float32 is infinite or flushed: the block is zero.
_SMALLEST_ABSMAX = 2.0**-126


def select_layer(packed: PackedWeight) -> PackedWeight:
    """Returns the weight meant, sliced out of its stack if `packed.layer` names one."""
    if packed.layer is None:
        return packed

    def take(leaf):
        if leaf is None:
            return None
        return lax.dynamic_index_in_dim(leaf, packed.layer, 0, keepdims=False)

    return PackedWeight(
        take(packed.codes),
        take(packed.absmax),
        take(packed.nested_absmax),
        take(packed.offset),
    )


def lookup(codes: jax.Array, codebook: tuple[float, ...]) -> jax.Array:
    """Returns float32 `codebook[codes]`, by a gather of clipped indices.

    On a GPU that takes 0.56 of the time of selects on the bits of a code, and 0.37 of
    that of a gather whose indices are promised to be in bounds; see
    docs/kernels_quantize.md.
    """
    table = jnp.asarray(codebook, jnp.float32)
    return jnp.take(table, codes.astype(jnp.int32), mode="clip")


def nearest_code(x: jax.Array, codebook: tuple[float, ...]) -> jax.Array:
    """Returns the uint8 code of the number nearest to each `x`.

    Decided by the float32 midpoints of neighbouring numbers; a tie goes to the lower
    number. Of numbers that occur twice (the zeros of fp4) the lower code is written.
    """
    numbers: dict[float, int] = {}
    for code, number in enumerate(codebook):
        numbers.setdefault(number + 0.0, code)  # -0.0 + 0.0 is 0.0
    ascending = sorted(numbers)
    values = jnp.asarray(ascending, jnp.float32)
    midpoints = (values[1:] + values[:-1]) / 2
    if len(ascending) > 16:
        rank = jnp.searchsorted(midpoints, x, side="left", method="scan_unrolled")
        codes = jnp.asarray([numbers[value] for value in ascending], jnp.uint8)
        return jnp.take(codes, rank, mode="clip")
    # Sum of steps: each midpoint passed moves the code to the next one's, modulo 256.
    order = [numbers[value] for value in ascending]
    code = jnp.full(x.shape, order[0], jnp.uint8)
    for i, (here, there) in enumerate(itertools.pairwise(order)):
        step = jnp.uint8((there - here) % 256)
        code = code + jnp.where(x > midpoints[i], step, jnp.uint8(0))
    return code


def quantize_blocks(
    x: jax.Array, codebook: tuple[float, ...], block_size: int
) -> tuple[jax.Array, jax.Array]:
    """Returns one code a number, and the absmax of each block.

        absmax[b] = max |x[i]|  over i in block b
        code[i]   = argmin_c |x[i] * (1 / absmax[b]) - codebook[c]|

    The scaling is a float32 reciprocal and a multiplication, as bitsandbytes does it.
    An all-zero block gets the code of zero.

    Args:
        x: `[size]`, any float type; computed in float32.
        codebook: the numbers of the codes, in code order.
        block_size: numbers that share a scale; the last block may be short.

    Returns:
        codes: uint8 `[size]`.
        absmax: float32 `[ceil(size / block_size)]`.
    """
    size = x.shape[0]
    num_blocks = -(-size // block_size)
    padded = jnp.pad(x, (0, num_blocks * block_size - size))
    blocks = padded.reshape(num_blocks, block_size).astype(jnp.float32)
    absmax = jnp.max(jnp.abs(blocks), axis=1)
    is_zero = absmax < _SMALLEST_ABSMAX
    inverse = jnp.where(is_zero, 0.0, 1.0 / jnp.where(is_zero, 1.0, absmax))
    codes = nearest_code(blocks * inverse[:, None], codebook)
    return codes.reshape(-1)[:size], absmax


def dequantize_blocks(
    codes: jax.Array,
    absmax: jax.Array,
    codebook: tuple[float, ...],
    block_size: int,
    dtype=jnp.float32,
) -> jax.Array:
    """Returns `codebook[code] * absmax` of the block, rounded once to `dtype`."""
    size = codes.shape[0]
    if size == absmax.shape[0] * block_size:
        numbers = lookup(codes, codebook).reshape(-1, block_size) * absmax[:, None]
        return numbers.reshape(size).astype(dtype)
    scales = jnp.repeat(absmax, block_size)[:size]
    return (lookup(codes, codebook) * scales).astype(dtype)


def pack_nibbles(codes: jax.Array) -> jax.Array:
    """Packs an even number of 4-bit codes along the last axis, even ones high."""
    return codes[..., 0::2] << jnp.uint8(4) | codes[..., 1::2]


def unpack_nibbles(packed: jax.Array, size: int) -> jax.Array:
    """Undoes `pack_nibbles`: `size` codes along the last axis."""
    halves = jnp.stack([packed >> jnp.uint8(4), packed & jnp.uint8(15)], axis=-1)
    return halves.reshape(*packed.shape[:-1], -1)[..., :size]


def decode_absmax(packed: PackedWeight, spec: PackedSpec) -> jax.Array:
    """Returns the float32 scale of each block, in the shape of `packed.absmax`.

        absmax = nested_codebook[q] * nested_absmax + offset

    rounded after the product and after the sum.
    """
    if spec.nested_codebook is None:
        return packed.absmax
    q = packed.absmax.reshape(-1)
    product = dequantize_blocks(
        q, packed.nested_absmax, spec.nested_codebook, spec.nested_block_size
    )
    # Without the barrier XLA contracts the product and the sum to one rounding.
    absmax = lax.optimization_barrier(product) + packed.offset
    return absmax.reshape(packed.absmax.shape)


def dequantize(packed: PackedWeight, spec: PackedSpec, dtype=jnp.float32) -> jax.Array:
    """Returns the [n, k] weight: `codebook[code] * absmax`, one rounding to `dtype`."""
    packed = select_layer(packed)
    absmax = decode_absmax(packed, spec)
    codes = packed.codes
    if spec.bits == 4:
        size = spec.k if codes.ndim == 2 else spec.n * spec.k
        codes = unpack_nibbles(codes, size)
    if spec.blocks_in_rows:
        numbers = lookup(codes, spec.codebook).reshape(spec.n, -1, spec.block_size)
        weight = numbers * absmax[:, :, None]
        return weight.reshape(spec.n, spec.k).astype(dtype)
    flat = dequantize_blocks(
        codes.reshape(-1), absmax.reshape(-1), spec.codebook, spec.block_size, dtype
    )
    return flat.reshape(spec.n, spec.k)


def quantize(w: jax.Array, spec: PackedSpec) -> PackedWeight:
    """Quantizes an [n, k] weight, one row per output feature.

    With `spec.nested_codebook` the scales are quantized in turn (QLoRA, section 3):

        offset = mean(absmax)
        q, nested_absmax = quantize_blocks(absmax - offset, nested_codebook, 256)

    The mean is a tree of float32 sums, which keeps it within 4 ulp of the float64 one.
    """
    codes, absmax = quantize_blocks(w.reshape(-1), spec.codebook, spec.block_size)
    if spec.bits == 8:
        codes = codes.reshape(spec.n, spec.k)
    elif spec.k % 2 == 0:
        codes = pack_nibbles(codes.reshape(spec.n, spec.k))
    else:  # the half byte left over holds the code of zero
        zero = nearest_code(jnp.zeros(codes.size % 2), spec.codebook)
        codes = pack_nibbles(jnp.concatenate([codes, zero]))
    return double_quantize(codes, absmax, spec)


def double_quantize(
    codes: jax.Array, absmax: jax.Array, spec: PackedSpec
) -> PackedWeight:
    """Puts codes and flat float32 scales together, the scales quantized if asked."""
    shape = (spec.n, -1) if spec.blocks_in_rows else (-1,)
    if spec.nested_codebook is None:
        return PackedWeight(codes, absmax.reshape(shape))
    offset = mean(absmax)
    q, nested_absmax = quantize_blocks(
        absmax - offset, spec.nested_codebook, spec.nested_block_size
    )
    return PackedWeight(codes, q.reshape(shape), nested_absmax, offset)


def mean(x: jax.Array) -> jax.Array:
    """Mean of a float32 vector by a tree of short sums, whose errors stay small."""
    total = x
    while total.shape[0] > 1:
        total = jnp.pad(total, (0, -total.shape[0] % 32)).reshape(-1, 32).sum(axis=1)
    return total[0] / jnp.float32(x.shape[0])


def matmul(x: jax.Array, packed: PackedWeight, spec: PackedSpec) -> jax.Array:
    """Returns `x @ W` for x `[..., k]`, accumulated in float32, in x's type."""
    weight = dequantize(packed, spec, x.dtype)
    return dot(x, weight, contract=1)


def matmul_dx(dy: jax.Array, packed: PackedWeight, spec: PackedSpec) -> jax.Array:
    """Returns `dy @ Wᵀ` for dy `[..., n]`, accumulated in float32, in dy's type."""
    weight = dequantize(packed, spec, dy.dtype)
    return dot(dy, weight, contract=0)


def dot(x: jax.Array, weight: jax.Array, contract: int) -> jax.Array:
    """Contracts x's last axis with an axis of a [n, k] weight, in float32."""
    dimensions = (((x.ndim - 1,), (contract,)), ((), ()))
    if x.dtype == jnp.float32:
        return lax.dot_general(x, weight, dimensions, lax.Precision.HIGHEST)
    # Backends sum 16-bit products in float32 and round once. Asking for float32 and
    # rounding here instead would on a GPU write the product twice.
    return lax.dot_general(x, weight, dimensions)

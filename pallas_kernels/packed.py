"""The value every op of this package takes: a weight held as codes and scales."""

import dataclasses
from typing import Any

import jax

# Any: leaves are arrays, tracers, ShapeDtypeStructs or, inside a tree map, anything.
Leaf = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedWeight:
    """The arrays of a quantized [n, k] weight, one row per output feature.

    The bytes are those of bitsandbytes, and the kernels read them as they are:

    * `codes`: uint8 `[*stack, n, k // 2]`, two 4-bit codes a byte, the even column in
      the high half. Read as little-endian uint32 words, a word holds eight columns of
      one row, from the lowest nibble up: 1 0 3 2 5 4 7 6. Formats of 8 bits have one
      code a byte, `[*stack, n, k]`. If `k` is odd the 4-bit codes are flat,
      `[*stack, ceil(n * k / 2)]`, since a row does not end at a byte.
    * `absmax`: the scale of each block. Blocks of `block_size` run over the flattened
      row-major [n, k]. `[*stack, n, k // block_size]` if `block_size` divides `k`,
      else flat, `[*stack, ceil(n * k / block_size)]`. float32, or, double-quantized,
      the uint8 code of the scale.
    * `nested_absmax`: float32 `[*stack, ceil(num_blocks / nested_block_size)]`, blocks
      over the flattened absmax. None without double quantization.
    * `offset`: float32 `[*stack]`, what was subtracted from every absmax before it was
      quantized. None without double quantization.
    * `layer`: None, or an int32 scalar: the weight meant is slice `layer` of the one
      leading stack axis of the other leaves. A kernel indexes the stack, so that a loop
      over layers does not copy a slice in front of it.
    """

    codes: Leaf
    absmax: Leaf
    nested_absmax: Leaf = None
    offset: Leaf = None
    layer: Leaf = None


@dataclasses.dataclass(frozen=True)
class PackedSpec:
    """What the arrays of a `PackedWeight` mean; hashable, static under jit.

    Attributes:
        codebook: 16 (4-bit) or 256 (8-bit) numbers in [-1, 1], in the order of the
            codes: code `i` of a block stands for `codebook[i] * absmax`.
        n: output features, the rows.
        k: input features, the columns.
        block_size: how many consecutive numbers of the flattened weight share a scale.
        nested_codebook: the 256 numbers that quantized scales stand for, or None if
            the scales are float32.
        nested_block_size: how many scales share a nested scale.
    """

    codebook: tuple[float, ...]
    n: int
    k: int
    block_size: int = 64
    nested_codebook: tuple[float, ...] | None = None
    nested_block_size: int = 256

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return 4 if len(self.codebook) == 16 else 8

    @property
    def num_blocks(self) -> int:
        """Scales of one weight, the last block possibly short."""
        return -(-self.n * self.k // self.block_size)

    @property
    def blocks_in_rows(self) -> bool:
        """Whether no block crosses from one row into the next."""
        return self.k % self.block_size == 0

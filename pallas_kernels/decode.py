"""4-bit codes to 16-bit floats, shared by the kernel bodies.

Two ways, for two resources of a multiprocessor:

*By permutes.* A 32-bit word holds eight codes. `PRMT`, the byte permute, looks four
nibbles up in a table of eight bytes, so a table of sixteen 16-bit numbers is kept as
eight registers (the low bytes of the numbers in four, the high bytes in four) and a
word costs 16 permutes and 5 other instructions. Permutes run at 16 lanes a cycle and
multiprocessor on Hopper (measured; a quarter of the rate of other integer
instructions), so this is for few weights.

*By pairs.* A byte is two codes, and a table of 256 pairs of numbers in shared memory
gives both in one load. With a copy of it for each of the 32 lanes of a warp, in the
bank of that lane, no two lanes ever meet: 64 weights a cycle and multiprocessor.

`decode_word` is written over `Ops`, what a lane can do, so that the very same sequence
runs in a kernel (`LaneOps`) and on numpy arrays in the tests.
"""

from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

# A 32-bit register: an MLIR value in a kernel, a numpy array in a test.
Register = Any

# Which bytes of four decoded codes make two registers, from `permute(low, high, ...)`,
# bytes l h l h from the first number up. A byte holds its first code in the high
# nibble, so that nibbles 0..3 are codes 1 0 3 2.
_PAIRS = (0x4051, 0x6273)


class Ops(Protocol):
    """What a lane does with 32-bit registers."""

    def and_(self, a: Register, mask: int) -> Register:
        """Bitwise and with a constant."""
        ...

    def or_(self, a: Register, bits: int) -> Register:
        """Bitwise or with a constant."""
        ...

    def shift_right(self, a: Register, bits: int) -> Register:
        """Logical shift."""
        ...

    def permute(self, a: Register, b: Register, selector: Register | int) -> Register:
        """Byte i of the result is byte `selector >> 4 i & 7` of (b, a)."""
        ...


def byte_table(codebook: tuple[float, ...], dtype: str) -> tuple[list[int], list[int]]:
    """The codebook in `dtype` as `decode_word` takes it.

    Returns:
        Low bytes and high bytes, four 32-bit words each; word i holds those of entries
        4 i .. 4 i + 3.
    """
    numbers = np.array(codebook, np.float32).astype(jnp.dtype(dtype)).view(np.uint8)
    words = numbers.reshape(4, 4, 2).transpose(2, 0, 1).copy().view("<u4")[..., 0]
    low, high = words.tolist()
    return low, high


def pair_table(codebook: tuple[float, ...], dtype: str) -> np.ndarray:
    """Both numbers of every byte of two codes.

    The number of the high nibble is in the low half, which comes first in memory, as
    the high nibble does in a packed weight.

    Args:
        codebook: 16 numbers.
        dtype: the 16-bit float.

    Returns:
        uint32 [256].
    """
    numbers = np.array(codebook, np.float32).astype(jnp.dtype(dtype)).view(np.uint16)
    byte = np.arange(256)
    high, low = numbers[byte >> 4].astype(np.uint32), numbers[byte & 15]
    return high | low.astype(np.uint32) << 16


def decode_word(
    ops: Ops,
    word: Register,
    table: tuple[list[Register], list[Register]],
) -> list[Register]:
    """The eight numbers of a word, by permutes.

    Args:
        ops: where it runs.
        word: four bytes of two codes, the first in the high nibble.
        table: what `byte_table` returns, in registers.

    Returns:
        Four registers, of the two numbers of a byte each, the first in the low half.
    """
    low, high = table
    index = ops.and_(word, 0x77777777)
    half = ops.or_(ops.and_(ops.shift_right(word, 1), 0x44444444), 0x32103210)
    out = []
    for _ in range(2):
        l_byte, h_byte = (
            ops.permute(
                ops.permute(t[0], t[1], index), ops.permute(t[2], t[3], index), half
            )
            for t in (low, high)
        )
        out += [ops.permute(l_byte, h_byte, selector) for selector in _PAIRS]
        if len(out) == 2:
            index = ops.shift_right(index, 16)
            half = ops.shift_right(half, 16)
    return out


class LaneOps:
    """`Ops` of one lane inside a Mosaic GPU kernel, on MLIR values.

    Args:
        dtype: the 16-bit float, "bfloat16" or "float16".
    """

    def __init__(self, dtype: str):
        self._i32 = ir.IntegerType.get_signless(32)
        self._pair = {"bfloat16": "bf16x2", "float16": "f16x2"}[dtype]

    def _constant(self, x: int) -> ir.Value:
        return mgpu_utils.c(x - (1 << 32) if x >= 1 << 31 else x, self._i32)

    def and_(self, a, mask):
        """Bitwise and with a constant."""
        return arith.andi(a, self._constant(mask))

    def or_(self, a, bits):
        """Bitwise or with a constant."""
        return arith.ori(a, self._constant(bits))

    def shift_right(self, a, bits):
        """Logical shift."""
        return arith.shrui(a, self._constant(bits))

    def permute(self, a, b, selector):
        """`prmt.b32`."""
        if isinstance(selector, int):
            selector = self._constant(selector)
        return llvm.inline_asm(
            self._i32, [a, b, selector], "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r"
        )

    def round_pair(self, low, high):
        """`cvt.rn` of two numbers at once."""
        return llvm.inline_asm(
            self._i32, [high, low], f"cvt.rn.{self._pair}.f32 $0, $1, $2;", "=r,f,f"
        )

    def multiply_pair(self, a, b):
        """The products of two 16-bit floats, each rounded."""
        kind = self._pair
        return llvm.inline_asm(
            self._i32, [a, b], f"mul.rn.{kind} $0, $1, $2;", "=r,r,r"
        )

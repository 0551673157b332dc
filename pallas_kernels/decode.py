"""4-bit codes to 16-bit floats, eight at a time, shared by the kernel bodies.

A 32-bit word holds eight codes. `PRMT`, the byte permute of NVIDIA GPUs, looks four
nibbles up in a table of eight bytes, so a table of sixteen 16-bit numbers is kept as
eight registers (the low bytes of the numbers in four, the high bytes in four) and a
word costs 21 integer instructions:

    index    the low three bits of each nibble: what to take from either half
    half     for each nibble 0..3 from the lower half of the table, 4..7 from the upper
    4 codes  2 permutes for each half and byte, choose the halves, interleave the bytes

The table may be the codebook, or the codebook times the scale of a block, multiplied in
float32 and rounded once: then decoding needs no multiplication at all, and 8 products
are paid for 64 weights or more.

The functions are written over `Ops`, what a lane can do, so that the very same
sequence runs in a kernel (`LaneOps`) and on numpy arrays in the tests.
"""

from typing import Any, Protocol

from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, llvm
from jax.experimental.mosaic.gpu import utils as mgpu_utils

# A 32-bit register: an MLIR value in a kernel, a numpy array in a test.
Register = Any

# Bytes l0 h0 l1 h1 of one pair of numbers, from `prmt(low, high, ...)`. In a byte the
# even column is the high nibble, so that nibbles 0..7 of a word are columns
# 1 0 3 2 5 4 7 6.
_FIRST_PAIR = 0x4051
_SECOND_PAIR = 0x6273


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

    def multiply(self, a: Register, constant: float) -> Register:
        """The float32 product."""
        ...

    def round_pair(self, low: Register, high: Register) -> Register:
        """Two float32 to two 16-bit floats of one register."""
        ...


def scaled_table(
    ops: Ops, codebook: tuple[float, ...], scale: Register
) -> tuple[list[Register], list[Register]]:
    """The table of `codebook[i] * scale`, as low bytes and high bytes.

    Args:
        ops: where it runs.
        codebook: 16 numbers.
        scale: float32, the scale of the block.

    Returns:
        Two lists of four registers; register i holds a byte of entries 4 i .. 4 i + 3.
    """
    numbers = [ops.multiply(scale, c) for c in codebook]
    pairs = [ops.round_pair(numbers[i], numbers[i + 1]) for i in range(0, 16, 2)]
    low = [ops.permute(pairs[i], pairs[i + 1], 0x6420) for i in range(0, 8, 2)]
    high = [ops.permute(pairs[i], pairs[i + 1], 0x7531) for i in range(0, 8, 2)]
    return low, high


def decode_word(
    ops: Ops, word: Register, table: tuple[list[Register], list[Register]]
) -> list[Register]:
    """The eight numbers of a word.

    Args:
        ops: where it runs.
        word: eight codes, columns 1 0 3 2 5 4 7 6 from the lowest nibble up.
        table: what `scaled_table` returns.

    Returns:
        Four registers of two numbers each: columns 0 1, 2 3, 4 5, 6 7, the first of
        each pair in the low half, as 16 bytes of a row lie in memory.
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
        out.append(ops.permute(l_byte, h_byte, _FIRST_PAIR))
        out.append(ops.permute(l_byte, h_byte, _SECOND_PAIR))
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
        self._f32 = ir.F32Type.get()
        self._round = {"bfloat16": "bf16x2", "float16": "f16x2"}[dtype]

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

    def multiply(self, a, constant):
        """The float32 product."""
        value = arith.constant(self._f32, ir.FloatAttr.get(self._f32, constant))
        return arith.mulf(a, value)

    def round_pair(self, low, high):
        """`cvt.rn` of two numbers at once."""
        return llvm.inline_asm(
            self._i32, [high, low], f"cvt.rn.{self._round}.f32 $0, $1, $2;", "=r,f,f"
        )

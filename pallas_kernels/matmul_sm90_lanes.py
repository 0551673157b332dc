"""What one lane of the Hopper kernels does; `matmul_sm90` tells why.

Addresses and decoding are written with Python's operators over 32-bit unsigned
integers, so that the very same lines run in a kernel, on `Word`, and in the tests, on
numpy arrays of all 128 lanes.
"""

from typing import Any

import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels import decode

LANES = 128
# Contraction of a wgmma: 64 16-bit numbers are the 128 bytes of a swizzled row.
STEP = 64
# 32-bit words of codes that a lane decodes a step.
STEP_WORDS = 4
# Codes and scales come for two steps at a time.
SPAN_STEPS = 2
SPAN = STEP * SPAN_STEPS
SPAN_BYTES = SPAN // 2
# A table of 256 pairs, 32 copies side by side.
TABLE_ROW = 32 * 4
TABLE_BYTES = 256 * TABLE_ROW
_TABLE_SHIFT = 7  # a byte so far left is an offset of rows

# A 32-bit unsigned integer: `Word` in a kernel, a numpy array in a test.
Integer = Any


def feature(lane: Integer) -> Integer:
    """Which of a consumer's 64 features is a lane's first row of wgmma's 64.

    The second one is the feature after it.
    """
    warp, g = lane >> 5, lane >> 2 & 7
    return (warp >> 1) * 32 + g * 4 + (warp & 1) * 2


def chunk_address(row: Integer, chunk: Integer, swizzled: bool) -> Integer:
    """Offset of 16 bytes of a row of a span of codes, [128, 64 bytes].

    A 64-byte swizzle is bits 1 and 2 of the row on the two bits of the chunk.
    """
    if swizzled:
        chunk = chunk ^ (row >> 1 & 3)
    return row * SPAN_BYTES + chunk * 16


def scale_addresses(forward: bool, lane: Integer) -> list[Integer]:
    """Where the loader's lane puts its two scales, the first consumer or step first.

    Forward, each scale is a pair of itself, of [step, row]. Backward, the row of codes
    is 8 i + 2 q + e of a step, and scales are [consumer, step, q, i, e]: a lane of a
    consumer has those it needs on end, in pairs.
    """
    if forward:
        return [lane * 4, lane * 4 + LANES * 4]
    step, row = lane >> 6, lane & 63
    pair = (step * 4 + (row >> 1 & 3)) * 8 + (row >> 3)
    place = pair * 4 + (row & 1) * 2
    return [place, place + LANES * 4]


def forward_step(ops, decoders, half: int, lane, wg, swizzled: bool):
    """Yields row, column of eight and pair of numbers of a lane's first operand.

    A lane of a quad needs, of every word of eight codes, the byte with its two columns.

    Args:
        ops: the lane's memory (`codes`, `scales`) and its arithmetic.
        decoders: `Table` or `Permute` for each of the four words' worth of a step.
        half: which step of the span.
        lane: 0 .. 127.
        wg: which consumer.
        swizzled: whether the codes are.
    """
    first = wg * 64 + feature(lane)
    for row in range(2):
        (scale,) = ops.scales((first + row) * 4 + half * LANES * 4, 1)
        for part in range(2):
            address = chunk_address(first + row, 2 * half + part, swizzled)
            decoder = decoders[2 * row + part]
            numbers = decoder.bytes_of_words(ops, ops.codes(address), lane & 3)
            for i, number in enumerate(numbers):
                yield row, 4 * part + i, ops.multiply_pair(number, scale)


def backward_step(ops, decoders, half: int, lane, wg, swizzled: bool):
    """As `forward_step`; columns are rows of codes, and rows nibbles of a byte.

    A unit is two bytes of each of two rows of codes. Two warps read it, and take a byte
    each: that is why neighbouring features are a lane's two rows.
    """
    warp = lane >> 5
    units, scales = [], []
    for part in range(2):
        row = (lane & 31) + (half * STEP + part * 32)
        address = chunk_address(row, wg * 2 + (warp >> 1), swizzled)
        units += ops.code_matrices(address)
        place = wg * (LANES * 4) + (lane & 3) * 32 + (half * 128 + part * 16)
        scales += ops.scales(place, 4)
    for i in range(0, 8, 2):
        decoder = decoders[i // 2]
        numbers = decoder.nibbles_of_units(ops, units[i], units[i + 1], warp & 1)
        for j, number in enumerate(numbers):
            column = i + j // 2
            yield j % 2, column, ops.multiply_pair(number, scales[column])


class Table:
    """Decodes a byte of two codes by a load from a table of all pairs."""

    def bytes_of_words(self, ops, words, byte):
        """The two numbers of byte `byte` of each of four words."""
        amount = (_TABLE_SHIFT - byte * 8) & 31
        return [self._look_up(ops, ops.rotate(word, amount)) for word in words]

    def nibbles_of_units(self, ops, first, second, byte):
        """Numbers of high, then low nibbles of a byte of two units, paired by rows."""
        high, low = (ops.shift_left(m, byte * 8) for m in (0xF0, 0x0F))
        amounts = [(_TABLE_SHIFT - shift - byte * 8) & 31 for shift in (4, 0)]
        out = []
        for unit in (first, second):
            # the second row's nibbles, four bits above the first row's
            above = unit >> 12
            for mask, amount in zip((high, low), amounts, strict=True):
                # bits of `mask` from the first row, the others from the second
                pair = above ^ (mask & (unit ^ above))
                out.append(self._look_up(ops, ops.rotate(pair, amount)))
        return out

    @staticmethod
    def _look_up(ops, value):
        return ops.table(value & (255 * TABLE_ROW))


class Permute:
    """Decodes by byte permutes, from registers alone (`decode.decode_word`)."""

    def __init__(self, codebook: tuple[float, ...], dtype: str):
        self._bytes = decode.byte_table(codebook, dtype)

    def bytes_of_words(self, ops, words, byte):
        """The two numbers of byte `byte` of each of four words."""
        pick = byte * 0x11 + 0x40
        low, high = (ops.permute(*words[i : i + 2], pick) for i in (0, 2))
        word = ops.permute(low, high, 0x5410)
        return decode.decode_word(ops, word, self._table(ops))

    def nibbles_of_units(self, ops, first, second, byte):
        """Numbers of high, then low nibbles of a byte of two units, paired by rows."""
        pick = byte * 0x1111 + 0x6420
        word = ops.permute(first, second, pick)
        return decode.decode_word(ops, word, self._table(ops), decode.ACROSS_BYTES)

    def _table(self, ops):
        low, high = self._bytes
        return [ops.constant(x) for x in low], [ops.constant(x) for x in high]


# What follows is for kernels only: lanes of Mosaic GPU.


def _i32():
    return ir.IntegerType.get_signless(32)


def _constant(x: int):
    return mgpu_utils.c(x - (1 << 32) if x >= 1 << 31 else x, _i32())


def _raw(x):
    return x.value if isinstance(x, Word) else _constant(x)


class Word:
    """A 32-bit unsigned integer of a lane, with Python's operators."""

    def __init__(self, value):
        self.value = _constant(value) if isinstance(value, int) else value

    def __add__(self, x):
        return Word(arith.addi(self.value, _raw(x)))

    __radd__ = __add__

    def __sub__(self, x):
        return Word(arith.subi(self.value, _raw(x)))

    def __rsub__(self, x):
        return Word(arith.subi(_raw(x), self.value))

    def __mul__(self, x):
        return Word(arith.muli(self.value, _raw(x)))

    def __floordiv__(self, x):
        return Word(arith.divui(self.value, _raw(x)))

    def __and__(self, x):
        return Word(arith.andi(self.value, _raw(x)))

    def __or__(self, x):
        return Word(arith.ori(self.value, _raw(x)))

    def __xor__(self, x):
        return Word(arith.xori(self.value, _raw(x)))

    __rxor__ = __xor__

    def __rshift__(self, x):
        return Word(arith.shrui(self.value, _raw(x)))

    def minimum(self, x: int):
        """The smaller of the two."""
        return Word(arith.minui(self.value, _raw(x)))


class LaneOps:
    """A consumer's lane: its shared memory and what Python has no operator for.

    Args:
        dtype: of the numbers.
        codes: ref of a span of codes.
        scales: ref of its scales.
        table: ref of the table of pairs.
    """

    def __init__(self, dtype: str, codes=None, scales=None, table=None):
        self._ops = decode.LaneOps(dtype)
        self._codes, self._scales, self._table = (
            None if ref is None else address(ref) for ref in (codes, scales, table)
        )

    def codes(self, offset):
        """Four words of codes."""
        return load("shared.v4.b32", self._codes + offset)

    def code_matrices(self, offset):
        """Four transposed 8 x 8 matrices of 16-bit units; lane t gives row t of 32."""
        return _asm(
            "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {$0, $1, $2, $3}, [$4];",
            "=r,=r,=r,=r,r",
            self._codes + offset,
        )

    def scales(self, offset, count: int):
        """One or four pairs of scales."""
        kind = "shared.b32" if count == 1 else f"shared.v{count}.b32"
        return load(kind, self._scales + offset)

    def table(self, offset):
        """The pair of numbers in this lane's copy of a row of the table."""
        return load("shared.b32", self._table + (offset | (lane_index() & 31) * 4))[0]

    def rotate(self, a, bits):
        """To the left, by 0 .. 31 bits."""
        return _asm("shf.l.wrap.b32 $0, $1, $1, $2;", "=r,r,r", a, bits, pure=True)[0]

    def shift_left(self, a: int, bits):
        """A constant shifted to the left."""
        return Word(arith.shli(_constant(a), _raw(bits)))

    def constant(self, x: int):
        """A register of a constant."""
        return Word(x)

    def permute(self, a, b, selector):
        """`prmt.b32`."""
        return Word(self._ops.permute(_raw(a), _raw(b), _raw(selector)))

    def multiply_pair(self, a, b):
        """The products of two 16-bit floats, each rounded."""
        return Word(self._ops.multiply_pair(_raw(a), _raw(b)))

    def round_pair(self, low, high):
        """Two float32 to two 16-bit floats of one register."""
        return Word(self._ops.round_pair(low, high))

    def and_(self, a, mask):
        """Bitwise and."""
        return a & mask

    def or_(self, a, bits):
        """Bitwise or."""
        return a | bits

    def shift_right(self, a, bits):
        """Logical shift."""
        return a >> bits


def lane_index() -> Word:
    """This lane's number in its warpgroup."""
    return Word(mgpu_utils.thread_idx()) & (LANES - 1)


def address(ref) -> Word:
    """Where a ref in shared memory starts."""
    return Word(llvm.ptrtoint(_i32(), mgpu_utils.memref_ptr(ref)))


def global_address(ref, index: Word):
    """64-bit address of an element of a ref in global memory."""
    i64 = ir.IntegerType.get_signless(64)
    size = mgpu_utils.bitwidth(ir.MemRefType(ref.type).element_type) // 8
    base = llvm.ptrtoint(i64, mgpu_utils.memref_ptr(ref))
    offset = arith.muli(arith.extui(i64, index.value), mgpu_utils.c(size, i64))
    return arith.addi(base, offset)


def load(kind: str, where) -> list:
    """Loads 32-bit registers: Words, or float32 values where `kind` ends in f32."""
    count = int(kind.split(".v")[1][0]) if ".v" in kind else 1
    names = ", ".join(f"${i}" for i in range(count))
    names = f"{{{names}}}" if count > 1 else names
    letter = "=f" if kind.endswith("f32") else "=r"
    shared = kind.startswith("shared")
    constraints = [letter] * count + ["r" if shared else "l"]
    return _asm(f"ld.{kind} {names}, [${count}];", ",".join(constraints), where)


def store(kind: str, where: Word, values) -> None:
    """Stores 32-bit registers to shared memory."""
    names = ", ".join(f"${i + 1}" for i in range(len(values)))
    names = f"{{{names}}}" if len(values) > 1 else names
    _asm(
        f"st.shared.{kind} [$0], {names};",
        ",".join(["r"] * (1 + len(values))),
        where,
        *values,
    )


def _asm(text: str, constraints: str, *args, pure: bool = False) -> list:
    letters = [c for c in constraints.split(",") if c.startswith("=")]
    types = [ir.F32Type.get() if c == "=f" else _i32() for c in letters]
    if not types:
        result_type = ir.Type.parse("!llvm.void")
    elif len(types) == 1:
        result_type = types[0]
    else:
        inner = ", ".join(map(str, types))
        result_type = ir.Type.parse(f"!llvm.struct<({inner})>")
    args = [a.value if isinstance(a, Word) else a for a in args]
    result = llvm.inline_asm(
        result_type, args, text, constraints, has_side_effects=not pure
    )
    if not types:
        return []
    values = [result]
    if len(types) > 1:
        values = [llvm.extractvalue(t, result, [i]) for i, t in enumerate(types)]
    return [v if c == "=f" else Word(v) for v, c in zip(values, letters, strict=True)]


def registers(array: mgpu.FragmentedArray) -> list:
    """The values a lane holds of an array strided over the warpgroup."""
    (vector,) = array.registers.flat
    kind = ir.VectorType(vector.type)
    values = [llvm.extractelement(vector, _constant(i)) for i in range(kind.shape[0])]
    return (
        values if isinstance(kind.element_type, ir.F32Type) else list(map(Word, values))
    )


def from_registers(values, struct) -> mgpu.FragmentedArray:
    """The inverse of `registers`, for a `plgpu.ShapeDtypeStruct`."""
    element = mgpu_utils.dtype_to_ir_type(struct.dtype)
    vector = llvm.mlir_undef(ir.VectorType.get((len(values),), element))
    for i, value in enumerate(values):
        value = value.value if isinstance(value, Word) else value
        vector = llvm.insertelement(vector, value, _constant(i))
    return mgpu.FragmentedArray(
        _registers=np.array([vector], dtype=object),
        _layout=struct.layout.to_mgpu(),
        _is_signed=mgpu_utils.is_signed(struct.dtype),
    )


def scalar(array: mgpu.FragmentedArray) -> Word:
    """A number that all lanes share."""
    return Word(array.registers.item())

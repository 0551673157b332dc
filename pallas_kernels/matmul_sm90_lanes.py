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
from jaxlib.mlir.dialects import arith, llvm, scf

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
# Codes of a span in shared memory: [step, consumer, warp, lane, 16 bytes].
_CONSUMER_BYTES = LANES * 16
_STEP_BYTES = 2 * _CONSUMER_BYTES
CODES_BYTES = SPAN_STEPS * _STEP_BYTES
CODES_WORDS = 16  # that a lane of the loader brings
# A table of 256 pairs, 32 copies side by side.
TABLE_ROW = 32 * 4
TABLE_BYTES = 256 * TABLE_ROW
_TABLE_SHIFT = 7  # a byte so far left is an offset of rows
_HIGH, _LOW = 0xF0F0F0F0, 0x0F0F0F0F

# A 32-bit unsigned integer: `Word` in a kernel, a numpy array in a test.
Integer = Any


def feature(lane: Integer) -> Integer:
    """Which of a consumer's 64 features is a lane's first row of wgmma's 64.

    The second one is the feature after it.
    """
    return (lane >> 5) * 16 + (lane >> 2 & 7) * 2


def slot_address(
    warp: Integer, group: Integer, quad_lane: Integer, step: Integer
) -> Integer:
    """Where the 16 bytes of codes of a consumer's lane 4 `group` + `quad_lane` lie.

    A warp has 512 bytes a step. In each 128 of them the eight slots are permuted, such
    that neither the loader's stores of either pass nor the loads meet in a bank.
    """
    line = group >> 1
    swizzle = (line ^ warp ^ (step << 1)) | (group >> 2) << 2
    place = ((group & 1) << 2 | quad_lane) ^ swizzle
    return step * _STEP_BYTES + warp * 512 + line * 128 + place * 16


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


def forward_source(lane: Integer) -> tuple[Integer, list[int], Integer]:
    """What a loader's lane reads of a span, in 4 loads of 16 bytes.

    Returns:
        The first row, how many rows further each load is, and the byte of the row.
    """
    return lane >> 2, [32 * i for i in range(4)], (lane & 3) * 16


def forward_codes(ops, words, lane):
    """Yields address and words of what a loader's lane stores for the consumers.

    It has half the columns of a step, of four rows. A consumer's lane 4 g + q needs, of
    every word, the byte with its two columns: 4 x 4 bytes are transposed.

    Args:
        ops: the lane's arithmetic.
        words: 16, four of each row.
        lane: 0 .. 127.
    """
    step, half = lane >> 1 & 1, lane & 1
    for i in range(4):
        row = (lane >> 2) + 32 * i
        base = (row >> 6) * _CONSUMER_BYTES + (row & 1) * 8 + half * 4
        transposed = transpose_bytes(ops, words[4 * i : 4 * i + 4])
        for q, word in enumerate(transposed):
            slot = slot_address(row >> 4 & 3, row >> 1 & 7, q, step)
            yield base + slot, [word]


def backward_source(lane: Integer) -> tuple[Integer, list[int], Integer]:
    """As `forward_source`, of 16 loads of 4 bytes."""
    row = (lane >> 6) * STEP + (lane >> 4 & 3) * 2
    return row, [8 * i + e for i in range(8) for e in range(2)], (lane & 15) * 4


def backward_codes(ops, words, lane):
    """As `forward_codes`, of eight columns of eight pairs of rows.

    Neighbours along the contraction lie in two rows: their nibbles are put together
    into a byte, so that consumers decode bytes as in the forward pass.
    """
    words_of_row = lane & 15
    warp, group = words_of_row >> 1 & 3, (words_of_row & 1) * 4
    base = (words_of_row >> 3) * _CONSUMER_BYTES
    parts = []
    for first in (0, 8):
        pairs = [words[first + i : first + i + 2] for i in range(0, 8, 2)]
        high = [(a & _HIGH) | (b >> 4 & _LOW) for a, b in pairs]
        low = [(a << 4 & _HIGH) | (b & _LOW) for a, b in pairs]
        parts.append((transpose_bytes(ops, high), transpose_bytes(ops, low)))
    for i in range(4):
        slot = slot_address(warp, group + i, lane >> 4 & 3, lane >> 6)
        yield base + slot, [part[row][i] for row in range(2) for part in parts]


def transpose_bytes(ops, words) -> list:
    """Word i of the result is byte i of each of four words."""
    a, b, c, d = words
    ab, cd = ([ops.permute(*p, s) for s in (0x5140, 0x7362)] for p in ((a, b), (c, d)))
    return [
        ops.permute(x, y, s)
        for x, y in zip(ab, cd, strict=True)
        for s in (0x5410, 0x7632)
    ]


def codes_address(half: int, lane: Integer, wg: Integer) -> Integer:
    """Where a consumer's lane finds its four words of codes of a step.

    Word 2 r + h is of its row r; byte i of it, columns 8 (4 h + i) + 2 q and the next.
    """
    slot = slot_address(lane >> 5, lane >> 2 & 7, lane & 3, half)
    return wg * _CONSUMER_BYTES + slot


def scale_loads(forward: bool, half: int, lane: Integer, wg: Integer) -> list:
    """Address and number of words of a consumer's loads of scales of a step.

    Forward, a pair for each row of the lane; backward, one for each of eight columns.
    """
    if forward:
        return [((wg * 64 + feature(lane)) * 4 + half * LANES * 4, 2)]
    base = wg * (LANES * 4) + (lane & 3) * 32 + half * 128
    return [(base, 4), (base + 16, 4)]


def tail_source(lane: Integer, wg: Integer) -> tuple[Integer, list[int]]:
    """What a consumer's lane reads of 128 rows of an addend's u, a step of columns.

    Returns:
        The first of its two rows; where its pairs of a row begin, in numbers, but for
        2 q of its lane 4 g + q.
    """
    return wg * 64 + feature(lane), list(range(0, STEP, 8))


def look_up(ops, decoders, words) -> list:
    """The pairs of numbers of a lane's words of codes, before they are scaled.

    Pair 8 r + i is of the lane's row r and of columns 8 i + 2 q and the next.

    Args:
        ops: the lane's table and arithmetic.
        decoders: `Table` or `Permute` for each of the four words of a step.
        words: at `codes_address`.
    """
    words = zip(words, decoders, strict=True)
    return [pair for word, decoder in words for pair in decoder(ops, word)]


def scale_pairs(ops, forward: bool, pairs, scales):
    """Yields row, column of eight and pair of numbers of a lane's first operand.

    Args:
        ops: the lane's arithmetic.
        forward: the pass.
        pairs: what `look_up` returns.
        scales: at `scale_loads`.
    """
    for i, pair in enumerate(pairs):
        row, column = divmod(i, STEP // 8)
        scale = scales[row if forward else column]
        yield row, column, ops.multiply_pair(pair, scale)


class Table:
    """Decodes a byte of two codes by a load from a table of all pairs."""

    def __call__(self, ops, word):
        """The pairs of numbers of four bytes."""
        return [ops.look_up(word, i) for i in range(4)]


class Permute:
    """Decodes by byte permutes, from registers alone (`decode.decode_word`)."""

    def __init__(self, codebook: tuple[float, ...], dtype: str):
        self._bytes = decode.byte_table(codebook, dtype)

    def __call__(self, ops, word):
        """The pairs of numbers of four bytes."""
        low, high = ([ops.constant(x) for x in part] for part in self._bytes)
        return decode.decode_word(ops, word, (low, high))


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

    def __lshift__(self, x):
        return Word(arith.shli(self.value, _raw(x)))

    def minimum(self, x: int):
        """The smaller of the two."""
        return Word(arith.minui(self.value, _raw(x)))


class LaneOps:
    """A lane's table, and what Python has no operator for.

    Args:
        dtype: of the numbers.
        table: ref of the table of pairs.
    """

    def __init__(self, dtype: str, table=None):
        self._ops = decode.LaneOps(dtype)
        self._table = None if table is None else address(table)

    def look_up(self, word, byte: int):
        """The pair of numbers of a byte, from this lane's copy of the table."""
        shift = _TABLE_SHIFT - 8 * byte
        row = word << shift if shift > 0 else word >> -shift
        # in one instruction, which the compiler must not take apart: the table's
        # address is then part of the load
        mask, own = 255 * TABLE_ROW, (lane_index() & 31) * 4
        (offset,) = _asm(
            f"lop3.b32 $0, $1, {mask}, $2, 0xEA;", "=r,r,r", row, own, pure=True
        )
        return load("shared.b32", self._table + offset)[0]

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


def row_address(ref, row: Word, row_bytes: int, byte: Word):
    """64-bit address of a byte of a row of a ref in global memory."""
    i64 = ir.IntegerType.get_signless(64)
    row64, byte64 = (arith.extui(i64, x.value) for x in (row, byte))
    offset = arith.addi(arith.muli(row64, mgpu_utils.c(row_bytes, i64)), byte64)
    base = llvm.ptrtoint(i64, mgpu_utils.memref_ptr(ref))
    return arith.addi(base, offset)


def load(kind: str, where, offset: int = 0) -> list:
    """Loads 32-bit registers: Words, or float32 values where `kind` ends in f32."""
    count = int(kind.split(".v")[1][0]) if ".v" in kind else 1
    names = ", ".join(f"${i}" for i in range(count))
    names = f"{{{names}}}" if count > 1 else names
    letter = "=f" if kind.endswith("f32") else "=r"
    shared = kind.startswith("shared")
    constraints = [letter] * count + ["r" if shared else "l"]
    text = f"ld.{kind} {names}, [${count} + {offset}];"
    return _asm(text, ",".join(constraints), where)


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


def store_global(kind: str, where, offset: int, values) -> None:
    """Stores float32 values to global memory."""
    names = ", ".join(f"${i + 1}" for i in range(len(values)))
    text = f"st.global.{kind} [$0 + {offset}], {{{names}}};"
    _asm(text, ",".join(["l"] + ["f"] * len(values)), where, *values)


def prefetch(where) -> None:
    """Asks the second-level cache for the line of an address in global memory."""
    _asm("prefetch.global.L2 [$0];", "l", where)


def part_address(parts, part: Word, wg: Word, lane: Word):
    """Where a lane's first four numbers of a consumer's part of a tile are.

    The next four are LANES x 16 bytes on. A row of `parts` is of both consumers.
    """
    row_bytes = ir.MemRefType(parts.type).shape[1] * 4
    return row_address(parts, part, row_bytes, wg * (row_bytes // 2) + lane * 16)


def arrive(counter, lane: Word) -> None:
    """Adds 1 to a counter when what all lanes of the warp stored can be read."""
    text = """{
        .reg .pred first;
        setp.eq.u32 first, $1, 0;
        fence.acq_rel.gpu;
        bar.warp.sync 0xffffffff;
        @first red.relaxed.gpu.global.add.u32 [$0], 1;
    }"""
    _asm(text, "l,r", counter, lane & 31)


def wait(counter, lane: Word, count: Word) -> None:
    """Waits until so many came, and takes them off the counter."""
    text = """{
        .reg .pred more, reset; .reg .b32 now;
        AGAIN:
        ld.acquire.gpu.global.b32 now, [$0];
        setp.lt.u32 more, now, $2;
        @more bra AGAIN;
        bar.warp.sync 0xffffffff;
        setp.eq.u32 reset, $1, 0;
        setp.gt.and.u32 reset, $2, 0, reset;
        @reset st.relaxed.gpu.global.b32 [$0], 0;
    }"""
    _asm(text, "l,r,r", counter, lane & 31, count)


def meet(counter, lane: Word, count: Word) -> None:
    """Waits until so many came. Who leaves last takes all off the counter."""
    text = """{
        .reg .pred more, last; .reg .b32 now, all;
        AGAIN:
        ld.acquire.gpu.global.b32 now, [$0];
        setp.lt.u32 more, now, $2;
        @more bra AGAIN;
        bar.warp.sync 0xffffffff;
        setp.eq.u32 last, $1, 0;
        @last atom.relaxed.gpu.global.add.u32 now, [$0], 1;
        add.u32 all, $2, $2;
        sub.u32 all, all, 1;
        setp.eq.and.u32 last, now, all, last;
        @last st.relaxed.gpu.global.b32 [$0], 0;
    }"""
    _asm(text, "l,r,r", counter, lane & 31, count)


def at_least(a: Word, b: Word) -> Word:
    """1 where a >= b, else 0."""
    return Word(
        arith.extui(_i32(), arith.cmpi(arith.CmpIPredicate.uge, a.value, b.value))
    )


def vector(values):
    """A vector of float32 values."""
    out = llvm.mlir_undef(ir.VectorType.get((len(values),), ir.F32Type.get()))
    for i, value in enumerate(values):
        out = llvm.insertelement(out, value, _constant(i))
    return out


def loop(stop: Word, body, carry: list) -> list:
    """`for i in range(stop): carry = body(i, carry)`."""
    op = scf.ForOp(_constant(0), stop.value, _constant(1), carry)
    with ir.InsertionPoint(op.body):
        scf.YieldOp(body(Word(op.induction_variable), list(op.inner_iter_args)))
    return list(op.results)


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


def elements(vector) -> list:
    """The numbers of a vector: Words, or float32 values."""
    kind = ir.VectorType(vector.type)
    values = [llvm.extractelement(vector, _constant(i)) for i in range(kind.shape[0])]
    return (
        values if isinstance(kind.element_type, ir.F32Type) else list(map(Word, values))
    )


def registers(array: mgpu.FragmentedArray) -> list:
    """The values a lane holds of an array strided over the warpgroup."""
    (vector,) = array.registers.flat
    return elements(vector)


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

"""What a thread does to quantize a weight: codes and float32 scales, one pass.

A thread takes eight neighbouring numbers at once, a piece; a warp takes tiles of
several pieces a lane, and asks for its next tile before it works on this one. The first
tile is asked for before the table is copied to shared memory.

The absmax of a block is found by shuffles between its lanes, those of two pieces at
once in the halves of a register where the numbers have 16 bits. The nearest code is
that of `nearest.even_cells`, whose cell is in the bits of a sum rounded down.
"""

import itertools
from typing import Any

import jax.numpy as jnp

from pallas_kernels import emit
from pallas_kernels.nearest import EVEN_CELLS
from pallas_kernels.packed import PackedSpec
from pallas_kernels.words import widen

THREADS = 256
BLOCKS_OF_THREADS = 132 * 4  # four share a multiprocessor, by their registers
UNROLL = 2  # pieces of a lane in a tile
PIECE = 8  # numbers of a piece
TABLE_BYTES = EVEN_CELLS * 128


def smem_bytes() -> int:
    """Shared memory of a block of threads: the table, and a sum of each warp."""
    return TABLE_BYTES + THREADS // 32 * 4


class Quantize:
    """Emits the kernel, for one thread.

    Args:
        spec: what is written.
        dtype: of the weight.
        refs: "w", "table", "codes", "absmax" and "smem"; with "sums", the sum of the
            scales that a block of threads writes goes there.
    """

    def __init__(self, spec: PackedSpec, dtype, refs: dict[str, Any]):
        self.spec, self.refs = spec, refs
        self.bits = jnp.dtype(dtype).itemsize * 8
        self.half = "bf16" if dtype == jnp.bfloat16 else "f16"
        self.tid = emit.thread_index()
        self.lane = self.tid % 32
        self.pieces = spec.n * spec.k // PIECE
        self.lanes = spec.block_size // PIECE  # of a block of numbers

    def build(self):
        """Emits everything."""
        self.table = emit.address(self.refs["smem"])
        warps = THREADS // 32
        tile = emit.block_index() * warps + self.tid // 32
        step = BLOCKS_OF_THREADS * warps
        tiles = -(-self.pieces // (32 * UNROLL))
        carry = [emit.zero(), *self.load(tile)]
        self.copy_table()
        emit.barrier()

        def body(i, carry):
            total, *words = carry
            following = self.load(i + step)
            return [self.finish(i, words, total), *following]

        total, *_ = emit.loop(tile, emit.const(tiles), emit.const(step), carry, body)
        if "sums" in self.refs:
            self.write_sum(total)

    def copy_table(self):
        """Spreads the table over shared memory: 16 copies of an entry in a row."""
        for start in range(0, EVEN_CELLS * 8, THREADS):
            index = self.tid + start
            source = emit.address(self.refs["table"]) + (index // 8 * 8).wide()
            entry = emit.ptx(
                "ld.global.nc.v2.b32 {$0, $1}, [$2];", source.value, out="rr"
            )
            emit.ptx(
                "st.shared.v4.b32 [$0], {$1, $2, $1, $2};",
                (self.table + index * 16).value,
                *entry,
            )

    def piece(self, tile: emit.Int, j: int) -> emit.Int:
        """Which piece is the lane's j-th of a tile."""
        return tile * (32 * UNROLL) + self.lane + 32 * j

    def load(self, tile: emit.Int) -> list:
        """The numbers of a tile, as words; zeros past the end."""
        words = []
        for j in range(UNROLL):
            piece = self.piece(tile, j)
            w = emit.address(self.refs["w"]) + piece.wide() * (PIECE * self.bits // 8)
            for i in range(self.bits // 16):
                words += emit.ptx(
                    "{.reg .pred p; setp.ne.b32 p, $5, 0; mov.b32 $0, 0; "
                    "mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0; "
                    "@p ld.global.nc.L1::no_allocate.v4.b32 "
                    f"{{$0, $1, $2, $3}}, [$4 + {16 * i}];}}",
                    w.value,
                    emit.bit(piece < self.pieces),
                    out="rrrr",
                )
        return words

    def finish(self, tile: emit.Int, words: list, total):
        """Codes and scales of a tile; returns `total` and the scales written."""
        pieces = [list(p) for p in itertools.batched(words, len(words) // UNROLL)]
        if self.bits == 32:
            absmaxes = [self.absmax(words) for words in pieces]
        else:
            absmaxes = [
                a
                for pair in itertools.batched(pieces, 2)
                for a in self.absmaxes_of_pair(*pair)
            ]
        # `.cs`: what is written is not read again by this kernel.
        store = "{.reg .pred p; setp.ne.b32 p, $2, 0; @p st.global.cs.b32 [$0], $1;}"
        # A block's lanes have its absmax all: the j-th writes that of the j-th piece,
        # and finds its inverse for the others.
        group = min(self.lanes, UNROLL)
        turn = self.lane % self.lanes
        for first in range(0, UNROLL, group):
            mine = absmaxes[first]
            for j in range(1, group):
                mine = emit.pick(turn == j, absmaxes[first + j], mine)
            inverse = self.inverse(mine)
            for j in range(group):
                piece = self.piece(tile, first + j)
                codes = emit.address(self.refs["codes"]) + piece.wide() * 4
                word = self.encode(pieces[first + j], self.from_lane(inverse, j))
                emit.ptx(store, codes.value, word, emit.bit(piece < self.pieces))
                # Keeps the assembler from doing several pieces at once: registers.
                emit.ptx("bar.warp.sync -1;")
            piece = self.piece(tile, first) + turn * 32
            writes = emit.both(turn < group, piece < self.pieces)
            place = emit.address(self.refs["absmax"]) + (piece // self.lanes).wide() * 4
            emit.ptx(store, place.value, emit.to_bits(mine), emit.bit(writes))
            total = emit.ptx(
                "{.reg .pred p; setp.ne.b32 p, $3, 0; mov.f32 $0, $1; "
                "@p add.rn.f32 $0, $1, $2;}",
                total,
                mine,
                emit.bit(writes),
                out="f",
                pure=True,
            )
        return total

    def from_lane(self, value, j: int):
        """What the j-th lane of a block of numbers has."""
        if self.lanes == 1:
            return value
        segment = (32 - self.lanes) << 8 | 31
        text = f"shfl.sync.idx.b32 $0, $1, {j}, {segment}, -1;"
        return emit.ptx(text, value, out="f")

    def among_lanes(self, value, kind: str, out: str):
        """The largest of the lanes of a block of numbers."""
        distance = 1
        while distance < self.lanes:
            value = emit.ptx(
                f"{{.reg .b32 o; shfl.sync.bfly.b32 o, $1, {distance}, 31, -1; "
                f"max.{kind} $0, $1, o;}}",
                value,
                out=out,
            )
            distance *= 2
        return value

    def absmax(self, words: list):
        """Of a piece of float32 numbers."""
        numbers = [emit.from_bits(word) for word in words]
        absmax = emit.ptx("abs.f32 $0, $1;", numbers[0], out="f", pure=True)
        for number in numbers[1:]:
            absmax = emit.ptx(
                "{.reg .f32 a; abs.f32 a, $2; max.f32 $0, $1, a;}",
                absmax,
                number,
                out="f",
                pure=True,
            )
        return self.among_lanes(absmax, "f32", "f")

    def absmaxes_of_pair(self, *pieces: list) -> list:
        """Of two pieces of 16-bit numbers."""
        # The larger magnitude of two, under whatever sign.
        largest = f"max.xorsign.abs.{self.half}x2"
        found = [
            emit.ptx(
                f"{{.reg .b32 a, b; {largest} a, $1, $2; {largest} b, $3, $4; "
                f"{largest} $0, a, b;}}",
                *words,
                out="r",
                pure=True,
            )
            for words in pieces
        ]
        both = emit.ptx(
            "{.reg .b32 a, b; prmt.b32 a, $1, $2, 0x5410; prmt.b32 b, $1, $2, 0x7632; "
            f"{largest} a, a, b; and.b32 $0, a, 0x7fff7fff;}}",
            *found,
            out="r",
            pure=True,
        )
        return widen([self.among_lanes(both, f"{self.half}x2", "r")], self.half)

    def inverse(self, absmax):
        """1 / absmax, or 0 for a block of zeros."""
        return emit.ptx(
            "{.reg .pred p; setp.lt.f32 p, $1, 0f00800000; rcp.rn.f32 $0, $1; "
            "@p mov.f32 $0, 0f00000000;}",
            absmax,
            out="f",
            pure=True,
        )

    def encode(self, words: list, inverse):
        """A word of eight codes."""
        # Half of the lanes look at the same copy, in another half-warp's turn.
        copy = (self.lane % 16 * 8).value
        halves = [emit.const(0).value] * 2
        for i, number in enumerate(
            widen(words, self.half if self.bits == 16 else None)
        ):
            # Even columns in the high halves of bytes.
            mask = 15 << (8 * (i // 2 % 2) + 4 * (1 - i % 2))
            halves[i // 4] = emit.ptx(
                "{.reg .f32 x, f, m; .reg .b32 a, c; .reg .pred p; "
                "mul.rn.f32 x, $1, $2; fma.rm.f32 f, x, 0f46800000, 0f4B004000; "
                "mov.b32 a, f; and.b32 a, a, 32640; or.b32 a, a, $3; "
                "add.u32 a, a, $4; ld.shared.v2.b32 {c, a}, [a]; mov.b32 m, c; "
                "setp.gt.f32 p, x, m; @p shr.u32 a, a, 16; "
                f"lop3.b32 $0, a, {mask}, $5, 0xEA;}}",  # a & mask | $5
                number,
                inverse,
                copy,
                self.table.value,
                halves[i // 4],
                out="r",
            )
        return emit.ptx("prmt.b32 $0, $1, $2, 0x5410;", *halves, out="r", pure=True)

    def write_sum(self, total):
        """Adds what the threads have, always in the same order."""
        sums = self.table + TABLE_BYTES
        warps = THREADS // 32
        total = add_lanes(total, 32)
        store = "{.reg .pred p; setp.ne.b32 p, $2, 0; @p st.%s.b32 [$0], $1;}"
        place = sums + self.tid // 32 * 4
        emit.ptx(
            store % "shared",
            place.value,
            emit.to_bits(total),
            emit.bit(self.lane == 0),
        )
        emit.barrier()
        place = sums + self.lane % warps * 4
        total = emit.ptx("ld.shared.f32 $0, [$1];", place.value, out="f")
        total = add_lanes(total, warps)
        place = emit.address(self.refs["sums"]) + (emit.block_index() * 4).wide()
        emit.ptx(
            store % "global",
            place.value,
            emit.to_bits(total),
            emit.bit(self.tid == 0),
        )


def add_lanes(value, lanes: int):
    """The sum over so many lanes, a power of two, in each of them."""
    distance = 1
    while distance < lanes:
        value = emit.ptx(
            f"{{.reg .b32 o; shfl.sync.bfly.b32 o, $1, {distance}, 31, -1; "
            "add.rn.f32 $0, $1, o;}",
            value,
            out="f",
        )
        distance *= 2
    return value

"""What a thread does for the backward of an MLP's gate.

A stream: a thread reads the same eight numbers of gate, up and the gradient, several
such pieces in flight, and writes three results where it read them. Numbers are 16 bits
in memory and float32 in between; each result is rounded once.
"""

import itertools
from typing import Any

from pallas_kernels import emit
from pallas_kernels.stream import stream
from pallas_kernels.words import half_of, narrow, widen

THREADS = 256
BLOCKS_A_MULTIPROCESSOR = 4
UNROLL = 2  # pieces of a thread in flight
PIECE = 8  # numbers of a piece, 16 bytes
# Read, and written: silu(gate) * up over the gradient.
ARRAYS = ("gate", "up", "d")
_MINUS_LOG2_E, _ONE, _MINUS_ONE = "0fBFB8AA3B", "0f3F800000", "0fBF800000"


class GateBackward:
    """Emits the kernel, for one thread.

    Args:
        size: numbers of each array, a multiple of `PIECE`.
        dtype: of the arrays, bfloat16 or float16.
        grid: blocks of threads.
        refs: the arrays, by the names in `ARRAYS`.
    """

    def __init__(self, size: int, dtype, grid: int, refs: dict[str, Any]):
        self.pieces, self.grid = size // PIECE, grid
        self.half = half_of(dtype)
        self.arrays = [emit.address(refs[name]) for name in ARRAYS]

    def build(self):
        """Goes through the pieces, several at once."""
        first = emit.block_index() * THREADS + emit.thread_index()
        stride = self.grid * THREADS
        stream(first, self.pieces, stride, UNROLL, self.load, self.finish)

    def load(self, piece: emit.Int, valid) -> list:
        """Where the piece lies in each array, and its four words."""
        at = [start + piece.wide() * 16 for start in self.arrays]
        return [(where, self.read(where, valid)) for where in at]

    def finish(self, piece: emit.Int, valid, loaded: list):
        """Writes the results over what they are computed from."""
        del piece
        places, words = zip(*loaded, strict=True)
        numbers = zip(*(widen([*one], self.half) for one in words), strict=True)
        results = zip(*itertools.starmap(self.one, numbers), strict=True)
        for where, result in zip(places, results, strict=True):
            self.write(where, valid, narrow([*result], self.half))

    def read(self, where: emit.Int, valid) -> list:
        """Four words of two numbers."""
        return list(
            emit.ptx(
                "{.reg .pred p; setp.ne.b32 p, $5, 0; mov.b32 $0, 0; mov.b32 $1, 0; "
                "mov.b32 $2, 0; mov.b32 $3, 0; "
                "@p ld.global.L1::no_allocate.v4.b32 {$0, $1, $2, $3}, [$4];}",
                where.value,
                valid,
                out="rrrr",
            )
        )

    def write(self, where: emit.Int, valid, words: list):
        """The inverse of `read`."""
        emit.ptx(
            "{.reg .pred p; setp.ne.b32 p, $5, 0; "
            "@p st.global.v4.b32 [$0], {$1, $2, $3, $4};}",
            where.value,
            *words,
            valid,
        )

    def one(self, gate, up, d) -> tuple:
        """The gradients of gate and up, and silu(gate) · up, of one number.

        With s = 1 / (1 + exp(-gate)) and h = gate · s they are
        d · up · (s + h (1 - s)), d · h and h · up.
        """
        return emit.ptx(
            "{.reg .f32 s, h, t; "
            f"mul.rn.f32 t, $3, {_MINUS_LOG2_E}; ex2.approx.ftz.f32 t, t; "
            f"add.rn.f32 t, t, {_ONE}; rcp.approx.ftz.f32 s, t; "
            f"mul.rn.f32 h, $3, s; fma.rn.f32 t, s, {_MINUS_ONE}, {_ONE}; "
            "fma.rn.f32 t, h, t, s; mul.rn.f32 t, t, $4; mul.rn.f32 $0, t, $5; "
            "mul.rn.f32 $1, h, $5; mul.rn.f32 $2, h, $4;}",
            gate,
            up,
            d,
            out="fff",
            pure=True,
        )

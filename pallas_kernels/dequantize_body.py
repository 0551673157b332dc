"""What a thread does to dequantize a weight.

A stream: a thread takes a word of eight codes, several in flight, and a warp's words
lie side by side. Each code is looked up in a float32 table in shared memory, one copy a
lane (entry `c` of lane `l` at byte `128 c + 4 l`: no bank conflicts), multiplied by
the block's scale and rounded once. A double-quantized scale takes its two roundings.
"""

from typing import Any

import jax.numpy as jnp

from pallas_kernels import emit
from pallas_kernels.packed import PackedSpec
from pallas_kernels.stream import stream
from pallas_kernels.words import half_of, narrow

THREADS = 256
BLOCKS_OF_THREADS = 132 * 8
UNROLL = 4  # words of a thread in flight
PIECE = 8  # numbers of a word
TABLE_BYTES = 16 * 128


def smem_bytes(spec: PackedSpec) -> int:
    """Shared memory of a block of threads: the codebook, and that of the scales."""
    return TABLE_BYTES + (0 if spec.nested_codebook is None else 256 * 4)


class Dequantize:
    """Emits the kernel, for one thread.

    Args:
        spec: what is read.
        dtype: of the result.
        refs: the leaves of a packed weight that there are, by name; "table", the
            codebook and that of the scales, "y" and "smem".
    """

    def __init__(self, spec: PackedSpec, dtype, refs: dict[str, Any]):
        self.spec, self.refs = spec, refs
        self.bits = jnp.dtype(dtype).itemsize * 8
        self.half = half_of(dtype)
        self.tid = emit.thread_index()
        self.lane = self.tid % 32
        self.pieces = spec.n * spec.k // PIECE

    def build(self):
        """Emits everything."""
        refs, spec = self.refs, self.spec
        layer = emit.const(0)
        if "layer" in refs:
            pointer = emit.address(refs["layer"])
            layer = emit.Int(
                emit.ptx("ld.global.b32 $0, [$1];", pointer.value, out="r")
            )
        layer = layer.wide()
        nested = spec.nested_codebook is not None
        self.codes = emit.address(refs["codes"]) + layer * (spec.n * spec.k // 2)
        self.absmax = emit.address(refs["absmax"]) + layer * (
            spec.num_blocks * (1 if nested else 4)
        )
        self.table = emit.address(refs["smem"])
        self.copy_table()
        if nested:
            num_nested = -(-spec.num_blocks // spec.nested_block_size)
            self.nested = emit.address(refs["nested_absmax"]) + layer * (4 * num_nested)
            pointer = emit.address(refs["offset"]) + layer * 4
            self.offset = emit.ptx("ld.global.nc.f32 $0, [$1];", pointer.value, out="f")
            self.scale_table = self.table + TABLE_BYTES
            source = emit.address(refs["table"]) + 64 + self.tid.wide() * 4
            number = emit.ptx("ld.global.nc.b32 $0, [$1];", source.value, out="r")
            place = self.scale_table + self.tid * 4
            emit.ptx("st.shared.b32 [$0], $1;", place.value, number)
        emit.barrier()
        self.run()

    def copy_table(self):
        """Copies the codebook to shared memory: a copy of each number a lane."""
        for start in range(0, 16 * 32, THREADS):
            index = self.tid + start
            source = emit.address(self.refs["table"]) + (index // 32 * 4).wide()
            number = emit.ptx("ld.global.nc.b32 $0, [$1];", source.value, out="r")
            place = self.table + index * 4
            emit.ptx("st.shared.b32 [$0], $1;", place.value, number)

    def run(self):
        """Goes through the pieces, several at once."""
        first = emit.block_index() * THREADS + self.tid
        stride = BLOCKS_OF_THREADS * THREADS
        stream(first, self.pieces, stride, UNROLL, self.load, self.finish)

    def load(self, piece: emit.Int, valid):
        """A word of codes, and what its scale is made of."""
        spec = self.spec
        load = (
            "{.reg .pred p; setp.ne.b32 p, $2, 0; mov.b32 $0, 0; "
            "@p ld.global.nc.%s $0, [$1];}"
        )

        def read(kind, pointer, out="r"):
            return emit.ptx(load % kind, pointer.value, valid, out=out)

        word = read("L1::no_allocate.b32", self.codes + piece.wide() * 4)
        block = piece // (spec.block_size // PIECE)
        if spec.nested_codebook is None:
            return word, read("f32", self.absmax + block.wide() * 4, "f"), None
        code = read("u8", self.absmax + block.wide())
        pointer = self.nested + (block // spec.nested_block_size).wide() * 4
        return word, code, read("f32", pointer, "f")

    def finish(self, piece: emit.Int, valid, values):
        """Looks up, scales, rounds and writes eight numbers."""
        word, scale, nested = values
        if nested is not None:
            scale = emit.ptx(
                "{.reg .b32 a; .reg .f32 v; mad.lo.u32 a, $1, 4, $2; "
                "ld.shared.f32 v, [a]; mul.rn.f32 v, v, $3; add.rn.f32 $0, v, $4;}",
                scale,
                self.scale_table.value,
                nested,
                self.offset,
                out="f",
            )
        lane = (self.table + self.lane * 4).value
        numbers = []
        for i in range(PIECE):
            shift = 8 * (i // 2) + 4 * (1 - i % 2)  # even columns in the high halves
            numbers.append(
                emit.ptx(
                    f"{{.reg .b32 a; bfe.u32 a, $1, {shift}, 4; "
                    "mad.lo.u32 a, a, 128, $2; ld.shared.f32 $0, [a]; "
                    "mul.rn.f32 $0, $0, $3;}",
                    word,
                    lane,
                    scale,
                    out="f",
                )
            )
        y = emit.address(self.refs["y"]) + piece.wide() * (PIECE * self.bits // 8)
        store = (
            "{.reg .pred p; setp.ne.b32 p, $5, 0; "
            "@p st.global.v4.b32 [$0%s], {$1, $2, $3, $4};}"
        )
        words = narrow(numbers, self.half)
        if self.bits == 32:
            emit.ptx(store % "", y.value, *words[:4], valid)
            emit.ptx(store % " + 16", y.value, *words[4:], valid)
        else:
            emit.ptx(store % "", y.value, *words, valid)

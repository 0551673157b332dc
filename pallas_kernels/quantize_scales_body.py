"""What a thread does to quantize the scales of a weight: double quantization.

    offset = mean(absmax)
    q, nested_absmax = quantize_blocks(absmax - offset, nested_codebook, 256)

The first pass leaves a sum of the scales a block of threads; each block of threads here
adds them up, in the same order. A warp takes a block of 256 scales. The nearest code is
that of `nearest.float_cells`.
"""

from typing import Any

import numpy as np

from pallas_kernels import emit
from pallas_kernels.nearest import FloatCells, float_cells
from pallas_kernels.packed import PackedSpec
from pallas_kernels.quantize_body import add_lanes

THREADS = 256
BLOCK_SIZE = 256
_EACH = BLOCK_SIZE // 32


def num_nested(spec: PackedSpec) -> int:
    """Blocks of scales."""
    return -(-spec.num_blocks // BLOCK_SIZE)


def smem_bytes(cells: FloatCells) -> int:
    """Shared memory of a block of threads: the table, and a sum of each warp."""
    return cells.entries.nbytes + THREADS // 32 * 4


class QuantizeScales:
    """Emits the kernel, for one thread.

    Args:
        spec: what is written.
        num_sums: how many sums the first pass left.
        refs: "absmax" and "sums", "table", "codes", "nested_absmax", "offset", "smem".
    """

    def __init__(self, spec: PackedSpec, num_sums: int, refs: dict[str, Any]):
        assert spec.nested_codebook is not None
        self.spec, self.num_sums, self.refs = spec, num_sums, refs
        self.cells = float_cells(spec.nested_codebook)
        self.tid = emit.thread_index()
        self.lane = self.tid % 32
        self.table = emit.address(refs["smem"])
        self.warp_sums = self.table + self.cells.entries.nbytes

    def build(self):
        """Emits everything."""
        warps = THREADS // 32
        block = emit.block_index() * warps + self.tid // 32
        places = [block * BLOCK_SIZE + self.lane + 32 * i for i in range(_EACH)]
        inside = [emit.bit(place < self.spec.num_blocks) for place in places]
        load = (
            "{.reg .pred p; setp.ne.b32 p, $2, 0; mov.f32 $0, 0f00000000; "
            "@p ld.global.nc.f32 $0, [$1];}"
        )
        absmax = emit.address(self.refs["absmax"])
        scales = [
            emit.ptx(load, (absmax + place.wide() * 4).value, valid, out="f")
            for place, valid in zip(places, inside, strict=True)
        ]
        self.copy_table()
        mean = self.mean(load)
        minus_mean = emit.ptx("mul.rn.f32 $0, $1, 0fBF800000;", mean, out="f")
        # What is past the end is 0 after the subtraction.
        numbers = [
            emit.ptx(
                "{.reg .pred p; setp.ne.b32 p, $3, 0; mov.f32 $0, 0f00000000; "
                "@p add.rn.f32 $0, $1, $2;}",
                scale,
                minus_mean,
                valid,
                out="f",
            )
            for scale, valid in zip(scales, inside, strict=True)
        ]
        nested = self.absmax(numbers)
        leads = emit.both(self.lane == 0, block < num_nested(self.spec))
        self.store("nested_absmax", block * 4, emit.to_bits(nested), emit.bit(leads))
        first = emit.both(self.tid == 0, emit.block_index() == 0)
        self.store("offset", emit.const(0), emit.to_bits(mean), emit.bit(first))
        inverse = emit.ptx(
            "{.reg .pred p; setp.lt.f32 p, $1, 0f00800000; rcp.rn.f32 $0, $1; "
            "@p mov.f32 $0, 0f00000000;}",
            nested,
            out="f",
        )
        for place, number, valid in zip(places, numbers, inside, strict=True):
            self.store("codes", place, self.encode(number, inverse), valid, bits=8)

    def store(self, name: str, offset: emit.Int, word, when, bits: int = 32):
        """Writes to one of the results, if `when`."""
        place = emit.address(self.refs[name]) + offset.wide()
        emit.ptx(
            f"{{.reg .pred p; setp.ne.b32 p, $2, 0; @p st.global.b{bits} [$0], $1;}}",
            place.value,
            word,
            when,
        )

    def copy_table(self):
        """Copies the table to shared memory."""
        entries = len(self.cells.entries)
        for start in range(0, entries, THREADS):
            index = (self.tid + start).min(entries - 1)
            source = emit.address(self.refs["table"]) + index.wide() * 8
            entry = emit.ptx(
                "ld.global.nc.v2.b32 {$0, $1}, [$2];", source.value, out="rr"
            )
            place = self.table + index * 8
            emit.ptx("st.shared.v2.b32 [$0], {$1, $2};", place.value, *entry)

    def mean(self, load: str):
        """Of all scales, from the sums that the first pass left."""
        sums = emit.address(self.refs["sums"])
        total = emit.zero()
        for start in range(0, self.num_sums, THREADS):
            index = self.tid + start
            valid = emit.bit(index < self.num_sums)
            part = emit.ptx(load, (sums + index.wide() * 4).value, valid, out="f")
            total = emit.ptx("add.rn.f32 $0, $1, $2;", total, part, out="f")
        total = add_lanes(total, 32)
        place = self.warp_sums + self.tid // 32 * 4
        emit.ptx(
            "{.reg .pred p; setp.ne.b32 p, $2, 0; @p st.shared.b32 [$0], $1;}",
            place.value,
            emit.to_bits(total),
            emit.bit(self.lane == 0),
        )
        emit.barrier()
        warps = THREADS // 32
        place = self.warp_sums + self.lane % warps * 4
        total = emit.ptx("ld.shared.f32 $0, [$1];", place.value, out="f")
        total = add_lanes(total, warps)
        count = int(np.float32(self.spec.num_blocks).view(np.uint32))
        return emit.ptx(f"div.rn.f32 $0, $1, 0f{count:08X};", total, out="f")

    def absmax(self, numbers: list):
        """Of the numbers of a warp."""
        absmax = emit.zero()
        for number in numbers:
            absmax = emit.ptx(
                "{.reg .f32 a; abs.f32 a, $2; max.f32 $0, $1, a;}",
                absmax,
                number,
                out="f",
            )
        for distance in (1, 2, 4, 8, 16):
            absmax = emit.ptx(
                f"{{.reg .f32 o; shfl.sync.bfly.b32 o, $1, {distance}, 31, -1; "
                "max.f32 $0, $1, o;}",
                absmax,
                out="f",
            )
        return absmax

    def encode(self, number, inverse):
        """The nearest code, in the low byte."""
        cells = self.cells
        base, last = cells.base, cells.cells - 1
        # A quotient that is no number is in the last cell.
        return emit.ptx(
            "{.reg .f32 x, m; .reg .b32 a, s, c; .reg .pred p; "
            "mul.rn.f32 x, $1, $2; mov.b32 s, x; and.b32 a, s, 0x7fffffff; "
            f"max.u32 a, a, {base}; sub.u32 a, a, {base}; shr.u32 a, a, {cells.shift}; "
            f"min.u32 a, a, {last}; shr.u32 s, s, 31; mad.lo.u32 a, s, {last + 1}, a; "
            "mad.lo.u32 a, a, 8, $3; ld.shared.v2.b32 {c, a}, [a]; mov.b32 m, c; "
            "setp.gt.f32 p, x, m; mov.b32 $0, a; @p shr.u32 $0, a, 8;}",
            number,
            inverse,
            self.table.value,
            out="r",
        )

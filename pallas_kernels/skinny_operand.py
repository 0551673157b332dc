"""The first operand in the kernel for tens of rows: codes and scales decoded."""

from typing import Any

from pallas_kernels import emit
from pallas_kernels.decode import byte_table, decode_word
from pallas_kernels.lookup import pairs_of
from pallas_kernels.matvec_plan import BLOCK, CHUNK_BYTES
from pallas_kernels.skinny_plan import STEPS
from pallas_kernels.skinny_thread import Thread


class Operand(Thread):
    """Decoding of a warp's 16 features, 64 columns in a step."""

    def write_table(self):
        """Writes what each byte stands for once a lane.

        Entry e of lane l is at byte 256 e + 4 l: a pair of numbers, and 128 bytes on
        what scales of that code are, if scales are quantized.
        """
        plan, ops = self.plan, emit.lane_ops(self.plan.dtype)
        low, high = (
            [emit.const(x).value for x in part]
            for part in byte_table(plan.codebook, plan.dtype)
        )
        for first in range(0, 256, plan.cut.workers):
            byte = self.tid + first
            words = [decode_word(ops, (byte % 256).value, (low, high))[0]]
            if plan.nested_block_size is not None:
                nested = emit.address(self.refs["nested_codebook"])
                nested = nested + (byte % 256).wide() * 4
                load = "ld.global.nc.b32 $0, [$1];"
                words.append(emit.ptx(load, nested.value, out="r"))
            mine = emit.bit(byte < 256)
            for i, word in enumerate(words):
                for j in range(8):
                    # Neighbouring lanes write to different banks.
                    place = (self.lane + j) % 8 * 16 + byte % 256 * 256
                    emit.ptx(
                        "{.reg .pred p; setp.ne.b32 p, $2, 0; @p "
                        f"st.shared.v4.b32 [$0+{128 * i}], {{$1, $1, $1, $1}};}}",
                        (self.table + place).value,
                        word,
                        mine,
                    )

    # Scales.

    def load_offset(self):
        """Reads what is added to all scales, if they are quantized."""
        if self.plan.nested_block_size is not None:
            pointer = emit.address(self.refs["offset"]) + self.layer.wide() * 4
            load = "ld.global.nc.f32 $0, [$1];"
            self.offset = emit.ptx(load, pointer.value, out="f")

    def load_scales(self, group: emit.Int) -> list:
        """Starts to read scales of this lane's rows, of one or several units.

        Returns:
            What memory holds of each row: the scale of block t of a unit, or its code
            and the scale of scales; of several units a word of codes, those of unit t.
        """
        plan, each = self.plan, self.plan.scale_units
        last = (self.end_unit - 1) // each
        unit = emit.select(group < last, group, last) * each
        block = unit % plan.chunks * STEPS + self.t * each
        block = block.min(plan.k // BLOCK - 1)
        first = unit // plan.chunks * plan.features + self.warp * 16 + self.row
        layer, words = self.layer.wide(), []
        for r in range(2):
            row = (first + 2 * r).min(plan.n - 1)
            index = (row * (plan.k // BLOCK) + block) // (plan.block_size // BLOCK)
            size = 4 if plan.nested_block_size is None else 1
            absmax = emit.address(self.refs["absmax"])
            absmax = absmax + layer * (size * plan.num_scales) + index.wide() * size
            if plan.nested_block_size is None:
                load = "ld.global.nc.f32 $0, [$1];"
                words.append(emit.ptx(load, absmax.value, out="f"))
                continue
            load = f"ld.global.nc.{'u8' if each == 1 else 'b32'} $0, [$1];"
            words.append(emit.ptx(load, absmax.value, out="r"))
            num_nested = -(-plan.num_scales // plan.nested_block_size)
            nested = emit.address(self.refs["nested_absmax"])
            nested = nested + layer * (4 * num_nested)
            nested = nested + (index // plan.nested_block_size).wide() * 4
            load = "ld.global.nc.f32 $0, [$1];"
            words.append(emit.ptx(load, nested.value, out="f"))
        return words

    def next_scales(self, words: list, unit: emit.Int) -> tuple[Any, list]:
        """The scales of a unit, and what was read of those after it."""
        each, zero, one = self.plan.scale_units, emit.const(0), emit.const(1)
        if each == 1:
            return self.decode_scales(words, unit), self.load_scales(unit + 1)

        ends = unit % each == 0
        # No register that is loaded is copied: a copy would wait for memory.
        choose = "{.reg .pred p; setp.ne.b32 p, $3, 0; selp.b32 $0, $1, $2, p;}"
        now, coming = words[:4], words[4:]
        now = [
            emit.ptx(choose, new, old, emit.bit(ends), out=kind)
            for new, old, kind in zip(coming, now, "rfrf", strict=True)
        ]
        coming = emit.loop(
            zero,
            emit.Int(emit.bit(ends)),
            one,
            coming,
            lambda *_: self.load_scales(unit // each + 1),
        )
        return self.decode_scales(now, unit), now + coming

    def decode_scales(self, words: list, unit: emit.Int):
        """The scales of two rows, in 16 bits: one register."""
        plan, ops = self.plan, emit.lane_ops(self.plan.dtype)
        if plan.nested_block_size is not None:
            table = (self.table + self.lane * 4).value
            codes = words[::2]
            if plan.scale_units > 1:
                source = (self.lane - self.t + unit % plan.scale_units).value
                selector = (self.t + 0x4440).value
                shuffle = "shfl.sync.idx.b32 $0, $1, $2, 31, -1;"
                codes = [
                    ops.permute(
                        emit.ptx(shuffle, word, source, out="r"),
                        emit.const(0).value,
                        selector,
                    )
                    for word in codes
                ]
            words = [
                emit.ptx(
                    "{.reg .b32 a; .reg .f32 v; mad.lo.u32 a, $1, 256, $3; "
                    "ld.shared.f32 v, [a+128]; fma.rn.f32 $0, v, $2, $4;}",
                    code,
                    nested,
                    table,
                    self.offset,
                    out="f",
                )
                for code, nested in zip(codes, words[1::2], strict=True)
            ]
        return ops.round_pair(*words)

    def scale_of(self, scales, step: int | emit.Int):
        """The scales of this lane's two rows in a step, in 16 bits: one register."""
        source = (self.lane - self.t + step).value
        return emit.ptx(
            "shfl.sync.idx.b32 $0, $1, $2, 31, -1;", scales, source, out="r"
        )

    # Codes.

    def find_codes(self):
        """Finds where in a slot this lane's 16 bytes of the first step are."""
        row, half = self.row + self.t % 2 * 2, self.t // 2
        place = (self.warp * 16 + row) * CHUNK_BYTES + (row % 8 ^ half) * 16
        self.codes = self.at["codes"] + place

    def load_codes(self, slot: emit.Int, step: int | emit.Int) -> list:
        """Four words: half a block of one of a quad's two rows."""
        address = (self.codes + slot * self.plan.slot_bytes) ^ step * 32  # swizzled
        return list(
            emit.ptx(
                "ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];", address.value, out="rrrr"
            )
        )

    def send(self, codes: list) -> list:
        """Gives the other lanes of a quad their bytes: lane t byte t of every word.

        A lane has words of row t % 2, half t // 2 of a block. It transposes 4 x 4
        bytes, in an order that depends on the lane, and sends three of the four words.
        """
        odd, high = self.t % 2 == 1, self.t // 2 == 1
        ops = emit.lane_ops(self.plan.dtype)

        def choose(condition, yes, no):
            return emit.select(condition, emit.const(yes), emit.const(no)).value

        near, far = choose(high, 0x7362, 0x5140), choose(high, 0x5140, 0x7362)
        mine, other = choose(odd, 0x7632, 0x5410), choose(odd, 0x5410, 0x7632)
        words = []
        for selector in (near, far):
            ab = ops.permute(codes[0], codes[1], selector)
            cd = ops.permute(codes[2], codes[3], selector)
            words += [ops.permute(ab, cd, last) for last in (mine, other)]
        for distance in (1, 2, 3):
            words[distance] = emit.ptx(
                f"shfl.sync.bfly.b32 $0, $1, {distance}, 31, -1;",
                words[distance],
                out="r",
            )
        return words

    def receive(self, words: list) -> list:
        """Puts what came by `send` in order.

        Returns:
            Words of the first half of both rows, then of the second; four bytes each,
            one of each eight columns.
        """
        odd, high = self.t % 2 == 1, self.t // 2 == 1
        for condition, distance in ((odd, 1), (high, 2)):
            words = [
                emit.pick(condition, words[i ^ distance], words[i]) for i in range(4)
            ]
        return words

    def decode(self, word) -> list:
        """Four bytes of codes to four pairs of numbers."""
        return pairs_of(word, self.lane * 4, self.table)

    def operand(self, codes: list, scales) -> list:
        """The first operand of a step: 64 features by 64 columns of a warpgroup.

        Returns:
            Four registers for each 16 columns.
        """
        ops = emit.lane_ops(self.plan.dtype)
        registers: list = [None] * 16
        for r in range(2):
            scale = ops.permute(scales, scales, 0x3232 if r else 0x1010)
            for half in range(2):
                for i, pair in enumerate(self.decode(codes[r + 2 * half])):
                    at = 2 * (4 * half + i) + r
                    registers[at] = ops.multiply_pair(pair, scale)
        return registers

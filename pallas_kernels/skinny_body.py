"""What one thread of the kernel for tens of rows does; `skinny` tells why.

A warp of the last warpgroup brings x, another codes; the other warpgroups decode and
multiply, each its 64 features.
"""

from collections.abc import Callable
from typing import Any

from pallas_kernels import emit
from pallas_kernels.decode import byte_table, decode_word
from pallas_kernels.matvec_plan import BLOCK, CHUNK_BYTES
from pallas_kernels.skinny_plan import FEATURES, STEPS, SkinnyPlan

# Registers of a lane in wgmma's first operand of a step.
OPERAND = 16


class Body:
    """Emits the kernel of one plan, part by part, for one thread."""

    def __init__(self, plan: SkinnyPlan, ctx, refs: dict[str, Any]):
        self.plan, self.ctx, self.refs = plan, ctx, refs
        self.tid = emit.thread_index()
        self.lane = self.tid % 32
        # The same in all lanes, and the compiler may know it.
        warp = (self.tid // 32).value
        warp = emit.ptx("shfl.sync.idx.b32 $0, $1, 0, 31, -1;", warp, out="r")
        self.warp = emit.Int(warp)
        self.g, self.t = self.lane // 4, self.lane % 4
        # The first of this lane's two rows of 16; the other is two further.
        self.row = self.g // 4 * 8 + self.g % 2 * 4 + self.g // 2 % 2
        smem = emit.address(refs["smem"])
        self.at = {name: smem + at for name, at in plan.smem_offsets.items()}
        self.table = emit.address(refs["table_smem"])
        # The run of units of this block of threads.
        self.block = emit.block_index()
        self.first = self.block * plan.units // plan.grid
        self.end = (self.block + 1) * plan.units // plan.grid
        self.layer = emit.const(0)
        if "layer" in refs:
            pointer = emit.address(refs["layer"]).value
            self.layer = emit.Int(emit.ptx("ld.global.b32 $0, [$1];", pointer, out="r"))

    def run(self):
        """Emits everything."""
        # By warps, not threads: so the compiler knows that none of them divides, and
        # keeps addresses that all lanes share in uniform registers.
        works = self.warp < self.plan.cut.workers // 32
        emit.roles(works, self.multiply_all, self.bring_all)

    # Barriers.

    def wait(self, name: str, stage: emit.Int, parity: emit.Int):
        """Waits at a barrier of a stage."""
        emit.ptx(
            "{.reg .pred p; WAIT_${:uid}: "
            "mbarrier.try_wait.parity.shared::cta.b64 p, [$0], $1; "
            "@!p bra WAIT_${:uid};}",
            (self.at[name] + stage * 8).value,
            parity.value,
        )

    def arrive(self, name: str, stage: emit.Int, when):
        """Arrives at a barrier of a stage."""
        emit.ptx(
            "{.reg .pred p; setp.ne.b32 p, $1, 0; "
            "@p mbarrier.arrive.shared::cta.b64 _, [$0];}",
            (self.at[name] + stage * 8).value,
            emit.bit(when),
        )

    @staticmethod
    def turn(stage: emit.Int, parity: emit.Int, stages: int) -> list[emit.Int]:
        """The stage after this one, and the parity of its barriers."""
        wraps = stage == stages - 1
        return [
            emit.select(wraps, emit.const(0), stage + 1),
            parity ^ emit.Int(emit.bit(wraps)),
        ]

    # Who brings x and codes.

    def bring_all(self):
        """Gives registers away; then two warps copy, one of them x."""
        emit.ptx(f"setmaxnreg.dec.sync.aligned.u32 {self.plan.cut.registers[1]};")
        warp = self.plan.cut.workers // 32

        def others():
            emit.roles(self.warp == warp + 1, self.bring_codes, emit.barrier)

        emit.roles(self.warp == warp, self.bring_x, others)

    def bring_x(self):
        """Copies x, 64 columns of all rows after the other, into the ring of tiles."""
        plan = self.plan
        start = self.first % plan.chunks * STEPS

        def window(i: emit.Int):
            block = (start + i) % (plan.chunks * STEPS)
            return emit.const(0), emit.const(0), block * BLOCK, (plan.rows, BLOCK)

        steps = (self.end - self.first) * STEPS
        self.bring("x", plan.cut.stages, plan.x_bytes, steps, window)

    def bring_codes(self):
        """Copies codes, 256 columns of a tile's features after the other."""
        plan = self.plan

        def window(i: emit.Int):
            unit = self.first + i
            row = unit // plan.chunks * plan.features
            column = unit % plan.chunks * CHUNK_BYTES
            return self.layer, row, column, (plan.features, CHUNK_BYTES)

        units = self.end - self.first
        self.bring("codes", plan.cut.slots, plan.slot_bytes, units, window)

    def bring(
        self, name: str, stages: int, size: int, total: emit.Int, window: Callable
    ):
        """Keeps a ring full.

        Args:
            name: of the array, of the ring and of its barriers.
            stages: how many windows it has room for.
            size: bytes of each.
            total: how many there are.
            window: from its number, a window's layer, row, column and shape.
        """
        zero, one, leader = emit.const(0), emit.const(1), self.lane == 0
        # Announced by one thread, given back by each warp.
        warps = self.plan.cut.workers // 32
        for kind, count in (("full", 1), ("empty", warps)):
            for stage in range(stages):
                emit.ptx(
                    "{.reg .pred p; setp.eq.b32 p, $1, 0; @p "
                    f"mbarrier.init.shared::cta.b64 [$0+{8 * stage}], {count};}}",
                    self.at[f"{name} {kind}"].value,
                    self.lane.value,
                )
        emit.ptx("fence.mbarrier_init.release.cluster; fence.proxy.async.shared::cta;")

        def start(i: emit.Int, stage: emit.Int):
            barrier = self.at[f"{name} full"] + stage * 8
            emit.ptx(
                "{.reg .pred p; setp.ne.b32 p, $1, 0; @p "
                f"mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], {size};}}",
                barrier.value,
                emit.bit(leader),
            )
            layer, row, column, shape = window(i)
            target = self.at[name] + stage * size
            ref = self.refs[name]
            emit.tma_load(
                self.ctx, ref, layer, row, column, shape, target, barrier, leader
            )

        def first(i, state):
            start(i, i)
            return state

        def later(i, state):
            stage, parity = map(emit.Int, state)
            self.wait(f"{name} empty", stage, parity)
            start(i, stage)
            return [v.value for v in self.turn(stage, parity, stages)]

        early = total.min(stages)
        emit.loop(zero, early, one, [], first)
        emit.barrier()
        emit.loop(early, total, one, [zero.value, zero.value], later)

    # Those who multiply.

    def multiply_all(self):
        """Goes through the run of units of this block, tile after tile."""
        plan, cut = self.plan, self.plan.cut
        zero, one = emit.const(0), emit.const(1)
        scales = self.load_scales(self.first)
        if plan.nested_block_size is not None:
            pointer = emit.address(self.refs["offset"]) + self.layer.wide() * 4
            load = "ld.global.nc.f32 $0, [$1];"
            self.offset = emit.ptx(load, pointer.value, out="f")
        self.write_table()
        emit.barrier()
        emit.ptx(f"setmaxnreg.inc.sync.aligned.u32 {cut.registers[0]};")
        # Where this lane finds 16 bytes of each step: see `load_codes`.
        row, half = self.row + self.t % 2 * 2, self.t // 2
        place = (self.warp * 16 + row) * CHUNK_BYTES + (row % 8 ^ half) * 16
        self.codes = self.at["codes"] + place
        self.wait("codes full", zero, zero)
        codes = self.exchange(self.load_codes(zero, 0))
        first_tile = self.first // plan.chunks
        tiles = (self.end - 1) // plan.chunks - first_tile + 1

        def tile_body(i, state):
            tile = first_tile + i
            first = emit.select(i == 0, self.first, tile * plan.chunks)
            end = ((tile + 1) * plan.chunks).min(self.end)
            sums = [emit.zero()] * (plan.rows // 2)

            def unit_body(unit, state):
                return self.unit(unit, first, state)

            state = emit.loop(first, end, one, [*sums, *state], unit_body)
            sums, state = state[: len(sums)], state[len(sums) :]
            sums = emit.wgmma_wait(0, sums)
            self.give_back(emit.Int(state[0]), self.lane == 0)
            left = self.finish(tile, sums)
            return [*state[:4], left.value, *state[5:]]

        state = [v.value for v in (zero, zero, zero, zero, zero)]
        state += [zero.value] * OPERAND  # of no product
        emit.loop(zero, tiles, one, state + codes + scales, tile_body)

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

    def load_scales(self, unit: emit.Int) -> list:
        """Starts to read scales of this lane's rows, of block t of a unit.

        Returns:
            What memory holds: a scale, or its code and the scale of scales, a row.
        """
        plan = self.plan
        unit = emit.select(unit < self.end, unit, self.end - 1)
        block = (unit % plan.chunks * STEPS + self.t).min(plan.k // BLOCK - 1)
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
            load = "ld.global.nc.u8 $0, [$1];"
            words.append(emit.ptx(load, absmax.value, out="r"))
            num_nested = -(-plan.num_scales // plan.nested_block_size)
            nested = emit.address(self.refs["nested_absmax"])
            nested = nested + layer * (4 * num_nested)
            nested = nested + (index // plan.nested_block_size).wide() * 4
            load = "ld.global.nc.f32 $0, [$1];"
            words.append(emit.ptx(load, nested.value, out="f"))
        return words

    def decode_scales(self, words: list) -> list:
        """The scales of two rows, each as a pair of itself in 16 bits."""
        plan, ops = self.plan, emit.lane_ops(self.plan.dtype)
        if plan.nested_block_size is not None:
            table = (self.table + self.lane * 4).value
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
                for code, nested in (words[:2], words[2:])
            ]
        return [ops.round_pair(scale, scale) for scale in words]

    # Arithmetic.

    def load_codes(self, slot: emit.Int, step: int) -> list:
        """Four words: half a block of one of a quad's two rows."""
        address = (self.codes + slot * self.plan.slot_bytes) ^ 32 * step  # swizzled
        return list(
            emit.ptx(
                "ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];", address.value, out="rrrr"
            )
        )

    def exchange(self, codes: list) -> list:
        """Gives each lane of a quad its bytes: byte t of every word.

        A lane has words of row t % 2, half t // 2 of a block. It transposes 4 x 4
        bytes, in an order that depends on the lane, and sends three of the four words.

        Returns:
            Words of the first half of both rows, then of the second; four bytes each,
            one of each eight columns.
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
        for condition, distance in ((odd, 1), (high, 2)):
            words = [
                emit.pick(condition, words[i ^ distance], words[i]) for i in range(4)
            ]
        return words

    def decode(self, word) -> list:
        """Four bytes of codes to four pairs of numbers."""
        lookups = "".join(
            f"prmt.b32 a, $4, $5, {0x7604 + 16 * i}; add.u32 a, a, $6; "
            f"ld.shared.b32 ${i}, [a]; "
            for i in range(4)
        )
        lane, table = (self.lane * 4).value, self.table.value
        return list(
            emit.ptx("{.reg .b32 a; " + lookups + "}", word, lane, table, out="rrrr")
        )

    def operand(self, codes: list, scales: list, step: int) -> list:
        """The first operand of a step: 64 features by 64 columns of a warpgroup.

        Returns:
            Four registers for each 16 columns.
        """
        ops = emit.lane_ops(self.plan.dtype)
        registers: list = [None] * 16
        source = (self.lane - self.t + step).value
        for r in range(2):
            scale = emit.ptx(
                "shfl.sync.idx.b32 $0, $1, $2, 31, -1;", scales[r], source, out="r"
            )
            for half in range(2):
                for i, pair in enumerate(self.decode(codes[r + 2 * half])):
                    at = 2 * (4 * half + i) + r
                    registers[at] = ops.multiply_pair(pair, scale)
        return registers

    def unit(self, unit: emit.Int, first: emit.Int, state: list) -> list:
        """Multiplies 256 columns.

        Args:
            unit: which one.
            first: the first one of this block in the tile.
            state: sums; stage and parity of x, slot and parity of codes, what is to
                be announced, the first operand that may be in use, the lane's codes of
                the first step, and what was read of scales.
        """
        plan, cut = self.plan, self.plan.cut
        count = plan.rows // 2
        sums, state = state[:count], state[count:]
        stage, parity, slot, slot_parity, left = map(emit.Int, state[:5])
        used, state = state[5 : 5 + OPERAND], state[5 + OPERAND :]
        codes, words = state[:4], state[4:]
        leader, later = self.lane == 0, first < unit
        scales, words = self.decode_scales(words), self.load_scales(unit + 1)
        for step in range(STEPS):
            # The product of the step before is under way.
            a = self.operand(codes, scales, step)
            if step == STEPS - 1:
                emit.ptx("bar.warp.sync -1;")  # all lanes have read the slot
                self.arrive("codes empty", slot, leader)
                slot, slot_parity = self.turn(slot, slot_parity, cut.slots)
                self.wait_for_more(unit, slot, slot_parity)
                codes = self.load_codes(slot, 0)
            else:
                codes = self.load_codes(slot, step + 1)
            self.wait("x full", stage, parity)
            a = emit.wgmma_fence(a)
            tile = emit.tile_descriptor(self.at["x"] + stage * plan.x_bytes)
            adds = emit.Int(emit.bit(later)) if step == 0 else emit.const(1)
            for j in range(4):
                here = a[4 * j : 4 * j + 4]
                sums = emit.wgmma(plan.ptx_type, here, tile + 2 * j, sums, adds)
                adds = emit.const(1)
            emit.wgmma_commit()
            codes = self.exchange(codes)  # the tensor cores are busy
            emit.wgmma_wait(1, used)
            self.give_back(stage, emit.both(leader, later) if step == 0 else leader)
            used = a
            stage, parity = self.turn(stage, parity, cut.stages)
        left = self.announce(left)
        numbers = [v.value for v in (stage, parity, slot, slot_parity, left)]
        return [*sums, *numbers, *used, *codes, *words]

    def wait_for_more(self, unit: emit.Int, slot: emit.Int, parity: emit.Int):
        """Waits for the codes after a unit, if there are any."""

        def wait():
            self.wait("codes full", slot, parity)

        emit.branch(unit + 1 < self.end, wait, lambda: None)

    def give_back(self, stage: emit.Int, when):
        """Says that the tile of x before `stage` may be written over."""
        last = emit.const(self.plan.cut.stages - 1)
        before = emit.select(stage == 0, last, stage - 1)
        self.arrive("x empty", before, when)

    # The end of a tile.

    def counter(self, index: emit.Int) -> emit.Int:
        """Where it is counted who left a part, of a tile and a warp."""
        return emit.address(self.refs["counters"]) + index.wide() * 4

    def announce(self, left: emit.Int) -> emit.Int:
        """Says that the part of counter `left` - 1 can be read, if there is one."""

        def count():
            emit.ptx("fence.acq_rel.gpu;")
            emit.ptx("bar.warp.sync -1;")
            emit.ptx(
                "{.reg .pred p; setp.eq.b32 p, $1, 0; "
                "@p red.relaxed.gpu.global.add.u32 [$0], 1;}",
                self.counter(left - 1).value,
                self.lane.value,
            )

        emit.branch(emit.const(0) < left, count, lambda: None)
        return emit.const(0)

    def finish(self, tile: emit.Int, sums: list) -> emit.Int:
        """Writes sums of a tile to y, or leaves them to the block that began it.

        That block is the last to get to it.

        Returns:
            What is to be announced once memory has it, for `announce`.
        """
        plan = self.plan
        owner, last = plan.sharers(tile)
        index = tile * (plan.cut.workers // 32) + self.warp
        left = emit.select(owner < self.block, index + 1, emit.const(0))
        # If there is more to do, memory gets the time.
        more = (tile + 1) * plan.chunks < self.end

        def leave():
            where = self.part(self.block)
            for i in range(0, len(sums), 4):
                emit.ptx(
                    f"st.global.cg.v4.f32 [$0+{i * 512}], {{$1, $2, $3, $4}};",
                    where.value,
                    *sums[i : i + 4],
                )
            self.announce(emit.select(more, emit.const(0), left))

        def collect():
            others = last - owner
            counter = self.counter(index)
            emit.ptx(
                "{.reg .pred p; .reg .b32 n; COUNT_${:uid}: "
                "ld.acquire.gpu.global.b32 n, [$0]; setp.lt.u32 p, n, $1; "
                "@p bra COUNT_${:uid};}",
                counter.value,
                others.value,
            )
            emit.ptx("bar.warp.sync -1;")
            # As it was: the next call finds it so.
            emit.ptx(
                "{.reg .pred p; setp.eq.b32 p, $1, 0; @p st.global.b32 [$0], 0;}",
                counter.value,
                self.lane.value,
            )

            def add(i, sums):
                where, part = self.part(owner + 1 + i), []
                for j in range(0, len(sums), 4):
                    part += emit.ptx(
                        f"ld.global.cg.v4.f32 {{$0, $1, $2, $3}}, [$4+{j * 512}];",
                        where.value,
                        out="ffff",
                    )
                return [
                    emit.ptx("add.rn.f32 $0, $1, $2;", *pair, out="f")
                    for pair in zip(sums, part, strict=True)
                ]

            self.write(tile, emit.loop(emit.const(0), others, emit.const(1), sums, add))

        emit.branch(self.block == owner, collect, leave)
        return emit.select(more, left, emit.const(0))

    def part(self, block: emit.Int) -> emit.Int:
        """Where this lane's first four sums are in what a block leaves."""
        where = block.wide() * (4 * self.plan.part_floats)
        group = self.warp // 4 * (4 * FEATURES * self.plan.rows)
        lane = self.tid % 128 * 16
        return emit.address(self.refs["parts"]) + where + (group + lane).wide()

    def write(self, tile: emit.Int, sums: list):
        """Writes this lane's two neighbours of features of its rows of y.

        It has two, two apart, and swaps one with the lane that has those between.
        """
        plan, ops = self.plan, emit.lane_ops(self.plan.dtype)
        between = self.g // 2 % 2
        selector = emit.select(
            between == 0, emit.const(0x5410), emit.const(0x3276)
        ).value
        column = self.g // 4 * 8 + self.g % 2 * 4 + between * 2
        column = tile * plan.features + self.warp * 16 + column
        y = emit.address(self.refs["y"])
        y = y + (self.t * 2 * plan.n + column).wide() * 2
        for i in range(0, len(sums), 4):
            for e in range(2):
                row = 2 * i + e
                own = ops.round_pair(sums[i + e], sums[i + 2 + e])
                other = emit.ptx("shfl.sync.bfly.b32 $0, $1, 8, 31, -1;", own, out="r")
                emit.ptx(
                    "{.reg .pred p; setp.ne.b32 p, $2, 0; "
                    f"@p st.global.b32 [$0+{2 * row * plan.n}], $1;}}",
                    y.value,
                    ops.permute(own, other, selector),
                    emit.bit(emit.both(column < plan.n, self.t * 2 + row < plan.m)),
                )

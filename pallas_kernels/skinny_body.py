"""What one thread of the kernel for tens of rows does; `skinny` tells why.

The last warpgroup brings x; the others decode and multiply, each its 64 features.
"""

from typing import Any

from pallas_kernels import emit
from pallas_kernels.decode import byte_table, decode_word
from pallas_kernels.matvec_plan import BLOCK, CHUNK_BYTES
from pallas_kernels.skinny_plan import FEATURES, SLOT_BYTES, STEPS, SkinnyPlan


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
        smem = emit.address(refs["smem"])
        self.at = {name: smem + at for name, at in plan.smem_offsets.items()}
        self.table = emit.address(refs["table_smem"])
        self.ring = self.at["ring"] + self.warp * (plan.cut.slots * SLOT_BYTES)
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
        self.init_barriers()
        workers = self.plan.cut.workers
        emit.roles(self.tid < workers, self.multiply_all, self.bring_x)

    # Barriers.

    def init_barriers(self):
        """A tile of x is announced by one thread, given back by each warp."""
        stages, workers = self.plan.cut.stages, self.plan.cut.workers
        for name, count in (("full", 1), ("empty", workers // 32)):
            for stage in range(stages):
                emit.ptx(
                    "{.reg .pred p; setp.eq.b32 p, $1, 0; @p "
                    f"mbarrier.init.shared::cta.b64 [$0+{8 * stage}], {count};}}",
                    self.at[name].value,
                    self.tid.value,
                )
        emit.ptx("fence.mbarrier_init.release.cluster;")

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

    def next_stage(self, stage: emit.Int, parity: emit.Int) -> list[emit.Int]:
        """The stage after this one, and the parity of its barriers."""
        wraps = stage == self.plan.cut.stages - 1
        return [
            emit.select(wraps, emit.const(0), stage + 1),
            parity ^ emit.Int(emit.bit(wraps)),
        ]

    # Who brings x.

    def bring_x(self):
        """Copies x, 64 columns of all rows after the other, into the ring of tiles."""
        plan, cut = self.plan, self.plan.cut
        zero, one = emit.const(0), emit.const(1)
        emit.barrier()
        emit.ptx(f"setmaxnreg.dec.sync.aligned.u32 {cut.registers[1]};")
        row_steps = plan.chunks * STEPS
        steps = (self.end - self.first) * STEPS

        def step(i, state):
            del i
            stage, parity, block = map(emit.Int, state)
            self.wait("empty", stage, parity)
            leader = self.lane == 0
            emit.ptx(
                "{.reg .pred p; setp.ne.b32 p, $1, 0; @p "
                f"mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], {plan.x_bytes};}}",
                (self.at["full"] + stage * 8).value,
                emit.bit(leader),
            )
            emit.tma_load(
                self.ctx,
                self.refs["x"],
                zero,
                zero,
                block * BLOCK,
                (plan.rows, BLOCK),
                self.at["x"] + stage * plan.x_bytes,
                self.at["full"] + stage * 8,
                leader,
            )
            stage, parity = self.next_stage(stage, parity)
            block = emit.select(block == row_steps - 1, zero, block + 1)
            return [v.value for v in (stage, parity, block)]

        def bring():
            block = self.first % plan.chunks * STEPS
            state = [v.value for v in (zero, one, block)]
            emit.loop(zero, steps, one, state, step)

        emit.branch(self.warp == cut.workers // 32, bring, lambda: None)

    # Those who multiply.

    def multiply_all(self):
        """Goes through the run of units of this block, tile after tile."""
        plan, cut = self.plan, self.plan.cut
        zero, one = emit.const(0), emit.const(1)
        self.start_stream()
        scales = self.load_scales(self.first)
        for slot in range(cut.slots):
            self.fill(self.first + slot, emit.const(slot * SLOT_BYTES))
        self.write_table()
        if plan.nested_block_size is not None:
            scales = self.load_scales(self.first + 1) + self.look_up_scales(scales)
        emit.barrier()
        emit.ptx(f"setmaxnreg.inc.sync.aligned.u32 {cut.registers[0]};")
        self.wait_for_codes()
        codes = self.load_codes(zero, 0)
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
            return [*state[:3], left.value, *state[4:]]

        state = [v.value for v in (zero, zero, zero, zero)] + codes + scales
        emit.loop(zero, tiles, one, state, tile_body)

    def write_table(self):
        """Writes the pair of each byte once a lane, `e` of lane l at 256 e + 4 l."""
        plan, ops = self.plan, emit.lane_ops(self.plan.dtype)
        numbers = byte_table(plan.codebook, plan.dtype)
        table = tuple([emit.const(x).value for x in part] for part in numbers)
        workers = plan.cut.workers
        for first in range(0, 256, workers):
            byte = self.tid + first
            pair = decode_word(ops, (byte % 256).value, table)[0]
            mine = emit.bit(byte < 256)
            for j in range(8):
                # Neighbouring lanes write to different banks.
                place = (self.lane + j) % 8 * 16 + byte % 256 * 256
                emit.ptx(
                    "{.reg .pred p; setp.ne.b32 p, $2, 0; @p "
                    "st.shared.v4.b32 [$0], {$1, $1, $1, $1};}",
                    (self.table + place).value,
                    pair,
                    mine,
                )

    # The stream of codes and scales.

    def warp_row(self, unit: emit.Int) -> emit.Int:
        """The first of this warp's rows in a unit; past the last, the last 16."""
        tile = unit // self.plan.chunks
        row = tile * self.plan.features + self.warp * 16
        return row.min(self.plan.n - 16)

    def start_stream(self):
        """Where this lane copies codes from, and to."""
        plan = self.plan
        if plan.nested_block_size is not None:
            pointer = emit.address(self.refs["offset"]) + self.layer.wide() * 4
            load = "ld.global.nc.f32 $0, [$1];"
            self.offset = emit.ptx(load, pointer.value, out="f")
        row, piece = self.lane // 8, self.lane % 8
        self.piece = piece * 16
        codes = emit.address(self.refs["codes"])
        codes = codes + self.layer.wide() * (plan.n * plan.k // 2)
        self.codes = codes + (row * (plan.k // 2) + self.piece).wide()
        # Rows 2 g and 2 g + 1 are swizzled alike: see `load_codes`.
        self.targets = [
            self.ring + row * CHUNK_BYTES + (piece ^ (row // 2 + 2 * i)) * 16
            for i in range(4)
        ]

    def fill(self, unit: emit.Int, slot: emit.Int):
        """Starts the copies of a unit's codes into a slot, if there is one."""
        plan = self.plan
        column = unit % plan.chunks * CHUNK_BYTES
        exists = emit.both(unit < self.end, column + self.piece < plan.k // 2)
        source = self.codes + self.warp_row(unit).wide() * (plan.k // 2)
        source = source + column.wide()
        for i, target in enumerate(self.targets):
            emit.ptx(
                "{.reg .pred p; setp.ne.b32 p, $2, 0; @p cp.async.cg.shared.global "
                f"[$0+{4 * i * CHUNK_BYTES}], [$1+{4 * i * (plan.k // 2)}], 16;}}",
                (target + slot).value,
                source.value,
                emit.bit(exists),
            )
        emit.ptx("cp.async.commit_group;")

    def wait_for_codes(self):
        """Waits until the next unit is in its slot, whichever lane copied it."""
        emit.ptx(f"cp.async.wait_group {self.plan.cut.slots - 1};")
        emit.ptx("bar.warp.sync -1;")

    def load_scales(self, unit: emit.Int) -> list:
        """Starts to read scales of rows 2 g and 2 g + 1, of block t of a unit.

        Returns:
            What memory holds: a scale, or its code and the scale of scales, a row.
        """
        plan = self.plan
        unit = emit.select(unit < self.end, unit, self.end - 1)
        block = (unit % plan.chunks * STEPS + self.t).min(plan.k // BLOCK - 1)
        layer, words = self.layer.wide(), []
        for r in range(2):
            row = self.warp_row(unit) + self.g * 2 + r
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

    def look_up_scales(self, words: list) -> list:
        """Starts to read the numbers that codes of scales stand for."""
        numbers, found = emit.address(self.refs["nested_codebook"]), []
        for code, nested in (words[:2], words[2:]):
            pointer = numbers + emit.Int(code).wide() * 4
            load = "ld.global.nc.f32 $0, [$1];"
            found += [emit.ptx(load, pointer.value, out="f"), nested]
        return found

    def next_scales(self, words: list, unit: emit.Int) -> tuple[list, list]:
        """Decodes the scales of a unit, and reads those of the next ones.

        Args:
            words: what was read before.
            unit: which one.

        Returns:
            The scales of two rows, each as a pair of itself in 16 bits; and words.
        """
        ops = emit.lane_ops(self.plan.dtype)
        if self.plan.nested_block_size is None:
            scales, words = words, self.load_scales(unit + 1)
        else:
            scales = [
                emit.ptx("fma.rn.f32 $0, $1, $2, $3;", *pair, self.offset, out="f")
                for pair in (words[4:6], words[6:])
            ]
            words = self.load_scales(unit + 2) + self.look_up_scales(words[:4])
        return [ops.round_pair(scale, scale) for scale in scales], words

    # Arithmetic.

    def load_codes(self, slot: emit.Int, step: int) -> list:
        """The codes of a block of two rows, eight words each.

        Lanes of a row read the same; each takes its byte of every word.
        """
        words = []
        for r in range(2):
            for half in range(2):
                place = (self.g ^ (2 * step + half)) * 16  # swizzled
                row = self.g * (2 * CHUNK_BYTES)
                words += emit.ptx(
                    f"ld.shared.v4.b32 {{$0, $1, $2, $3}}, [$4+{r * CHUNK_BYTES}];",
                    (self.ring + slot + row + place).value,
                    out="rrrr",
                )
        return words

    def operand(self, codes: list, scales: list, step: int) -> list:
        """The first operand of a step: 64 features by 64 columns of a warpgroup.

        Returns:
            Four registers for each 16 columns.
        """
        ops = emit.lane_ops(self.plan.dtype)
        registers: list = [None] * 16
        # Byte t of a word above this lane's offset.
        selector = (self.t * 16 + 0x7604).value
        source = (self.lane - self.t + step).value
        own, table = (self.lane * 4).value, self.table.value
        for r in range(2):
            scale = emit.ptx(
                "shfl.sync.idx.b32 $0, $1, $2, 31, -1;", scales[r], source, out="r"
            )
            for i, word in enumerate(codes[8 * r : 8 * r + 8]):
                pair = emit.ptx(
                    "{.reg .b32 a; prmt.b32 a, $1, $2, $3; add.u32 a, a, $4; "
                    "ld.shared.b32 $0, [a];}",
                    word,
                    own,
                    selector,
                    table,
                    out="r",
                )
                registers[2 * i + r] = ops.multiply_pair(pair, scale)
        return registers

    def unit(self, unit: emit.Int, first: emit.Int, state: list) -> list:
        """Multiplies 256 columns.

        Args:
            unit: which.
            first: the first one of this block in the tile.
            state: sums; stage and parity of x, slot, what is to be announced, the
                codes of the first step, and what was read of scales.
        """
        plan, cut = self.plan, self.plan.cut
        count = plan.rows // 2
        sums, state = state[:count], state[count:]
        stage, parity, slot, left = map(emit.Int, state[:4])
        codes, words = state[4:20], state[20:]
        wraps = slot == (cut.slots - 1) * SLOT_BYTES
        next_slot = emit.select(wraps, emit.const(0), slot + SLOT_BYTES)
        leader, later = self.lane == 0, first < unit
        scales, words = self.next_scales(words, unit)
        for step in range(STEPS):
            emit.ptx("wgmma.wait_group.sync.aligned 0;")
            self.give_back(stage, emit.both(leader, later) if step == 0 else leader)
            a = self.operand(codes, scales, step)
            if step == STEPS - 1:
                self.wait_for_codes()
                codes = self.load_codes(next_slot, 0)
            else:
                codes = self.load_codes(slot, step + 1)
            if step == STEPS - 2:
                emit.ptx("bar.warp.sync -1;")  # all lanes have read the slot
                self.fill(unit + cut.slots, slot)
            self.wait("full", stage, parity)
            a = emit.wgmma_fence(a)
            tile = emit.tile_descriptor(self.at["x"] + stage * plan.x_bytes)
            adds = emit.Int(emit.bit(later)) if step == 0 else emit.const(1)
            for j in range(4):
                here = a[4 * j : 4 * j + 4]
                sums = emit.wgmma(plan.ptx_type, here, tile + 2 * j, sums, adds)
                adds = emit.const(1)
            emit.wgmma_commit()
            stage, parity = self.next_stage(stage, parity)
        left = self.announce(left)
        numbers = [v.value for v in (stage, parity, next_slot, left)]
        return [*sums, *numbers, *codes, *words]

    def give_back(self, stage: emit.Int, when):
        """Says that the tile of x before `stage` may be written over."""
        last = emit.const(self.plan.cut.stages - 1)
        before = emit.select(stage == 0, last, stage - 1)
        self.arrive("empty", before, when)

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
        begin = tile * plan.chunks
        owner = ((begin + 1) * plan.grid - 1) // plan.units
        last = ((begin + plan.chunks) * plan.grid - 1) // plan.units
        index = tile * (plan.cut.workers // 32) + self.warp
        left = emit.select(owner < self.block, index + 1, emit.const(0))
        # If there is more to do, memory gets the time.
        more = begin + plan.chunks < self.end

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
                where = self.part(owner + 1 + i)
                total = []
                for j in range(0, len(sums), 4):
                    part = emit.ptx(
                        f"ld.global.cg.v4.f32 {{$0, $1, $2, $3}}, [$4+{j * 512}];",
                        where.value,
                        out="ffff",
                    )
                    for value, more in zip(sums[j : j + 4], part, strict=True):
                        total.append(
                            emit.ptx("add.rn.f32 $0, $1, $2;", value, more, out="f")
                        )
                return total

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
        """Writes this lane's features 2 g and 2 g + 1 of its rows of y."""
        plan, ops = self.plan, emit.lane_ops(self.plan.dtype)
        feature = tile * plan.features + self.warp * 16
        valid = feature < plan.n
        column = feature + self.g * 2
        y = emit.address(self.refs["y"])
        y = y + (self.t * 2 * plan.n + column).wide() * 2
        for i in range(0, len(sums), 4):
            for e in range(2):
                row = 2 * i + e
                pair = ops.round_pair(sums[i + e], sums[i + 2 + e])
                emit.ptx(
                    "{.reg .pred p; setp.ne.b32 p, $2, 0; "
                    f"@p st.global.b32 [$0+{2 * row * plan.n}], $1;}}",
                    y.value,
                    pair,
                    emit.bit(emit.both(valid, self.t * 2 + row < plan.m)),
                )

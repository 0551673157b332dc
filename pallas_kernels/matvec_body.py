"""What one thread of the decoding kernel does; `matvec` tells why.

The parts, in the order in which a thread meets them: it prepares the ring of its warp
and starts filling it, helps to build the tables and to stage x, then takes chunk after
chunk from the ring (decode, multiply, scale, add up), refilling as it goes, and at the
end of a tile its block of threads adds up what the warps have.
"""

from typing import Any

from pallas_kernels import emit
from pallas_kernels.lookup import pairs_of
from pallas_kernels.matvec_plan import BLOCK, BLOCKS, CHUNK, CHUNK_BYTES, Plan


class Body:
    """Emits the kernel of one plan, part by part, for one thread."""

    def __init__(self, plan: Plan, ctx, refs: dict[str, Any]):
        self.plan, self.ctx, self.refs = plan, ctx, refs
        tile = plan.tile
        self.tid = emit.thread_index()
        self.lane = self.tid % 32
        # The same in all lanes, and the compiler may know it.
        warp = (self.tid // 32).value
        warp = emit.ptx("shfl.sync.idx.b32 $0, $1, 0, 31, -1;", warp, out="r")
        self.warp = emit.Int(warp)
        self.k_warp = self.warp % tile.k_warps
        self.row_warp = self.warp // tile.k_warps
        self.g, self.t = self.lane // 4, self.lane % 4
        # Even rows first: with TMA's swizzle this is free of bank conflicts.
        self.g_row = self.g % 4 * 2 + self.g // 4
        self.lane_offset = self.lane * 4
        self.table = emit.address(refs["table_smem"])
        slots = self.warp * tile.stages
        smem = emit.address(refs["smem"])
        self.at = {name: smem + at for name, at in plan.smem_offsets.items()}
        self.ring = emit.address(refs["ring"]) + slots * self.slot_bytes
        self.ring_scales = self.at["scales"] + slots * plan.slot_scale_bytes
        self.barriers = self.at["barriers"] + slots * 8
        # The run of rows of this block of threads.
        block = emit.block_index()
        first = block * plan.row_groups // plan.grid
        last = (block + 1) * plan.row_groups // plan.grid
        self.first_row = first * 16
        self.end_row = (last * 16).min(plan.n)
        self.tiles = (last - first + (tile.groups - 1)) // tile.groups
        self.layer = emit.const(0)
        if "layer" in refs:
            pointer = emit.address(refs["layer"]).value
            self.layer = emit.Int(emit.ptx("ld.global.b32 $0, [$1];", pointer, out="r"))
        layer = self.layer.wide()
        num_scales = -(-plan.n * plan.k // plan.block_size)
        scale_bytes = 4 if plan.nested_block_size is None else 1
        self.absmax = emit.address(refs["absmax"]) + layer * (num_scales * scale_bytes)
        if plan.nested_block_size is not None:
            num_nested = -(-num_scales // plan.nested_block_size)
            self.nested = emit.address(refs["nested_absmax"]) + layer * (4 * num_nested)
            pointer = emit.address(refs["offset"]) + layer * 4
            self.offset = emit.ptx("ld.global.nc.f32 $0, [$1];", pointer.value, out="f")
        # Which of the blocks of an accumulator this lane reads x of, and holds sums of.
        self.x_class = self.g // plan.x_rows
        self.sum_class = (self.t * 2) // plan.x_rows

    # The ring.

    @property
    def slot_bytes(self) -> int:
        """Codes in a slot of a ring."""
        return self.plan.tile.row_groups * 16 * CHUNK_BYTES

    def init_barriers(self):
        """One arrival announces the bytes; 32 more follow the lanes' copies."""
        arrivals = 1 if self.plan.scales == "single" else 33
        for stage in range(self.plan.tile.stages):
            emit.ptx(
                "{.reg .pred p; setp.eq.b32 p, $1, 0; "
                f"@p mbarrier.init.shared::cta.b64 [$0], {arrivals};}}",
                (self.barriers + stage * 8).value,
                self.lane.value,
            )
        emit.ptx("fence.mbarrier_init.release.cluster; fence.proxy.async.shared::cta;")
        emit.ptx("bar.warp.sync -1;")

    def phase_range(self, phase: emit.Int) -> tuple[emit.Int, emit.Int]:
        """The first chunk of a phase, and how many it has."""
        first = phase * self.plan.phase_chunks
        if self.plan.tile.phases == 1:
            return first, emit.const(self.plan.chunks)
        last = (first + self.plan.phase_chunks).min(self.plan.chunks)
        return first, last - first.min(self.plan.chunks)

    def warp_row(self, tile: emit.Int) -> emit.Int:
        """The first row of this warp in a tile."""
        groups = self.plan.tile.row_groups
        return (
            self.first_row
            + tile * (16 * self.plan.tile.groups)
            + self.row_warp * (16 * groups)
        )

    def advance(self, cursor: list[emit.Int]) -> list[emit.Int]:
        """The warp's next chunk of this phase, or the first of the next, or tile."""
        tile, phase, chunk = cursor
        step, phases = self.plan.tile.k_warps, self.plan.tile.phases
        more = chunk + step < self.phase_range(phase)[1]
        chunk = emit.select(more, chunk + step, self.k_warp)
        ends = emit.Int(emit.bit(more)) ^ 1
        if phases == 1:
            return [tile + ends, phase, chunk]
        phase = phase + ends
        # A short last phase may have no chunk for this warp.
        exists = emit.both(phase < phases, self.k_warp < self.phase_range(phase)[1])
        wraps = emit.Int(emit.bit(exists)) ^ 1
        return [tile + wraps, emit.select(exists, phase, emit.const(0)), chunk]

    def fill(self, cursor: list[emit.Int], slot: emit.Int):
        """Starts the copies of the chunk at a cursor into a slot, if there is one."""
        plan = self.plan
        tile, phase, chunk = cursor
        row, chunk = self.warp_row(tile), self.phase_range(phase)[0] + chunk
        barrier = self.barriers + slot * 8
        exists = tile < self.tiles
        leader = emit.both(self.lane == 0, exists)
        groups = [row + 16 * i < self.end_row for i in range(plan.tile.row_groups)]
        total = emit.const(0)
        for valid in groups:
            total = total + emit.Int(emit.bit(valid)) * (16 * CHUNK_BYTES)
        emit.ptx(
            "{.reg .pred p; setp.ne.b32 p, $2, 0; "
            "@p mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], $1;}",
            barrier.value,
            total.value,
            emit.bit(leader),
        )
        for i, valid in enumerate(groups):
            emit.tma_load(
                self.ctx,
                self.refs["codes"],
                self.layer,
                row + 16 * i,
                chunk * CHUNK_BYTES,
                (16, CHUNK_BYTES),
                self.ring + slot * self.slot_bytes + i * 16 * CHUNK_BYTES,
                barrier,
                emit.both(leader, valid),
            )
        if plan.scales != "single":
            self.fill_scales(row, chunk, slot, exists)

    def fill_scales(self, row: emit.Int, chunk: emit.Int, slot: emit.Int, exists):
        """The scales of a chunk: each lane copies those of whole rows."""
        plan = self.plan
        rows = 16 * plan.tile.row_groups
        scales = self.ring_scales + slot * plan.slot_scale_bytes
        for i in range(0, rows, 32):
            local = self.lane + i
            mine = emit.both(row + local < self.end_row, exists)
            if rows < 32:
                mine = emit.both(mine, local < rows)
            block = (row + local) * (plan.k // BLOCK) + chunk * BLOCKS
            if plan.nested_block_size is None:
                copies = [(scales + local * 16, self.absmax + block.wide() * 4, 16)]
            else:
                nested = block // plan.nested_block_size
                copies = [
                    (scales + local * 4, self.absmax + block.wide(), 4),
                    (scales + (local + rows) * 4, self.nested + nested.wide() * 4, 4),
                ]
            for target, source, size in copies:
                emit.ptx(
                    "{.reg .pred p; setp.ne.b32 p, $2, 0; "
                    f"@p cp.async.ca.shared.global [$0], [$1], {size};}}",
                    target.value,
                    source.value,
                    emit.bit(mine),
                )
        emit.ptx(
            "{.reg .pred p; setp.ne.b32 p, $1, 0; "
            "@p cp.async.mbarrier.arrive.noinc.shared::cta.b64 [$0];}",
            (self.barriers + slot * 8).value,
            emit.bit(exists),
        )

    def wait(self, slot: emit.Int, parity: emit.Int):
        """Waits until a slot is full."""
        emit.ptx(
            "{.reg .pred p; WAIT_${:uid}: "
            "mbarrier.try_wait.parity.shared::cta.b64 p, [$0], $1; "
            "@!p bra WAIT_${:uid};}",
            (self.barriers + slot * 8).value,
            parity.value,
        )

    def load_codes(self, slot: emit.Int, block: int, group: int) -> list:
        """This lane's 16 columns of a block in two rows: two words each."""
        piece = (self.t // 2 + 2 * block) ^ self.g_row  # 16 bytes, swizzled
        address = (
            self.ring
            + slot * self.slot_bytes
            + self.g_row * CHUNK_BYTES
            + piece * 16
            + self.t % 2 * 8
        )
        words = []
        for half in range(2):
            words += emit.ptx(
                f"ld.shared.v2.b32 {{$0, $1}}, "
                f"[$2 + {(16 * group + 8 * half) * CHUNK_BYTES}];",
                address.value,
                out="rr",
            )
        return words

    def load_scales(self, slot: emit.Int, row: emit.Int, chunk: emit.Int) -> list:
        """For each row, the scale of this lane's block in each accumulation."""
        plan = self.plan
        rows = 16 * plan.tile.row_groups
        scales = self.ring_scales + slot * plan.slot_scale_bytes
        steps = range(0, BLOCKS, plan.classes)
        result = []
        for r in range(2 * plan.tile.row_groups):
            local = self.g_row + 8 * r
            if plan.scales == "numbers":
                address = (scales + local * 16 + self.sum_class * 4).value
                load = "ld.shared.f32 $0, [$1 + %d];"
                result.append(
                    [emit.ptx(load % (4 * i), address, out="f") for i in steps]
                )
            elif plan.scales == "codes":
                address = (scales + local * 4).value
                word = emit.ptx("ld.shared.b32 $0, [$1];", address, out="r")
                load = f"ld.shared.f32 $0, [$1 + {4 * rows}];"
                nested = emit.ptx(load, address, out="f")
                result.append(
                    [self.scale(word, self.sum_class + i, nested) for i in steps]
                )
            else:
                block = chunk * BLOCKS + self.sum_class
                result.append([self.load_scale(row + local, block + i) for i in steps])
        return result

    def load_scale(self, row: emit.Int, block: emit.Int):
        """One scale, straight from global memory; 0 past the end."""
        plan = self.plan
        valid = emit.bit(emit.both(row < self.end_row, block < plan.k // BLOCK))
        index = (row * (plan.k // BLOCK) + block) // (plan.block_size // BLOCK)
        load = (
            "{.reg .pred p; setp.ne.b32 p, $2, 0; mov.b32 $0, 0; "
            "@p ld.global.nc.%s $0, [$1];}"
        )
        if plan.nested_block_size is None:
            pointer = self.absmax + index.wide() * 4
            return emit.ptx(load % "f32", pointer.value, valid, out="f")
        pointer = self.absmax + index.wide()
        code = emit.ptx(load % "u8", pointer.value, valid, out="r")
        pointer = self.nested + (index // plan.nested_block_size).wide() * 4
        nested = emit.ptx(load % "f32", pointer.value, valid, out="f")
        return self.scale(code, emit.const(0), nested)

    def scale(self, word, byte: emit.Int, nested):
        """Decodes one double-quantized scale, a byte of a word."""
        return emit.ptx(
            "{.reg .b32 a; .reg .f32 v; prmt.b32 a, $1, 0, $2; mad.lo.u32 a, a, 4, $3; "
            "ld.shared.f32 v, [a]; fma.rn.f32 $0, v, $4, $5;}",
            word,
            (byte + 0x4440).value,
            self.at["scale_table"].value,
            nested,
            self.offset,
            out="f",
        )

    # Shared memory that all warps use.

    def load_table(self) -> list:
        """Reads this thread's entries of the tables."""
        values = emit.address(self.refs["table"])
        words = []
        for first in range(0, 256, self.plan.tile.threads):
            entry = (self.tid + first) % 256
            pointer = (values + entry.wide() * 4).value
            for load in (
                "ld.global.nc.b32 $0, [$1];",
                "ld.global.nc.b32 $0, [$1+1024];",
            ):
                words.append(emit.ptx(load, pointer, out="r"))
        return words

    def store_table(self, words: list):
        """Writes the 256 pairs once a lane, and the 256 scales once."""
        threads = self.plan.tile.threads
        share = max(1, threads // 256)  # threads that fill one entry together
        for i, first in enumerate(range(0, 256, threads)):
            entry = (self.tid + first) % 256
            pair, scale = words[2 * i : 2 * i + 2]
            address = self.at["scale_table"] + entry * 4
            emit.ptx("st.shared.b32 [$0], $1;", address.value, scale)
            for j in range(8 // share):
                # Neighbouring lanes write to different banks.
                piece = (self.lane + j + self.tid // 256 * (8 // share)) % 8
                address = self.table + entry * 256 + piece * 16
                emit.ptx(
                    "st.shared.v4.b32 [$0], {$1, $1, $1, $1};", address.value, pair
                )

    def stage_x(self, phase: emit.Int, buffer: emit.Int, valid=None):
        """Starts copies of a phase's columns of x, zeros past the end."""
        plan = self.plan
        per_row, threads = plan.phase_chunks * CHUNK // 8, plan.tile.threads
        trips = -(-plan.m * per_row // threads)
        x = emit.address(self.refs["x"])
        k0 = phase * (plan.phase_chunks * CHUNK)
        target = self.at["x"] + buffer * plan.x_bytes

        def copy(i: emit.Int):
            piece = i * threads + self.tid
            row, column = piece // per_row, piece % per_row * 8
            inside = piece < plan.m * per_row
            if valid is not None:
                inside = emit.both(inside, valid)
            # Where nothing is to be read, any address of x will do.
            exists = k0 + column < plan.k
            offset = emit.select(exists, row * plan.k + k0 + column, emit.const(0))
            emit.ptx(
                "{.reg .pred p; setp.ne.b32 p, $3, 0; "
                "@p cp.async.cg.shared.global [$0], [$1], 16, $2;}",
                (target + row * plan.x_pitch + column * 2).value,
                (x + offset.wide() * 2).value,
                emit.select(exists, emit.const(16), emit.const(0)).value,
                emit.bit(inside),
            )

        unroll = min(trips, 4)

        def body(i, carry):
            for j in range(unroll):
                copy(i + j)
            return carry

        emit.loop(emit.const(0), emit.const(trips), emit.const(unroll), [], body)

    def finish_x(self):
        """Waits for the copies of x of all threads."""
        emit.ptx("cp.async.wait_all;")
        emit.barrier()

    def load_x(self, x: emit.Int, chunk: emit.Int, block: int, j: int) -> list:
        """This lane's B fragments of a block: 16 columns of one row of x."""
        plan = self.plan
        row = self.g % plan.x_rows if plan.classes > 1 else self.g + 8 * j
        valid = row < plan.m
        if plan.classes > 1:
            valid = emit.both(valid, self.x_class == block % plan.classes)
        address = x + row * plan.x_pitch + chunk * (2 * CHUNK) + self.t * 32
        words = []
        for piece in range(2):
            words += emit.ptx(
                "{.reg .pred p; setp.ne.b32 p, $5, 0; mov.b32 $0, 0; mov.b32 $1, 0; "
                "mov.b32 $2, 0; mov.b32 $3, 0; @p ld.shared.v4.b32 "
                f"{{$0, $1, $2, $3}}, [$4 + {block * 2 * BLOCK + 16 * piece}];}}",
                address.value,
                emit.bit(valid),
                out="rrrr",
            )
        return words

    # Arithmetic.

    def decode(self, word) -> list:
        """Four bytes of codes to four pairs of numbers."""
        return pairs_of(word, self.lane_offset, self.table)

    def accumulate(self, x: emit.Int, chunk, slot, scales: list, sums: list) -> list:
        """Adds one chunk's products to `sums`."""
        plan = self.plan
        groups, tiles = plan.tile.row_groups, plan.x_tiles
        zeros = [emit.zero()] * 4
        sums = list(sums)
        for i in range(BLOCKS // plan.classes):
            parts = {(g, j): zeros for g in range(groups) for j in range(tiles)}
            for block in range(i * plan.classes, (i + 1) * plan.classes):
                decoded = []
                for group in range(groups):
                    words = self.load_codes(slot, block, group)
                    low = self.decode(words[0]) + self.decode(words[1])
                    high = self.decode(words[2]) + self.decode(words[3])
                    decoded.append((low, high))
                for j in range(tiles):
                    x_words = self.load_x(x, chunk, block, j)
                    for group, (low, high) in enumerate(decoded):
                        part = parts[group, j]
                        for s in range(0, 8, 2):
                            a = [low[s], high[s], low[s + 1], high[s + 1]]
                            part = emit.mma(plan.ptx_type, a, x_words[s : s + 2], part)
                        parts[group, j] = part
                        if block + 1 < (i + 1) * plan.classes:
                            continue
                        # Scaled at once, so that few products are held.
                        for r in range(4):
                            at = (group * tiles + j) * 4 + r
                            sums[at] = emit.ptx(
                                "fma.rn.f32 $0, $1, $2, $3;",
                                scales[2 * group + r // 2][i],
                                part[r],
                                sums[at],
                                out="f",
                                pure=True,
                            )
        return sums

    # The kernel.

    def run(self):
        """Emits everything."""
        plan, tile = self.plan, self.plan.tile
        num_sums = 4 * tile.row_groups * plan.x_tiles
        zeros = [emit.zero()] * num_sums
        zero, one = emit.const(0), emit.const(1)

        # The ring fills while the table is built and x is staged.
        self.init_barriers()
        exists = self.k_warp < self.phase_range(zero)[1]
        cursor = [emit.select(exists, zero, self.tiles), zero, self.k_warp]
        self.fill(cursor, zero)
        table = self.load_table()
        self.stage_x(zero, zero)
        for stage in range(1, tile.stages):
            cursor = self.advance(cursor)
            self.fill(cursor, emit.const(stage))
        cursor = self.advance(cursor)
        self.store_table(table)
        self.finish_x()

        def tile_body(index, state):
            def phase_body(phase, state):
                first, chunks = self.phase_range(phase)
                step = index * tile.phases + phase
                x = self.at["x"]
                if tile.phases > 1:
                    # Everyone is done with the other buffer: refill it behind us.
                    x = x + step % 2 * plan.x_bytes
                    self.finish_x()
                    following = (phase + 1) % tile.phases
                    more = step + 1 < self.tiles * tile.phases
                    self.stage_x(following, (step + 1) % 2, more)

                def chunk_body(chunk, carry):
                    slot, parity, *cursor = map(emit.Int, carry[:5])
                    self.wait(slot, parity)
                    row = self.warp_row(index)
                    scales = self.load_scales(slot, row, first + chunk)
                    sums = self.accumulate(x, chunk, slot, scales, carry[5:])
                    emit.ptx("bar.warp.sync -1;")  # all lanes have read the slot
                    self.fill(cursor, slot)
                    wraps = slot == tile.stages - 1
                    parity = parity ^ emit.Int(emit.bit(wraps))
                    slot = emit.select(wraps, zero, slot + 1)
                    values = [slot, parity, *self.advance(cursor)]
                    return [v.value for v in values] + sums

                k_warps = emit.const(tile.k_warps)
                return emit.loop(self.k_warp, chunks, k_warps, state, chunk_body)

            state = state + zeros
            if tile.phases == 1:
                state = phase_body(zero, state)
            else:
                state = emit.loop(zero, emit.const(tile.phases), one, state, phase_body)
            self.reduce(index, state[5:])
            return state[:5]

        state = [v.value for v in (zero, zero, *cursor)]
        emit.loop(zero, self.tiles, one, state, tile_body)

    def reduce(self, index: emit.Int, sums: list):
        """Adds the sums of a tile over the warps, and writes y.

        Two tiles' sums have room, so one barrier a tile is enough.
        """
        plan, tile = self.plan, self.plan.tile
        buffer = self.at["sums"] + index % 2 * plan.sums_bytes
        # Lanes that hold other blocks of the same rows.
        for distance in {1: (), 2: (2,), 4: (1, 2)}[plan.classes]:
            sums = [
                emit.ptx(
                    f"{{.reg .f32 o; shfl.sync.bfly.b32 o, $1, {distance}, 31, -1; "
                    "add.rn.f32 $0, $1, o;}",
                    value,
                    out="f",
                )
                for value in sums
            ]
        keep = emit.bit(self.t * 2 < plan.x_rows)
        row0 = self.row_warp * (16 * tile.row_groups) + self.g_row
        column0 = self.k_warp * plan.x_rows + self.t * 2
        for at, value in enumerate(sums):
            group, rest = divmod(at, 4 * plan.x_tiles)
            j, r = divmod(rest, 4)
            column = column0 + (8 * j + r % 2)
            row = row0 + (16 * group + 8 * (r // 2))
            emit.ptx(
                "{.reg .pred p; setp.ne.b32 p, $2, 0; @p st.shared.f32 [$0], $1;}",
                (buffer + (column * plan.sum_pitch + row) * 4).value,
                value,
                keep,
            )
        emit.barrier()
        rows = 16 * tile.groups
        y = emit.address(self.refs["y"])

        def body(i, carry):
            row, x_row = i % rows, i // rows
            total = emit.zero()
            for warp in range(tile.k_warps):
                at = (x_row + warp * plan.x_rows) * plan.sum_pitch + row
                address = (buffer + at * 4).value
                partial = emit.ptx("ld.shared.f32 $0, [$1];", address, out="f")
                total = emit.ptx("add.rn.f32 $0, $1, $2;", total, partial, out="f")
            n = self.first_row + index * rows + row
            emit.ptx(
                "{.reg .pred p; .reg .b16 h; setp.ne.b32 p, $2, 0; "
                f"cvt.rn.{plan.ptx_type}.f32 h, $1; @p st.global.b16 [$0], h;}}",
                (y + (x_row * plan.n + n).wide() * 2).value,
                total,
                emit.bit(n < self.end_row),
            )
            return carry

        total, threads = emit.const(plan.m * rows), emit.const(tile.threads)
        emit.loop(self.tid, total, threads, [], body)

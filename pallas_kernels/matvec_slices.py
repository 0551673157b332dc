"""What one thread of the decoding kernel for up to 16 rows does; `matvec` tells why.

Each warp owns slices of 256 columns, and takes every row of its block of threads in a
slice before it goes on to the next: so its x stays in registers. A unit of work is 16
rows of a slice, 2 KB of codes, which the lanes copy to a ring of the warp by `cp.async`
some units ahead. Sums of the warps meet in shared memory, a batch of units at a time.
"""

from typing import Any

from pallas_kernels import emit
from pallas_kernels.lookup import pairs_of
from pallas_kernels.matvec_plan import BLOCK, BLOCKS, CHUNK, CHUNK_BYTES
from pallas_kernels.matvec_slices_plan import SlicePlan

UNIT_BYTES = 16 * CHUNK_BYTES


class Body:
    """Emits the kernel of one plan, part by part, for one thread."""

    def __init__(self, plan: SlicePlan, ctx, refs: dict[str, Any]):
        del ctx
        self.plan, self.refs = plan, refs
        self.tid = emit.thread_index()
        self.lane = self.tid % 32
        # The same in all lanes, and the compiler may know it.
        warp = (self.tid // 32).value
        warp = emit.ptx("shfl.sync.idx.b32 $0, $1, 0, 31, -1;", warp, out="r")
        self.k_warp = emit.Int(warp)
        self.g, self.t = self.lane // 4, self.lane % 4
        smem = emit.address(refs["smem"])
        self.at = {name: smem + at for name, at in plan.smem_offsets.items()}
        self.table = emit.address(refs["table_smem"])
        ring = emit.address(refs["ring"])
        self.ring = ring + self.k_warp * (plan.slices.stages * UNIT_BYTES)
        # The run of rows of this block of threads.
        block = emit.block_index()
        self.first = block * plan.row_groups // plan.grid
        self.groups = (block + 1) * plan.row_groups // plan.grid - self.first
        batch = plan.slices.batch
        self.batches = (self.groups + (batch - 1)) // batch
        self.layer = emit.const(0)
        if "layer" in refs:
            pointer = emit.address(refs["layer"]).value
            self.layer = emit.Int(emit.ptx("ld.global.b32 $0, [$1];", pointer, out="r"))
        # Which of the blocks of an accumulator this lane holds sums of.
        self.sum_class = (self.t * 2) // plan.x_rows

    # Before the first unit.

    def load_table(self) -> list:
        """Reads this thread's entries of the tables: a pair, a nested number each."""
        values = emit.address(self.refs["table"])
        words = []
        for first in range(0, 256, self.plan.slices.threads):
            entry = (self.tid + first) % 256
            pointer = (values + entry.wide() * 4).value
            for offset in ("", "+1024"):
                load = f"ld.global.nc.b32 $0, [$1{offset}];"
                words.append(emit.ptx(load, pointer, out="r"))
        return words

    def store_table(self, words: list):
        """Writes each entry once a lane: 128 bytes of pairs, 128 of nested numbers."""
        threads = self.plan.slices.threads
        share = max(1, threads // 256)  # threads that fill one entry together
        part = self.tid // 256
        for i, first in enumerate(range(0, 256, threads)):
            entry = self.table + (self.tid + first) % 256 * 256
            for offset, word in zip((0, 128), words[2 * i : 2 * i + 2], strict=True):
                for j in range(8 // share):
                    # Neighbouring lanes write to different banks.
                    piece = (self.lane + j + part * (8 // share)) % 8
                    emit.ptx(
                        "{.reg .pred p; setp.ne.b32 p, $2, 0; "
                        f"@p st.shared.v4.b32 [$0+{offset}], {{$1, $1, $1, $1}};}}",
                        (entry + piece * 16).value,
                        word,
                        emit.bit(part < share),
                    )

    def copy(self, target: emit.Int, source: emit.Int, size: int):
        """Starts a copy to shared memory."""
        kind = "cg" if size == 16 else "ca"
        emit.ptx(
            f"cp.async.{kind}.shared.global [$0], [$1], {size};",
            target.value,
            source.value,
        )

    def copy_scales(self):
        """Starts copies of the scales of all rows of this block of threads."""
        plan, threads = self.plan, self.plan.slices.threads
        width = plan.scale_bytes * plan.blocks  # of a row
        piece = 16 if width % 16 == 0 else 4
        per_row = width // piece
        layer = self.layer.wide()
        source = emit.address(self.refs["absmax"]) + layer * (plan.n * width)
        first_row = self.first * 16
        rows = (first_row + self.groups * 16).min(plan.n) - first_row
        source = source + first_row.wide() * width
        total = rows * per_row

        def body(i, carry):
            row, column = i // per_row, i % per_row * piece
            target = self.at["scales"] + row * plan.scale_pitch + column
            self.copy(target, source + (i * piece).wide(), piece)
            return carry

        emit.loop(self.tid, total, emit.const(threads), [], body)
        if plan.nested_block_size is None:
            return
        num_scales = plan.n * plan.blocks
        num_nested = -(-num_scales // plan.nested_block_size)
        self.first_nested = first_row * plan.blocks // plan.nested_block_size
        last = (first_row + rows) * plan.blocks - 1
        total = last // plan.nested_block_size + 1 - self.first_nested
        nested = emit.address(self.refs["nested_absmax"]) + layer * (4 * num_nested)
        nested = nested + self.first_nested.wide() * 4

        def nested_body(i, carry):
            self.copy(self.at["nested"] + i * 4, nested + i.wide() * 4, 4)
            return carry

        emit.loop(self.tid, total, emit.const(threads), [], nested_body)
        pointer = emit.address(self.refs["offset"]) + layer * 4
        self.offset = emit.ptx("ld.global.nc.f32 $0, [$1];", pointer.value, out="f")

    def load_x(self, phase: emit.Int) -> list:
        """Reads this lane's part of x in a slice: 16 columns of blocks and rows.

        Returns:
            Eight words for each of its blocks and each eight rows of x, zeros where
            there is no row. Where blocks share an accumulator, a lane's column of B
            belongs to one in `classes` of them.
        """
        plan = self.plan
        number = phase * plan.slices.k_warps + self.k_warp
        exists = number < plan.num_slices
        x, words = emit.address(self.refs["x"]), []
        row = self.g % plan.x_rows if plan.classes > 1 else self.g
        first = self.g // plan.x_rows if plan.classes > 1 else emit.const(0)
        for block in range(0, BLOCKS, plan.classes):
            for j in range(plan.x_tiles):
                valid = emit.both(row + 8 * j < plan.m, exists)
                column = (first + block) * BLOCK + self.t * 16
                at = (row + 8 * j) * plan.k + number * CHUNK + column
                at = emit.select(valid, at, emit.const(0))
                for half in range(2):
                    words += emit.ptx(
                        "{.reg .pred p; setp.ne.b32 p, $5, 0; mov.b32 $0, 0; "
                        "mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0; @p "
                        "ld.global.nc.v4.b32 {$0, $1, $2, $3}, "
                        f"[$4+{16 * half}];}}",
                        (x + at.wide() * 2).value,
                        emit.bit(valid),
                        out="rrrr",
                    )
        return words

    def spread_x(self, words: list) -> list:
        """B fragments of every block: zeros in the columns of other blocks."""
        plan = self.plan
        if plan.classes == 1:
            return words
        zero, spread = emit.const(0), []
        for block in range(BLOCKS):
            mine = self.g // plan.x_rows == block % plan.classes
            at = block // plan.classes * 8
            for word in words[at : at + 8]:
                spread.append(emit.select(mine, emit.Int(word), zero).value)
        return spread

    # The stream of codes.

    def start_stream(self):
        """Where this lane copies from, and to."""
        plan = self.plan
        self.copy_row, piece = self.lane // 8, self.lane % 8
        swizzled = piece ^ (self.copy_row * 2)
        self.target = self.ring + self.copy_row * CHUNK_BYTES + swizzled * 16
        codes = emit.address(self.refs["codes"])
        codes = codes + self.layer.wide() * (plan.n * plan.k // 2)
        self.codes = codes + (self.first * 16).wide() * (plan.k // 2)
        self.codes = self.codes + (piece * 16).wide()

    def fill(self, cursor: list[emit.Int], slot: emit.Int) -> list[emit.Int]:
        """Starts the copies of a unit into a slot, if there is one.

        Args:
            cursor: units left, groups left in their phase, row and slice of the unit.
            slot: the offset of the slot in the ring.

        Returns:
            The cursor of the next unit.
        """
        plan = self.plan
        left, group, row, number = cursor
        exists = emit.const(0) < left
        pitch = plan.k // 2
        column = number.min(plan.num_slices - 1) * CHUNK_BYTES
        if plan.n % 16:
            last = emit.const(plan.n - 1) - self.first * 16
            rows = [row + self.copy_row + 4 * i for i in range(4)]
            rows = [emit.select(last < r, last, r) for r in rows]
            sources = [(self.codes + (r * pitch + column).wide(), 0) for r in rows]
        else:
            source = self.codes + ((row + self.copy_row) * pitch + column).wide()
            sources = [(source, 4 * i * pitch) for i in range(4)]
        for i, (source, offset) in enumerate(sources):
            emit.ptx(
                "{.reg .pred p; setp.ne.b32 p, $2, 0; @p cp.async.cg.shared.global "
                f"[$0+{4 * i * CHUNK_BYTES}], [$1+{offset}], 16;}}",
                (self.target + slot).value,
                source.value,
                emit.bit(exists),
            )
        emit.ptx("cp.async.commit_group;")
        left = left - emit.Int(emit.bit(exists))
        if plan.slices.phases == 1:
            return [left, group, row + 16, number]
        wraps = group == 1
        return [
            left,
            emit.select(wraps, self.groups, group - 1),
            emit.select(wraps, emit.const(0), row + 16),
            number + emit.Int(emit.bit(wraps)) * plan.slices.k_warps,
        ]

    # Arithmetic.

    def load_codes(self, slot: emit.Int) -> list[list]:
        """This lane's 16 columns of each block in two rows: four words a block."""
        blocks = []
        for block in range(BLOCKS):
            place = (self.g % 4 ^ block) * 32  # swizzled
            address = self.ring + slot + self.g * CHUNK_BYTES + place + self.t * 8
            words = []
            for half in range(2):
                words += emit.ptx(
                    f"ld.shared.v2.b32 {{$0, $1}}, [$2+{8 * half * CHUNK_BYTES}];",
                    address.value,
                    out="rr",
                )
            blocks.append(words)
        return blocks

    def load_scales(self, group: emit.Int, number: emit.Int) -> list:
        """For each of two rows, the scale of this lane's block in each accumulation."""
        plan = self.plan
        number = number.min(plan.num_slices - 1)
        shared = plan.classes == 4  # each lane decodes the one it needs
        block = number * BLOCKS + (self.sum_class if shared else self.t)
        scales = []
        for half in range(2):
            row = group * 16 + self.g + 8 * half
            place = block * plan.scale_bytes
            address = self.at["scales"] + row * plan.scale_pitch + place
            if plan.nested_block_size is None:
                scale = emit.ptx("ld.shared.f32 $0, [$1];", address.value, out="f")
            else:
                index = (self.first * 16 + row) * plan.blocks + block
                nested = index // plan.nested_block_size - self.first_nested
                # Past the last row: any scale will do.
                nested = nested.min(plan.max_nested - 1)
                scale = emit.ptx(
                    "{.reg .b32 a; .reg .f32 v, s; ld.shared.u8 a, [$1]; "
                    "ld.shared.f32 s, [$2]; mad.lo.u32 a, a, 256, $3; "
                    "ld.shared.f32 v, [a+128]; fma.rn.f32 $0, v, s, $4;}",
                    address.value,
                    (self.at["nested"] + nested * 4).value,
                    (self.table + self.lane * 4).value,
                    self.offset,
                    out="f",
                )
            scales.append(scale)
        if shared:
            return [[scale] for scale in scales]
        quad = self.lane - self.t
        return [
            [
                emit.ptx(
                    "shfl.sync.idx.b32 $0, $1, $2, 31, -1;",
                    scale,
                    (quad + self.sum_class + i).value,
                    out="f",
                )
                for i in range(0, BLOCKS, plan.classes)
            ]
            for scale in scales
        ]

    def decode(self, word) -> list:
        """Four bytes of codes to four pairs of numbers."""
        return pairs_of(word, self.lane * 4, self.table)

    def multiply(self, codes: list[list], scales: list, x: list) -> list:
        """The products of a unit: four sums for each eight rows of x."""
        plan = self.plan
        zeros = [emit.zero()] * 4
        sums = [zeros] * plan.x_tiles
        # Two chains of products where one would be long.
        chains = 2 if plan.classes == 4 else 1
        for i in range(BLOCKS // plan.classes):
            parts = {(c, j): zeros for c in range(chains) for j in range(plan.x_tiles)}
            for block in range(i * plan.classes, (i + 1) * plan.classes):
                words = codes[block]
                for q in range(2):
                    low, high = self.decode(words[q]), self.decode(words[2 + q])
                    for j in range(plan.x_tiles):
                        at = (block * plan.x_tiles + j) * 8 + 4 * q
                        chain = block % chains, j
                        for s in range(0, 4, 2):
                            a = [low[s], high[s], low[s + 1], high[s + 1]]
                            b = x[at + s : at + s + 2]
                            parts[chain] = emit.mma(plan.ptx_type, a, b, parts[chain])
            for (_, j), part in parts.items():
                sums[j] = [
                    emit.ptx(
                        "fma.rn.f32 $0, $1, $2, $3;",
                        scales[r // 2][i],
                        part[r],
                        sums[j][r],
                        out="f",
                        pure=True,
                    )
                    for r in range(4)
                ]
        return [number for four in sums for number in four]

    def store_sums(self, base: emit.Int, sums: list, phase: emit.Int):
        """Leaves a unit's sums to the reduction; `base` is this warp's place."""
        plan = self.plan
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
        for at, value in enumerate(sums):
            j, r = divmod(at, 4)
            if 8 * j + r % 2 >= plan.m:
                continue
            column = self.t * 2 + (8 * j + r % 2)
            keep = column < plan.m
            place = (base + (column * plan.sum_pitch + self.g) * 4).value
            offset = 32 * (r // 2)
            if plan.accumulates:
                # What this lane left in the phase before.
                again = emit.bit(emit.both(keep, emit.const(0) < phase))
                value = emit.ptx(
                    "{.reg .pred p; .reg .f32 o; setp.ne.b32 p, $3, 0; mov.b32 o, 0; "
                    f"@p ld.shared.f32 o, [$1+{offset}]; add.rn.f32 $0, $2, o;}}",
                    place,
                    value,
                    again,
                    out="f",
                )
            emit.ptx(
                "{.reg .pred p; setp.ne.b32 p, $2, 0; "
                f"@p st.shared.f32 [$0+{offset}], $1;}}",
                place,
                value,
                emit.bit(keep),
            )

    # The kernel.

    def run(self):
        """Emits everything."""
        plan, tile = self.plan, self.plan.slices
        zero, one = emit.const(0), emit.const(1)
        works = self.k_warp < tile.k_warps
        groups = emit.select(works, self.groups, zero)

        # What is needed first is asked for first: scales, tables and x wait in the same
        # queue as the codes.
        table = self.load_table()
        self.copy_scales()
        emit.ptx("cp.async.commit_group;")
        words_of_x = self.load_x(zero)
        self.start_stream()
        cursor = [groups * tile.phases, self.groups, zero, self.k_warp]
        early = min(2, tile.stages)
        for stage in range(early):
            cursor = self.fill(cursor, emit.const(stage * UNIT_BYTES))
        self.store_table(table)
        emit.ptx(f"cp.async.wait_group {early};")
        emit.barrier()
        for stage in range(early, tile.stages):
            cursor = self.fill(cursor, emit.const(stage * UNIT_BYTES))

        def units(phase, batch, x, state):
            """The units of a batch of a phase, of this warp."""
            number = phase * tile.k_warps + self.k_warp
            first = batch * tile.batch
            last = first + (groups - first.min(groups)).min(tile.batch)
            buffer = self.sums_buffer(phase, batch)
            mine = buffer + self.k_warp * plan.warp_sums_bytes

            def body(group, state):
                slot, *cursor = map(emit.Int, state)
                emit.ptx(f"cp.async.wait_group {tile.stages - 1};")
                emit.ptx("bar.warp.sync -1;")  # what the other lanes copied
                codes = self.load_codes(slot)
                emit.ptx("bar.warp.sync -1;")  # all lanes have read the slot
                cursor = self.fill(cursor, slot)
                scales = self.load_scales(group, number)
                sums = self.multiply(codes, scales, x)
                place = mine + (group - first) * plan.unit_sums_bytes
                self.store_sums(place, sums, phase)
                wraps = slot == (tile.stages - 1) * UNIT_BYTES
                slot = emit.select(wraps, zero, slot + UNIT_BYTES)
                return [v.value for v in (slot, *cursor)]

            return emit.loop(first, last, one, state, body)

        def phase_body(phase, state):
            words, state = state[: len(words_of_x)], state[len(words_of_x) :]
            x = self.spread_x(words)
            # The next x comes while this one is used, if registers allow.
            early = tile.phases > 1 and plan.classes > 1
            if early:
                words = self.load_x(phase + 1)
            if plan.accumulates:
                state = units(phase, zero, x, state)
            else:

                def batch_body(batch, state):
                    state = units(phase, batch, x, state)
                    emit.barrier()
                    self.reduce(phase, batch)
                    return state

                state = emit.loop(zero, self.batches, one, state, batch_body)
            if tile.phases > 1 and not early:
                words = self.load_x(phase + 1)
            return [*words, *state]

        state = words_of_x + [v.value for v in (zero, *cursor)]
        if tile.phases == 1:
            phase_body(zero, state)
        else:
            emit.loop(zero, emit.const(tile.phases), one, state, phase_body)
        if plan.accumulates:
            emit.barrier()
            self.reduce(zero, zero)

    def sums_buffer(self, phase: emit.Int, batch: emit.Int) -> emit.Int:
        """Where the sums of a batch lie: two take turns, unless one is all."""
        if self.plan.accumulates:
            return self.at["sums"]
        # Of this block of threads: with another's number of batches, the last batch of
        # a phase and the first of the next could have the same.
        step = phase * self.batches + batch
        return self.at["sums"] + step % 2 * self.plan.sums_bytes

    def reduce(self, phase: emit.Int, batch: emit.Int):
        """Adds the sums of a batch over the warps, always in the same order.

        They are added to those of the phases before, and written to y in the last.
        Two batches' sums have room, so one barrier a batch is enough.
        """
        plan, tile = self.plan, self.plan.slices
        y = emit.address(self.refs["y"])
        buffer, first = self.sums_buffer(phase, batch), batch * tile.batch
        has_totals = tile.phases > 1 and not plan.accumulates
        groups = (self.groups - first).min(tile.batch)
        last = 0 if plan.accumulates else tile.phases - 1

        def body(i, carry):
            row, rest = i % 16, i // 16
            x_row, group = rest % plan.m, rest // plan.m
            at = group * (plan.unit_sums_bytes // 4) + x_row * plan.sum_pitch + row
            total = emit.zero()
            for warp in range(tile.k_warps):
                partial = emit.ptx(
                    f"ld.shared.f32 $0, [$1+{warp * plan.warp_sums_bytes}];",
                    (buffer + at * 4).value,
                    out="f",
                )
                total = emit.ptx("add.rn.f32 $0, $1, $2;", total, partial, out="f")
            row = (first + group) * 16 + row
            if has_totals:
                place = (self.at["totals"] + (row * plan.m + x_row) * 4).value
                before = emit.ptx("ld.shared.f32 $0, [$1];", place, out="f")
                before = emit.pick(phase == 0, emit.zero(), before)
                total = emit.ptx("add.rn.f32 $0, $1, $2;", total, before, out="f")
                emit.ptx("st.shared.f32 [$0], $1;", place, total)
            n = self.first * 16 + row
            emit.ptx(
                "{.reg .pred p; .reg .b16 h; setp.ne.b32 p, $2, 0; "
                f"cvt.rn.{plan.ptx_type}.f32 h, $1; @p st.global.b16 [$0], h;}}",
                (y + (x_row * plan.n + n).wide() * 2).value,
                total,
                emit.bit(emit.both(n < plan.n, phase == last)),
            )
            return carry

        total = groups * (16 * plan.m)
        emit.loop(self.tid, total, emit.const(tile.threads), [], body)

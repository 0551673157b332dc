"""What one thread of the kernel for tens of rows does; `skinny` tells why.

A warp of the last warpgroup brings x, another codes, a third the sums that other blocks
leave; the other warpgroups decode and multiply, each its 64 features.
"""

from pallas_kernels import emit
from pallas_kernels.skinny_copies import Copies
from pallas_kernels.skinny_operand import Operand
from pallas_kernels.skinny_parts import Parts
from pallas_kernels.skinny_plan import HALF, STEPS

# Registers of a lane in wgmma's first operand of a step.
OPERAND = 16


class Body(Copies, Operand, Parts):
    """Emits the kernel of one plan, part by part, for one thread."""

    def run(self):
        """Emits everything."""
        # By warps, not threads: so the compiler knows that none of them divides, and
        # keeps addresses that all lanes share in uniform registers.
        works = self.warp < self.plan.cut.workers // 32
        emit.roles(works, self.multiply_all, self.bring_all)

    def bring_all(self):
        """Gives registers away; then three warps copy: x, codes, parts."""
        emit.ptx(f"setmaxnreg.dec.sync.aligned.u32 {self.plan.cut.registers[1]};")
        warp = self.plan.cut.workers // 32

        def others():
            emit.roles(self.warp == warp + 1, self.bring_codes, rest)

        def rest():
            emit.roles(self.warp == warp + 2, self.bring_parts, emit.barrier)

        emit.roles(self.warp == warp, self.bring_x, others)

    def multiply_all(self):
        """Goes through the run of units of this block, tile after tile."""
        plan, cut = self.plan, self.plan.cut
        zero, one = emit.const(0), emit.const(1)
        emit.ptx(f"setmaxnreg.inc.sync.aligned.u32 {cut.registers[0]};")
        each = plan.scale_units
        words = self.load_scales(self.first // 2 // each)
        self.load_offset()
        self.write_table()
        emit.barrier()
        self.find_codes()
        self.wait("codes full", zero, zero)
        step = self.first % 2 * HALF
        codes = self.load_codes(zero, step)
        codes = self.receive(self.send(codes)) + self.load_codes(zero, step + 1)
        scales = self.decode_scales(words, self.first // 2)
        scales = [self.scale_of(scales, step), scales]
        scales += words if each > 1 else []
        scales += self.load_scales(self.first // 2 // each + 1)
        tiles = self.last_tile - self.first_tile + 1

        def tile_body(i, state):
            tile = self.first_tile + i
            begin = tile * (2 * plan.chunks)
            first = emit.select(i == 0, self.first, begin)
            end = (begin + 2 * plan.chunks).min(self.end)
            sums = [emit.zero()] * (plan.rows // 2)

            def part(halves):
                def body(unit, state):
                    return self.unit(unit, first, halves, state)

                return body

            # The run may begin and end with a half of a unit.
            unit, last = (first + 1) // 2, end // 2
            state = emit.loop(first // 2, unit, one, [*sums, *state], part((1,)))
            state = emit.loop(unit, last, one, state, part((0, 1)))
            state = emit.loop(last, (end + 1) // 2, one, state, part((0,)))
            sums, state = state[: len(sums)], state[len(sums) :]
            sums = emit.wgmma_wait(0, sums)
            self.give_back(emit.Int(state[0]), self.speaks)
            self.finish(tile, sums)
            return state

        state = [v.value for v in (zero, zero, zero, zero)]
        state += [zero.value] * OPERAND  # of no product
        emit.loop(zero, tiles, one, state + codes + scales, tile_body)

    def unit(
        self, unit: emit.Int, first: emit.Int, halves: tuple[int, ...], state: list
    ) -> list:
        """Multiplies 256 columns, or the first or the second half of them.

        Args:
            unit: which one.
            first: the first half of a unit of this block in the tile.
            halves: which ones.
            state: sums; stage and parity of x, slot and parity of codes, the first
                operand that may be in use, the lane's codes of the first step, what
                it has read of the second, scales of the first step and of the unit, and
                what was read of those of the next.
        """
        plan, cut = self.plan, self.plan.cut
        count = plan.rows // 2
        sums, state = state[:count], state[count:]
        stage, parity, slot, slot_parity = map(emit.Int, state[:4])
        used, state = state[4 : 4 + OPERAND], state[4 + OPERAND :]
        codes, coming, state = state[:4], state[4:8], state[8:]
        scale, scales, words = state[0], state[1], state[2:]
        leader, later = self.lane == 0, first < unit * 2 + halves[0]
        begin, always = halves[0] * HALF, emit.const(1).value
        for step in range(begin, (halves[-1] + 1) * HALF):
            # The product of the step before is under way. What the next step will
            # need is sent before the look-ups of this one, and taken after them.
            if step == STEPS - 1:
                scales, words = self.next_scales(words, unit + 1)
            next_scale = self.scale_of(scales, (step + 1) % STEPS)
            sent = self.send(coming)
            has_x = has_codes = None
            if step % HALF == 0:
                has_x = self.test("x full", stage, parity, always)
            if step == STEPS - 2:
                emit.ptx("bar.warp.sync -1;")  # all lanes have read the slot
                self.arrive("codes empty", slot, leader)
                slot, slot_parity = self.turn(slot, slot_parity, cut.slots)
                more = emit.bit(unit + 1 < self.end_unit)
                has_codes = self.test("codes full", slot, slot_parity, more)
            a = self.operand(codes, scale)
            codes, scale = self.receive(sent), next_scale
            if step == STEPS - 2:
                self.wait_unless(has_codes, "codes full", slot, slot_parity)
            coming = self.load_codes(slot, (step + 2) % STEPS)
            if step % HALF == 0:
                self.wait_unless(has_x, "x full", stage, parity)
            a = emit.wgmma_fence(a)
            tile = self.at["x"] + stage * plan.x_bytes
            tile = emit.tile_descriptor(tile + step % HALF * (plan.x_bytes // HALF))
            adds = emit.Int(emit.bit(later)) if step == begin else emit.const(1)
            for j in range(4):
                here = a[4 * j : 4 * j + 4]
                sums = emit.wgmma(plan.ptx_type, here, tile + 2 * j, sums, adds)
                adds = emit.const(1)
            emit.wgmma_commit()
            emit.wgmma_wait(1, used)
            used = a
            if step % HALF == 0:
                speaks = self.speaks
                speaks = emit.both(speaks, later) if step == begin else speaks
                self.give_back(stage, speaks)
            if step % HALF == HALF - 1:
                stage, parity = self.turn(stage, parity, cut.stages)
        numbers = [v.value for v in (stage, parity, slot, slot_parity)]
        return [*sums, *numbers, *used, *codes, *coming, scale, scales, *words]

    def give_back(self, stage: emit.Int, when):
        """Says that the tile of x before `stage` may be written over."""
        last = emit.const(self.plan.cut.stages - 1)
        before = emit.select(stage == 0, last, stage - 1)
        self.arrive("x empty", before, when)

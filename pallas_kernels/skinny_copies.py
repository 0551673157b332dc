"""What brings x and codes in the kernel for tens of rows: a warp each, by TMA."""

from collections.abc import Callable

from pallas_kernels import emit
from pallas_kernels.matvec_plan import BLOCK, CHUNK_BYTES
from pallas_kernels.skinny_plan import HALF, STEPS
from pallas_kernels.skinny_thread import Thread


class Copies(Thread):
    """The work of the two warps that keep rings in shared memory full."""

    def bring_x(self):
        """Copies x, 128 columns of all rows after the other."""
        plan = self.plan
        start = self.first % (2 * plan.chunks) * HALF

        def windows(i: emit.Int):
            block = (start + i * HALF) % (plan.chunks * STEPS)
            zero, shape = emit.const(0), (plan.rows, BLOCK)
            return [(zero, zero, (block + j) * BLOCK, shape) for j in range(HALF)]

        tiles, stages = self.end - self.first, plan.cut.stages
        self.bring("x", stages, stages, plan.cut.consumers, tiles, windows)

    def bring_codes(self):
        """Copies codes, 256 columns of a tile's features after the other."""
        plan = self.plan

        def windows(i: emit.Int):
            unit = self.first // 2 + i
            row = unit // plan.chunks * plan.features
            column = unit % plan.chunks * CHUNK_BYTES
            return [(self.layer, row, column, (plan.features, CHUNK_BYTES))]

        units, warps = self.end_unit - self.first // 2, plan.cut.workers // 32
        at_once = plan.cut.at_once
        self.bring("codes", plan.cut.slots, at_once, warps, units, windows)

    def bring(
        self,
        name: str,
        stages: int,
        at_once: int,
        readers: int,
        total: emit.Int,
        windows: Callable,
    ):
        """Keeps a ring full.

        Args:
            name: of the array, of the ring and of its barriers.
            stages: how many it has room for.
            at_once: how many are asked for before the first has come.
            readers: who give a stage back.
            total: how many there are.
            windows: from its number, of each window of a stage the layer, row, column
                and shape: rows of 128 bytes.
        """
        zero, one, leader = emit.const(0), emit.const(1), self.lane == 0
        self.init(f"{name} full", stages, 1)
        self.init(f"{name} empty", stages, readers)
        emit.ptx("fence.mbarrier_init.release.cluster; fence.proxy.async.shared::cta;")

        def start(i: emit.Int, stage: emit.Int):
            barrier = self.at[f"{name} full"] + stage * 8
            parts, ref, at = windows(i), self.refs[name], 0
            size = 128 * sum(shape[0] for *_, shape in parts)
            self.expect(barrier, size)
            target = self.at[name] + stage * size
            for layer, row, column, shape in parts:
                where = layer, row, column, shape, target + at
                emit.tma_load(self.ctx, ref, *where, barrier, leader)
                at += 128 * shape[0]

        def first(i, state):
            start(i, i)
            return state

        def later(i, state):
            stage, parity = map(emit.Int, state)
            self.wait(f"{name} empty", stage, parity)
            start(i, stage)
            return [v.value for v in self.turn(stage, parity, stages)]

        early, begun = total.min(stages), total.min(at_once)
        emit.loop(zero, begun, one, [], first)
        emit.barrier()
        if at_once < stages:
            # What is needed first is not to share the way with what is needed later.
            self.wait(f"{name} full", zero, zero)
            emit.loop(begun, early, one, [], first)
        emit.loop(early, total, one, [zero.value, zero.value], later)

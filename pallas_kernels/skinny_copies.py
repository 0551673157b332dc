"""What brings x and codes in the kernel for tens of rows: a warp each, by TMA."""

from collections.abc import Callable

from pallas_kernels import emit
from pallas_kernels.matvec_plan import BLOCK, CHUNK_BYTES
from pallas_kernels.skinny_plan import HALF
from pallas_kernels.skinny_thread import Thread


class Copies(Thread):
    """The work of the two warps that keep rings in shared memory full."""

    def bring_x(self):
        """Copies x, 128 columns of all rows after the other."""
        plan = self.plan
        start = self.first % (2 * plan.chunks)

        def windows(i: emit.Int):
            block = (start + i) % (2 * plan.chunks) * HALF
            zero, shape = emit.const(0), (plan.rows, BLOCK)
            return [(zero, zero, (block + j) * BLOCK, shape) for j in range(HALF)]

        tiles, stages = self.end - self.first, plan.cut.stages
        self.bring("x", stages, plan.cut.consumers, tiles, windows)

    def bring_codes(self):
        """Copies codes, 256 columns of a tile's features after the other."""
        plan = self.plan

        def windows(i: emit.Int):
            unit = self.first // 2 + i
            row = unit // plan.chunks * plan.features
            column = unit % plan.chunks * CHUNK_BYTES
            return [(self.layer, row, column, (plan.features, CHUNK_BYTES))]

        units, warps = self.end_unit - self.first // 2, plan.cut.workers // 32
        self.bring("codes", plan.cut.slots, warps, units, windows)

    def bring(
        self,
        name: str,
        stages: int,
        readers: int,
        total: emit.Int,
        windows: Callable,
    ):
        """Keeps a ring full.

        Args:
            name: of the array, of the ring and of its barriers.
            stages: how many it has room for.
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
            parts, ref = windows(i), self.refs[name]
            size = 128 * sum(shape[0] for *_, shape in parts)
            self.expect(barrier, size)
            target = self.at[name] + stage * size
            for layer, row, column, shape in parts:
                where = layer, row, column, shape, target
                emit.tma_load(self.ctx, ref, *where, barrier, leader)
                target = target + 128 * shape[0]

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

    def expect(self, barrier: emit.Int, size: int):
        """Says at a barrier how many bytes will come."""
        emit.ptx(
            "{.reg .pred p; setp.eq.b32 p, $1, 0; @p "
            f"mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], {size};}}",
            barrier.value,
            self.lane.value,
        )

"""What brings x and codes in the kernel for tens of rows: a warp each, by TMA."""

from collections.abc import Callable

from pallas_kernels import emit
from pallas_kernels.matvec_plan import BLOCK, CHUNK_BYTES
from pallas_kernels.skinny_plan import STEPS
from pallas_kernels.skinny_thread import Thread


class Copies(Thread):
    """The work of the two warps that keep rings in shared memory full."""

    def bring_x(self):
        """Copies x, tile after tile: some columns of all rows."""
        plan, each = self.plan, self.plan.cut.x_steps
        start = self.first % (2 * plan.chunks) * (STEPS // 2)

        def windows(i: emit.Int):
            block = (start + i * each) % (plan.chunks * STEPS)
            zero, shape = emit.const(0), (plan.rows, BLOCK)
            return [(zero, zero, (block + j) * BLOCK, shape) for j in range(each)]

        tiles = (self.end - self.first) * (STEPS // 2 // each)
        readers = plan.cut.consumers
        self.bring(
            "x",
            plan.cut.stages,
            plan.x_bytes,
            readers,
            tiles,
            windows,
            plan.cut.x_at_once,
        )

    def bring_codes(self):
        """Copies codes, 256 columns of a tile's features after the other."""
        plan = self.plan

        def windows(i: emit.Int):
            unit = self.first // 2 + i
            row = unit // plan.chunks * plan.features
            column = unit % plan.chunks * CHUNK_BYTES
            return [(self.layer, row, column, (plan.features, CHUNK_BYTES))]

        units, warps = self.end_unit - self.first // 2, plan.cut.workers // 32
        self.bring(
            "codes",
            plan.cut.slots,
            plan.slot_bytes,
            warps,
            units,
            windows,
            plan.cut.at_once,
        )

    def bring(
        self,
        name: str,
        stages: int,
        size: int,
        readers: int,
        total: emit.Int,
        windows: Callable,
        at_once: int,
    ):
        """Keeps a ring full.

        Args:
            name: of the array, of the ring and of its barriers.
            stages: how many it has room for.
            size: bytes of a window.
            readers: who give a stage back.
            total: how many stages are filled.
            at_once: how many are filled before the first has come.
            windows: from its number, of each window of a stage the layer, row, column
                and shape.
        """
        zero, one, leader = emit.const(0), emit.const(1), self.lane == 0
        self.init(f"{name} full", stages, 1)
        self.init(f"{name} empty", stages, readers)
        emit.ptx("fence.mbarrier_init.release.cluster; fence.proxy.async.shared::cta;")

        def start(i: emit.Int, stage: emit.Int):
            barrier = self.at[f"{name} full"] + stage * 8
            parts = windows(i)
            self.expect(barrier, len(parts) * size)
            target = self.at[name] + stage * (len(parts) * size)
            for j, (layer, row, column, shape) in enumerate(parts):
                emit.tma_load(
                    self.ctx,
                    self.refs[name],
                    layer,
                    row,
                    column,
                    shape,
                    target + j * size,
                    barrier,
                    leader,
                )

        def first(i, state):
            start(i, i)
            return state

        def later(i, state):
            stage, parity = map(emit.Int, state)
            self.wait(f"{name} empty", stage, parity)
            start(i, stage)
            return [v.value for v in self.turn(stage, parity, stages)]

        waits, early = at_once < stages, total.min(stages)
        begun = total.min(min(at_once, stages))
        emit.loop(zero, begun, one, [], first)
        emit.barrier()
        if waits:
            # What is needed first is not to share the way with what is needed later.
            self.wait(f"{name} full", zero, zero)
            emit.loop(begun, early, one, [], first)
        emit.loop(early, total, one, [zero.value, zero.value], later)

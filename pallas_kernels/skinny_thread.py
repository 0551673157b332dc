"""Who a thread of the kernel for tens of rows is, and how it waits for others."""

from typing import Any

from pallas_kernels import emit
from pallas_kernels.skinny_plan import SkinnyPlan


class Thread:
    """One thread: its place in the block, its run, addresses and barriers."""

    def __init__(self, plan: SkinnyPlan, ctx, refs: dict[str, Any]):
        self.plan, self.ctx, self.refs = plan, ctx, refs
        self.tid = emit.thread_index()
        self.lane = self.tid % 32
        # The same in all lanes, and the compiler may know it.
        warp = (self.tid // 32).value
        warp = emit.ptx("shfl.sync.idx.b32 $0, $1, 0, 31, -1;", warp, out="r")
        self.warp = emit.Int(warp)
        self.g, self.t = self.lane // 4, self.lane % 4
        # Speaks for its warpgroup.
        self.speaks = emit.both(self.lane == 0, self.warp % 4 == 0)
        # The first of this lane's two rows of 16; the other is two further.
        self.row = self.g // 4 * 8 + self.g % 2 * 4 + self.g // 2 % 2
        smem = emit.address(refs["smem"])
        self.at = {name: smem + at for name, at in plan.smem_offsets.items()}
        self.table = emit.address(refs["table_smem"])
        # The run of halves of units of this block of threads.
        self.block = emit.block_index()
        self.first, self.end = plan.first(self.block), plan.first(self.block + 1)
        # The tile of the first of them, and of the last.
        self.first_tile = self.first // (2 * plan.chunks)
        self.last_tile = (self.end - 1) // (2 * plan.chunks)
        self.end_unit = (self.end + 1) // 2
        self.layer = emit.const(0)
        if "layer" in refs:
            pointer = emit.address(refs["layer"]).value
            self.layer = emit.Int(emit.ptx("ld.global.b32 $0, [$1];", pointer, out="r"))

    def init(self, name: str, stages: int, count: int):
        """Makes barriers that so many arrivals complete."""
        for stage in range(stages):
            emit.ptx(
                "{.reg .pred p; setp.eq.b32 p, $1, 0; @p "
                f"mbarrier.init.shared::cta.b64 [$0+{8 * stage}], {count};}}",
                self.at[name].value,
                self.lane.value,
            )

    def wait(self, name: str, stage: emit.Int, parity: emit.Int):
        """Waits at a barrier of a stage."""
        emit.ptx(
            "{.reg .pred p; WAIT_${:uid}: "
            "mbarrier.try_wait.parity.shared::cta.b64 p, [$0], $1; "
            "@!p bra WAIT_${:uid};}",
            (self.at[name] + stage * 8).value,
            parity.value,
        )

    def test(self, name: str, stage: emit.Int, parity: emit.Int, when):
        """Whether one need not wait at a barrier; 1 too unless `when`."""
        return emit.ptx(
            "{.reg .pred p, q; setp.eq.b32 p, $3, 0; setp.ne.b32 q, $3, 0; "
            "@q mbarrier.test_wait.parity.shared::cta.b64 p, [$1], $2; "
            "selp.b32 $0, 1, 0, p;}",
            (self.at[name] + stage * 8).value,
            parity.value,
            when,
            out="r",
        )

    def wait_unless(self, over, name: str, stage: emit.Int, parity: emit.Int):
        """Waits at a barrier of a stage if a test before, `over`, says so."""
        emit.ptx(
            "{.reg .pred p; setp.ne.b32 p, $2, 0; WAIT_${:uid}: "
            "@!p mbarrier.try_wait.parity.shared::cta.b64 p, [$0], $1; "
            "@!p bra WAIT_${:uid};}",
            (self.at[name] + stage * 8).value,
            parity.value,
            over,
        )

    def arrive(self, name: str, stage: emit.Int, when):
        """Arrives at a barrier of a stage."""
        emit.ptx(
            "{.reg .pred p; setp.ne.b32 p, $1, 0; "
            "@p mbarrier.arrive.shared::cta.b64 _, [$0];}",
            (self.at[name] + stage * 8).value,
            emit.bit(when),
        )

    def expect(self, barrier: emit.Int, size: int):
        """Says at a barrier how many bytes will come."""
        emit.ptx(
            "{.reg .pred p; setp.eq.b32 p, $1, 0; @p "
            f"mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], {size};}}",
            barrier.value,
            self.lane.value,
        )

    @staticmethod
    def turn(stage: emit.Int, parity: emit.Int, stages: int) -> list[emit.Int]:
        """The stage after this one, and the parity of its barriers."""
        wraps = stage == stages - 1
        return [
            emit.select(wraps, emit.const(0), stage + 1),
            parity ^ emit.Int(emit.bit(wraps)),
        ]

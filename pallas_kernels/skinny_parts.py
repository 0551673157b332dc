"""The end of a tile in the kernel for tens of rows: sums of several blocks meet.

A tile's owner is the block that begins it, which is the last to get to it. The others
leave what they have in device memory, and a warp of theirs that has nothing else to do
says so when memory has it. The owner adds parts up, always in the same order.
"""

from pallas_kernels import emit
from pallas_kernels.skinny_thread import Thread


class Parts(Thread):
    """Leaving, collecting and writing of the sums of a tile."""

    def counter(self, block: emit.Int, warp: emit.Int) -> emit.Int:
        """Where it is counted that a block has left the part of a warp."""
        index = block * (self.plan.cut.workers // 32) + warp
        return emit.address(self.refs["counters"]) + index.wide() * 4

    def part(self, block: emit.Int) -> emit.Int:
        """Where a block leaves sums: pieces, of four sums of each thread."""
        where = block.wide() * (4 * self.plan.part_floats)
        return emit.address(self.refs["parts"]) + where

    def bring_parts(self):
        """Says that what this block leaves can be read; copies what another leaves.

        Those who multiply need not wait until memory has the former, and find the
        latter in shared memory when they come to the end of their tile.
        """
        plan, zero = self.plan, emit.const(0)
        warps = plan.cut.workers // 32
        self.init("left", 1, warps)
        self.init("part full", 1, 1)
        emit.ptx("fence.mbarrier_init.release.cluster; fence.proxy.async.shared::cta;")
        emit.barrier()
        owner, _ = plan.sharers(self.first_tile)
        mine, lane = emit.bit(self.lane < warps), self.lane.min(warps - 1)

        def announce():
            self.wait("left", zero, zero)
            emit.ptx("fence.acq_rel.gpu;")
            emit.ptx(
                "{.reg .pred p; setp.ne.b32 p, $1, 0; "
                "@p red.relaxed.gpu.global.add.u32 [$0], 1;}",
                self.counter(self.block, lane).value,
                mine,
            )

        emit.branch(owner < self.block, announce, lambda: None)
        if not plan.fetches:
            return
        owner, last = plan.sharers(self.last_tile)

        def fetch():
            # The part of the last sharer, which has mostly left it long ago.
            self.wait_for_part(last, lane)
            emit.ptx("fence.proxy.async;")
            barrier = self.at["part full"]
            self.expect(barrier, plan.part_bytes)
            emit.ptx(
                "{.reg .pred p; setp.eq.b32 p, $3, 0; @p "
                "cp.async.bulk.shared::cluster.global.mbarrier"
                f"::complete_tx::bytes [$0], [$1], {plan.part_bytes}, [$2];}}",
                self.at["part"].value,
                self.part(last).value,
                barrier.value,
                self.lane.value,
            )

        collects = emit.both(owner == self.block, owner < last)
        emit.branch(collects, fetch, lambda: None)

    def wait_for_part(self, block: emit.Int, warp: emit.Int):
        """Waits until a block has left the part of a warp."""
        counter = self.counter(block, warp).value
        emit.ptx(
            "{.reg .pred p; .reg .b32 n; COUNT_${:uid}: "
            "ld.acquire.gpu.global.b32 n, [$0]; setp.lt.u32 p, n, $1; "
            "@p bra COUNT_${:uid};}",
            counter,
            emit.const(1).value,
        )
        emit.ptx("bar.warp.sync -1;")
        # As it was: the next call finds it so.
        emit.ptx("st.global.b32 [$0], $1;", counter, emit.const(0).value)

    def finish(self, tile: emit.Int, sums: list):
        """Writes sums of a tile to y, or leaves them to the block that began it.

        That block is the last to get to it.
        """
        plan, zero, one = self.plan, emit.const(0), emit.const(1)
        owner, last = plan.sharers(tile)
        others = last - owner

        def leave():
            where = self.part(self.block) + (self.tid * 16).wide()
            for i in range(0, len(sums), 4):
                emit.ptx(
                    f"st.global.cg.v4.f32 [$0+{i // 4 * plan.piece_bytes}], "
                    "{$1, $2, $3, $4};",
                    where.value,
                    *sums[i : i + 4],
                )
            emit.ptx("bar.warp.sync -1;")
            self.arrive("left", zero, self.lane == 0)

        def load(state, where):
            part = []
            for i in range(0, len(sums), 4):
                part += emit.ptx(
                    f"ld.{state}.v4.f32 {{$0, $1, $2, $3}}, "
                    f"[$4+{i // 4 * plan.piece_bytes}];",
                    where.value,
                    out="ffff",
                )
            return part

        def add(sums, part):
            return [
                emit.ptx("add.rn.f32 $0, $1, $2;", *pair, out="f")
                for pair in zip(sums, part, strict=True)
            ]

        def fetched(i, sums):
            self.wait("part full", zero, zero)
            return add(sums, load("shared", self.at["part"] + self.tid * 16))

        def read(i, state):
            block = owner + 1 + i
            self.wait_for_part(block, self.warp)
            part = load("global.cg", self.part(block) + (self.tid * 16).wide())
            if len(state) == len(sums):
                return add(state, part)
            # The one before has come meanwhile.
            return add(state[: len(sums)], state[len(sums) :]) + part

        def collect():
            count, total = others, sums
            if plan.fetches:
                total = emit.loop(zero, others.min(1), one, total, fetched)
                count = others - others.min(1)
            if plan.reads_ahead:
                total = total + [emit.zero()] * len(sums)
                total = emit.loop(zero, count, one, total, read)
                total = add(total[: len(sums)], total[len(sums) :])
            else:
                total = emit.loop(zero, count, one, total, read)
            self.write(tile, total)

        emit.branch(self.block == owner, collect, leave)

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

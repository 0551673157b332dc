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

    def announce(self):
        """Says that the part this block leaves can be read, if it leaves one.

        A warp that has nothing else to do waits until memory has it.
        """
        plan, zero = self.plan, emit.const(0)
        warps = plan.cut.workers // 32
        self.init("left", 1, warps)
        emit.ptx("fence.mbarrier_init.release.cluster;")
        emit.barrier()
        owner, _ = plan.sharers(self.first_tile)

        def count():
            self.wait("left", zero, zero)
            emit.ptx("fence.acq_rel.gpu;")
            emit.ptx(
                "{.reg .pred p; setp.ne.b32 p, $1, 0; "
                "@p red.relaxed.gpu.global.add.u32 [$0], 1;}",
                self.counter(self.block, self.lane.min(warps - 1)).value,
                emit.bit(self.lane < warps),
            )

        emit.branch(owner < self.block, count, lambda: None)

    def wait_for_part(self, block: emit.Int, warp: emit.Int):
        """Waits until a block has left the part of a warp; both may differ by lane."""
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

        def read(i):
            where, part = self.part(owner + 1 + i) + (self.tid * 16).wide(), []
            for j in range(0, len(sums), 4):
                part += emit.ptx(
                    "ld.global.cg.v4.f32 {$0, $1, $2, $3}, "
                    f"[$4+{j // 4 * plan.piece_bytes}];",
                    where.value,
                    out="ffff",
                )
            return part

        def add(sums, part):
            return [
                emit.ptx("add.rn.f32 $0, $1, $2;", *pair, out="f")
                for pair in zip(sums, part, strict=True)
            ]

        def collect():
            def arrived(i, state):
                # A lane waits for a block: all answers are under way together.
                block = owner + 1 + i + self.lane
                block = emit.select(block < last, block, last)
                self.wait_for_part(block, self.warp)
                return state

            def add_one(i, sums):
                return add(sums, read(i))

            def add_the_one_before(i, state):
                part = read(i)
                return add(state[: len(sums)], state[len(sums) :]) + part

            emit.loop(zero, others, emit.const(32), [], arrived)
            if plan.reads_ahead:
                state = [*sums, *[emit.zero()] * len(sums)]
                state = emit.loop(zero, others, one, state, add_the_one_before)
                total = add(state[: len(sums)], state[len(sums) :])
            else:
                total = emit.loop(zero, others, one, sums, add_one)
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

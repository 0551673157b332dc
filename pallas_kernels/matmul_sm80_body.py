"""What one thread of the Ampere matmul does; see `matmul_sm80`.

The contracted axis is walked 64 numbers a part of a step, four products of 16 a part. A
warp owns all 128 rows of x of a tile and 32 features. Lane 4 g + q of it

    reads from x    rows 8 i + g, numbers 16 q to 16 q + 15 of a part
    decodes         features 4 g to 4 g + 3, the same numbers

so that which numbers meet in a product is a matter of order alone: product 2 h + u
takes numbers 16 q + 8 h + 4 u + {0, 1} for columns 2 q, 2 q + 1 of `mma`'s operands and
the next two for columns 2 q + 8, 2 q + 9. The weight is its first operand, whose rows
g and g + 8 are neighbouring features, x the second. So x is loaded 16 bytes at a time
and is an operand as it comes, and a lane's results are four neighbouring features.

In which order decoding and `mma` are emitted here hardly matters: the assembler has an
order of its own. What does is how many instructions there are.
"""

import functools
import itertools
from typing import Any

from pallas_kernels import emit
from pallas_kernels.matmul_sm80_copies import STEP, TILE_M, TILE_N, WARP, Copies

_ROWS = TILE_M // 8  # tiles of `mma` along the rows of x
_FEATURES = WARP // 16  # along the features
_LANE_FEATURES = 4
_HIGH = 0xF0F0F0F0  # lop3 0xe4: these bits of the first, the others of the second


class Body(Copies):
    """Emits the kernel of one plan, for one thread."""

    def __init__(self, plan: Any, refs: dict[str, Any]):
        super().__init__(plan, refs)
        # A byte of codes above it is an offset in the table, or twice one.
        self.low = (self.lane * (1024 // self.config.row_bytes)).value

    def read(self, address: emit.Int, at: int, words: int) -> list:
        """Words of shared memory, two or four."""
        names = ", ".join(f"${i}" for i in range(words))
        text = f"ld.shared.v{words}.b32 {{{names}}}, [${words}+{at}];"
        return list(emit.ptx(text, address.value, out="r" * words))

    def read_x(self, stage: emit.Int, part: int, h: int, i: int) -> list:
        """Numbers 16 q + 8 h to + 7 of row 8 i + g of x, four words."""
        address = stage + self.g * 128 + self.q * 32 + (self.g + h) % 2 * 16
        return self.read(address, part * self.plan.x_bytes + 8 * i * 128, 4)

    def read_codes(self, stage: emit.Int, part: int) -> list:
        """Words of the lane's 16 numbers of four features (forward only)."""
        plan = self.plan
        address = stage + (plan.x_bytes * self.config.parts + part * plan.codes_bytes)
        address = address + self.warp * (WARP * 32) + self.q * 8
        words = []
        for j in range(_LANE_FEATURES):
            words += self.read(address + (self.g ^ j) * 32, j * 256, 2)
        return words

    def read_row_pairs(self, stage: emit.Int, part: int, h: int) -> list:
        """Of products 2 h and 2 h + 1, two words each (transposed).

        Returns:
            Of even and of odd features, bytes of two codes each, those of neighbouring
            rows of W: of features 0 and 2 (1 and 3) and the first two of a product's
            four rows, then of the next two.
        """
        # A matrix of `ldmatrix` has 16 bytes, the warp's features, of two rows for each
        # q, and a lane gets its own two bytes of both: of rows 0 and 2, or of 1 and 3.
        place, matrix = self.lane % 8, self.lane // 8
        row = place // 2 * 16 + h * 8 + matrix // 2 * 4 + place % 2 * 2 + matrix % 2
        start = self.plan.x_bytes * self.config.parts + part * self.plan.codes_bytes
        address = stage + start + self.row_place(row, self.warp)
        found = emit.ptx(
            "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {$0, $1, $2, $3}, [$4];",
            address.value,
            out="rrrr",
        )
        words = []
        for pair in (found[:2], found[2:]):
            words += emit.ptx(
                "{.reg .b32 a; "
                f"shr.b32 a, $3, 4; lop3.b32 $0, $2, a, {_HIGH}, 0xe4; "
                f"shl.b32 a, $2, 4; lop3.b32 $1, a, $3, {_HIGH}, 0xe4;}}",
                *pair,
                out="rr",
            )
        return words

    def read_scales(self, stage: emit.Int, part: int) -> list:
        """Pairs: of the lane's four features, or, transposed, of its 16 rows of W."""
        plan, parts = self.plan, self.config.parts
        address = stage + (plan.x_bytes + plan.codes_bytes) * parts
        address = address + part * plan.scales_bytes
        if plan.transposed:
            block = self.warp * WARP // plan.scale_width
            address = address + block * (2 * STEP) + self.q * 32
            return [word for at in (0, 16) for word in self.read(address, at, 4)]
        block = self.q * 16 // plan.scale_width
        feature = self.warp * WARP + self.g * _LANE_FEATURES
        return self.read(address + (block * TILE_N + feature) * 4, 0, 4)

    def look_up(self, word, byte: int):
        """The two numbers of a byte, from this lane's copy of the table."""
        # From the low byte up: the lane's place in a row, the row, two zeros.
        selector = 0x5504 | byte << 4
        shift = {256: "", 128: "shr.u32 a, a, 1; "}[self.config.row_bytes]
        return emit.ptx(
            f"{{.reg .b32 a; prmt.b32 a, $1, $2, {selector}; {shift}add.u32 a, a, $3; "
            "ld.shared.b32 $0, [a];}",
            word,
            self.low,
            self.table.value,
            out="r",
        )

    def decode(self, t: int, words: list, scales: list) -> list:
        """Decodes product t's numbers of four features.

        Args:
            t: which of a part's products.
            words: what `read_codes` or `read_row_pairs` returns.
            scales: what `read_scales` returns.

        Returns:
            Four registers for each two features, the first operand of `mma`.
        """
        h, u = t // 2, t % 2
        found = []
        for pair, r, e in itertools.product(range(_FEATURES), range(2), range(2)):
            j = 2 * pair + e
            if self.plan.transposed:
                word, byte = words[2 * u + j % 2], 2 * r + j // 2
                scale = scales[4 * h + 2 * u + r]
            else:
                word, byte = words[2 * j + h], 2 * u + r
                scale = scales[j]
            found.append((self.look_up(word, byte), scale))
        return [self.scaled(*one) for one in found]

    def scaled(self, pair, scale):
        """The product of two pairs, rounded: bfloat16 has no `mul` before Hopper."""
        minus_zero = emit.const(0x80008000).value
        text = f"fma.rn.{self.half}x2 $0, $1, $2, $3;"
        return emit.ptx(text, pair, scale, minus_zero, out="r")

    def multiply_row(self, t: int, x: list, weight: list, sums: list, i: int):
        """Adds product t of all features and 8 rows to their sums, in place."""
        for j in range(_FEATURES):
            at, u = 4 * (i * _FEATURES + j), t % 2
            # Not pure, so that it stays where it is until the assembler sees it.
            sums[at : at + 4] = emit.ptx(
                f"mma.sync.aligned.m16n8k16.row.col.f32.{self.half}.{self.half}.f32 "
                "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
                *weight[4 * j : 4 * j + 4],
                *x[2 * u : 2 * u + 2],
                *sums[at : at + 4],
                out="ffff",
            )

    def step(self, number, phase, following, load, state: "State") -> "State":
        """All of a step: its products, and the loads of those to come.

        Args:
            number: of the stage that it is in.
            phase: of that stage.
            following: number and phase of the next.
            load: starts the copies of the next step.
            state: what is carried.
        """
        parts = self.config.parts
        stage, last = self.stage(number), 4 * parts - 1
        for t in range(4 * parts):
            part, h = (t + 1) // 4 % parts, (t + 1) // 2 % 2  # of the next product
            if t == 0:
                # The phase that ended when what was there had been read.
                self.wait(self.read_out, following[0], phase)
                load()
            if t == last:
                # All of this step is in registers.
                self.release(number)
                self.wait(self.come, *following)
                stage = self.stage(following[0])
            if t % 4 == 3:
                state.scales = self.read_scales(stage, part)
            if self.plan.transposed and t % 2:
                state.words = self.read_row_pairs(stage, part, h)
            elif t % 4 == 3:
                state.words = self.read_codes(stage, part)
            weight = self.decode((t + 1) % 4, state.words, state.scales)
            for i, x in enumerate(state.x):
                self.multiply_row(t % 4, x, state.weight, state.sums, i)
                if t % 2:
                    state.x[i] = self.read_x(stage, part, h, i)
            state.weight = weight
        return state

    def start(self) -> "State":
        """Loads what the first product needs."""
        zero = emit.const(0)
        self.wait(self.come, zero, zero)
        stage = self.stage(zero)
        scales = self.read_scales(stage, 0)
        if self.plan.transposed:
            words = self.read_row_pairs(stage, 0, 0)
        else:
            words = self.read_codes(stage, 0)
        weight = self.decode(0, words, scales)
        x = [self.read_x(stage, 0, 0, i) for i in range(_ROWS)]
        sums = [emit.zero()] * (4 * _ROWS * _FEATURES)
        return State(sums, x, weight, words, scales)

    def run(self):
        """Emits everything."""
        plan = self.plan
        zero, one = emit.const(0), emit.const(1)
        block = emit.block_index()
        self.make_barriers()
        self.load(zero, self.place(block), zero)
        self.fill_table()
        emit.barrier()
        state = self.start()
        sums = list(state.sums)

        def tile(number, carry):
            """One tile of this block, with the first step of the next in flight."""
            now = state.unflatten([*sums, *carry[:-2]])
            here, there = self.place(number), self.place(number + plan.blocks)

            def step(i, carry):
                *carry, stage, phase = carry
                stage, phase = emit.Int(stage), emit.Int(phase)
                following = self.after(stage, phase)
                same = i + 1 < plan.steps
                row, column = (
                    emit.select(same, a, b) for a, b in zip(here, there, strict=True)
                )
                copied = emit.select(same, i + 1, zero)
                load = functools.partial(self.load, following[0], (row, column), copied)
                done = now.unflatten(carry)
                done = self.step(stage, phase, following, load, done)
                return [*done.flatten(), *(value.value for value in following)]

            carry = [*now.flatten(), *carry[-2:]]
            carry = emit.loop(zero, emit.const(plan.steps), one, carry, step)
            self.store(carry[: len(sums)], here)
            return carry[len(sums) :]

        carry = [*state.flatten()[len(sums) :], zero.value, zero.value]
        emit.loop(block, emit.const(plan.tiles), emit.const(plan.blocks), carry, tile)

    def store(self, sums: list, place: tuple[emit.Int, emit.Int]):
        """Writes y: a lane has four neighbouring columns of each of its rows."""
        plan = self.plan
        y = emit.address(self.refs["y"])
        column = place[1] + self.warp * WARP + self.g * _LANE_FEATURES
        for i in range(_ROWS):
            for r in range(2):
                row = place[0] + self.q * 2 + (8 * i + r)
                pointer = y + row.wide() * (2 * plan.columns) + column.wide() * 2
                first = 4 * i * _FEATURES + r
                emit.ptx(
                    "{.reg .pred p; .reg .b32 w0, w1; setp.ne.b32 p, $5, 0; "
                    f"cvt.rn.{self.half}x2.f32 w0, $2, $1; "
                    f"cvt.rn.{self.half}x2.f32 w1, $4, $3; "
                    "@p st.global.v2.b32 [$0], {w0, w1};}",
                    pointer.value,
                    *sums[first : first + 4 * _FEATURES : 2],
                    emit.bit(emit.both(row < plan.m, column < plan.columns)),
                )


class State:
    """What a thread carries from step to step.

    Attributes:
        sums: four for each 8 rows and 16 features.
        x: for each 8 rows, the second operand of this product and the next.
        weight: four registers for each 16 features, the first operand of the next.
        words: codes of the part, or, transposed, of this product and the next.
        scales: the part's scales.
    """

    def __init__(self, sums, x, weight, words, scales):
        self.sums, self.x, self.weight = list(sums), [*x], list(weight)
        self.words, self.scales = list(words), list(scales)

    def flatten(self) -> list:
        """All values in one list."""
        x = [word for rows in self.x for word in rows]
        parts = (self.sums, x, self.weight, self.words, self.scales)
        return [value for part in parts for value in part]

    def unflatten(self, values: list) -> "State":
        """The same structure of other values."""
        values, parts = list(values), []
        x = len(self.x) * 4
        sizes = [
            len(part) for part in (self.sums, self.weight, self.words, self.scales)
        ]
        for size in (sizes[0], x, *sizes[1:]):
            parts.append(values[:size])
            values = values[size:]
        parts[1] = [parts[1][i : i + 4] for i in range(0, x, 4)]
        return State(*parts)

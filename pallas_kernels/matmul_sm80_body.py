"""What one thread of the Ampere matmul does; see `matmul_sm80`.

The contracted axis is walked 64 numbers a step, four products of 16 a step. A warp owns
64 rows of x and 64 features of the result. Lane 4 g + q of it

    reads from x    rows 8 i + g, numbers 16 q to 16 q + 15 of a step
    decodes         features 8 g to 8 g + 7, the same numbers

so that which numbers meet in a product is a matter of order alone: product 2 h + u
takes numbers 16 q + 8 h + 4 u + {0, 1} for columns 2 q, 2 q + 1 of `mma`'s operands and
the next two for columns 2 q + 8, 2 q + 9. The weight is its first operand, whose rows
g and g + 8 are neighbouring features, x the second. So all loads are of 8 or 16 bytes
that are an operand as they come, and a lane's results are eight neighbouring features.
"""

import itertools
from collections.abc import Iterator
from typing import Any

from pallas_kernels import emit
from pallas_kernels.matmul_sm80_copies import (
    CODES_BYTES,
    STAGES,
    STEP,
    TILE_N,
    WARP,
    X_BYTES,
    Copies,
)

_ROWS = WARP // 8  # tiles of `mma` along the rows of x
_FEATURES = WARP // 16  # along the features
_LANE_FEATURES = 8
_LAG = 3  # pairs looked up before the first of them is scaled
_HIGH, _LOW = 0xF0F0F0F0, 0x0F0F0F0F


class Body(Copies):
    """Emits the kernel of one plan, for one thread."""

    def __init__(self, plan: Any, refs: dict[str, Any]):
        super().__init__(plan, refs)
        self.lane4 = (self.lane * 4).value

    def read(self, address: emit.Int, at: int, words: int) -> list:
        """Words of shared memory."""
        names = ", ".join(f"${i}" for i in range(words))
        text = f"ld.shared.v{words}.b32 {{{names}}}, [${words}+{at}];"
        if words == 1:
            text = f"ld.shared.b32 $0, [$1+{at}];"
            return [emit.ptx(text, address.value, out="r")]
        return list(emit.ptx(text, address.value, out="r" * words))

    def read_x(self, stage: emit.Int, h: int, i: int) -> list:
        """Numbers 16 q + 8 h to + 7 of row 8 i + g of x, four words."""
        row = self.warp_m * WARP + self.g
        address = stage + row * 128 + self.q * 32 + (self.g + h) % 2 * 16
        return self.read(address, 8 * i * 128, 4)

    def read_codes(self, stage: emit.Int) -> list:
        """Words of the lane's 16 numbers of eight features (forward only)."""
        address = stage + X_BYTES + self.warp_n * (WARP * 32) + self.q * 8
        words = []
        for j in range(_LANE_FEATURES):
            place = address + (self.g ^ j % 4) * 32
            words += self.read(place, j * 256, 2)
        return words

    def read_row_pairs(self, stage: emit.Int, t: int) -> list:
        """Of two pairs of rows of W, bytes of even and of odd features (transposed)."""
        row = self.q * 16 + t // 2 * 8 + t % 2 * 4
        pitch = TILE_N // 2
        # Where a row lies depends on its last bit, and on the bits above the third.
        even, odd = (
            stage + X_BYTES + self.row_place(row + i, self.warp_n) for i in range(2)
        )
        words = []
        for r in (0, 2):
            pair = [
                self.read(address + self.g * 4, r * pitch, 1)[0]
                for address in (even, odd)
            ]
            words += emit.ptx(
                "{.reg .b32 a, b; "
                f"and.b32 a, $2, {_HIGH}; shr.b32 b, $3, 4; and.b32 b, b, {_LOW}; "
                "or.b32 $0, a, b; "
                f"shl.b32 a, $2, 4; and.b32 a, a, {_HIGH}; and.b32 b, $3, {_LOW}; "
                "or.b32 $1, a, b;}",
                *pair,
                out="rr",
            )
        return words

    def read_scales(self, stage: emit.Int) -> list:
        """Eight pairs: of the lane's features, or, transposed, of its 16 rows of W."""
        plan = self.plan
        address = stage + (X_BYTES + CODES_BYTES)
        blocks = WARP // plan.scale_width  # of a warp
        if plan.transposed:
            block = self.warp_n * blocks + self.g * 8 // plan.scale_width
            address = address + block * (2 * STEP) + self.q * 32
        else:
            block = self.q * 16 // plan.scale_width
            feature = self.warp_n * WARP + self.g * 8
            address = address + (block * TILE_N + feature) * 4
        return [word for at in (0, 16) for word in self.read(address, at, 4)]

    def look_up(self, word, byte: int):
        """The two numbers of a byte, from this lane's copy of the table."""
        # From the low byte up: the lane's place in a row, the row, two zeros.
        selector = 0x5504 | byte << 4
        return emit.ptx(
            f"{{.reg .b32 a; prmt.b32 a, $1, $2, {selector}; add.u32 a, a, $3; "
            "ld.shared.b32 $0, [a];}",
            word,
            self.lane4,
            self.table.value,
            out="r",
        )

    def decode(self, t: int, words: list, scales: list, out: list) -> Iterator[None]:
        """Decodes product t's numbers of eight features, a pair at a time.

        Args:
            t: which of a step's products.
            words: what `read_codes` or `read_row_pairs` returns.
            scales: what `read_scales` returns.
            out: gets four registers for each two features, the first operand of `mma`.
        """
        h, u = t // 2, t % 2
        found = []
        for pair in range(_FEATURES):
            for r, e in itertools.product(range(2), repeat=2):
                j = 2 * pair + e
                if self.plan.transposed:
                    word, byte = words[2 * r + j % 2], j // 2
                    scale = scales[4 * h + 2 * u + r]
                else:
                    word, byte = words[2 * j + h], 2 * u + r
                    scale = scales[j]
                found.append((self.look_up(word, byte), scale))
                if len(found) > _LAG:
                    out.append(self.scaled(*found.pop(0)))
                yield
        out += [self.scaled(*one) for one in found]

    def scaled(self, pair, scale):
        """The product of two pairs, rounded: bfloat16 has no `mul` before Hopper."""
        minus_zero = emit.const(0x80008000).value
        text = f"fma.rn.{self.half}x2 $0, $1, $2, $3;"
        return emit.ptx(text, pair, scale, minus_zero, out="r")

    def multiply(self, t: int, x: list, weight: list, sums: list, i: int, j: int):
        """Adds product t of 16 features and 8 rows to four of the sums, in place."""
        at, u = 4 * (i * _FEATURES + j), t % 2
        # Not pure, so that it stays where it is until the assembler sees it.
        sums[at : at + 4] = emit.ptx(
            f"mma.sync.aligned.m16n8k16.row.col.f32.{self.half}.{self.half}.f32 "
            "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
            *weight[4 * j : 4 * j + 4],
            *x[i][2 * u : 2 * u + 2],
            *sums[at : at + 4],
            out="ffff",
        )

    def product(self, t: int, state: "State", decoding: Iterator, reads, wait: int):
        """Product t of a step, and what is to be done meanwhile.

        Args:
            t: which of the four.
            state: sums, operands.
            decoding: the next product's numbers.
            reads: the stage and the half that x is read of next, if it is now.
            wait: how many `mma`s before decoding starts.
        """
        x, total = list(state.x), _ROWS * _FEATURES
        done, pairs = 0, 2 * _LANE_FEATURES
        for i in range(_ROWS):
            for j in range(_FEATURES):
                self.multiply(t, x, state.weight, state.sums, i, j)
                count = i * _FEATURES + j + 1 - wait
                while done * (total - wait) < count * pairs:
                    next(decoding, None)
                    done += 1
            if reads:
                state.x[i] = self.read_x(reads[0], reads[1], i)
        next(decoding, None)

    def step(self, step: emit.Int, state: "State") -> "State":
        """All of a step: its four products, and the loads of those to come."""
        plan = self.plan
        stage = self.stage(step)
        for t in range(4):
            weight: list = []
            wait = 0
            if t == 0:
                # Into the stage that the step before was in.
                self.wait(self.read_out, step + (STAGES - 1), step // STAGES)
                self.load(step + (STAGES - 1))
            if t == 3:
                # All of this step is in registers.
                self.release(step)
                self.wait(self.come, step + 1, (step + 1) // STAGES)
                stage = self.stage(step + 1)
                state.scales = self.read_scales(stage)
                if not plan.transposed:
                    state.words = self.read_codes(stage)
                wait = 2 * _FEATURES
            reads = (stage, (t + 1) // 2 % 2) if t % 2 else None
            words = state.words
            if plan.transposed:
                words = self.read_row_pairs(stage, (t + 1) % 4)
            decoding = self.decode((t + 1) % 4, words, state.scales, weight)
            self.product(t, state, decoding, reads, wait)
            state.weight = weight
        return state

    def run(self):
        """Emits everything."""
        plan = self.plan
        zero, one = emit.const(0), emit.const(1)
        self.make_barriers()
        for i in range(STAGES - 1):
            self.load(emit.const(i))
        self.fill_table()
        emit.barrier()
        self.wait(self.come, zero, zero)
        stage = self.stage(zero)
        scales = self.read_scales(stage)
        words = read = [] if plan.transposed else self.read_codes(stage)
        if plan.transposed:
            read = self.read_row_pairs(stage, 0)
        weight: list = []
        for _ in self.decode(0, read, scales, weight):
            pass
        x = [self.read_x(stage, 0, i) for i in range(_ROWS)]
        sums = [emit.zero()] * (4 * _ROWS * _FEATURES)
        state = State(sums, x, weight, words, scales)

        def body(step, carry):
            return self.step(step, state.unflatten(carry)).flatten()

        carry = emit.loop(zero, emit.const(plan.steps), one, state.flatten(), body)
        self.store(state.unflatten(carry).sums)

    def store(self, sums: list):
        """Writes y: a lane has eight neighbouring columns of each of its rows."""
        plan = self.plan
        y = emit.address(self.refs["y"])
        column = self.column0 + self.warp_n * WARP + self.g * _LANE_FEATURES
        convert = "".join(
            f"cvt.rn.{self.half}x2.f32 w{j}, ${2 * j + 2}, ${2 * j + 1}; "
            for j in range(4)
        )
        for i in range(_ROWS):
            for r in range(2):
                row = self.row0 + self.warp_m * WARP + self.q * 2 + (8 * i + r)
                pointer = y + row.wide() * (2 * plan.columns) + column.wide() * 2
                first = 4 * i * _FEATURES + r
                emit.ptx(
                    "{.reg .pred p; .reg .b32 w0, w1, w2, w3; "
                    f"setp.ne.b32 p, $9, 0; {convert}"
                    "@p st.global.v4.b32 [$0], {w0, w1, w2, w3};}",
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
        words: the step's codes (forward).
        scales: the step's scales.
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

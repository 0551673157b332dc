"""One thread's work in a step of Adam or Lion with moments in 8 bits.

A warp holds a block of 256 numbers, eight a lane: it decodes the moments, updates them,
finds the new absmax and encodes. Codes and scales are written where they
were read. What a number costs beside its arithmetic:

* decoding is a look-up in shared memory, one copy of the table a lane (entry `c` of
  lane `l` at byte `128 c + 4 l`: no bank conflicts);
* the nearest code is another: the bits of |x| in [0, 1], as an integer, are cut into
  equal intervals so small that none holds two limits between codes. An entry is the
  code at the start of the interval, and the low bits of the limit in it, above which
  the next code follows: one comparison of integers decides;
* x / absmax is the product with the rounded reciprocal, and the root and quotient of
  Adam's update are the hardware's approximations, within a unit in the last place each.
"""

import dataclasses
import functools
import itertools
from typing import Any

import numpy as np

from pallas_kernels import emit
from pallas_kernels.words import half_of, narrow, widen

Codebooks = tuple[tuple[float, ...], ...]

BLOCK_SIZE = 256
QUAD = 4  # numbers a lane takes at once, of each half of a block
THREADS = 1024
_COPIES = 32 * 4  # bytes of an entry's copies
_SMALLEST_ABSMAX = "0f006CE3EE"  # 1e-38, what `encode` of the moments calls empty
_INFINITY, _ONE = "0f7F800000", "0f3F800000"


@dataclasses.dataclass(frozen=True)
class CodeTable:
    """Nearest codes by the bits of a magnitude in [0, 1].

    Attributes:
        entries: uint32, for each interval the code at its start, and in the high bits
            the low bits of the last number of that code. With a sign the intervals of
            negative numbers follow those of positive ones.
        shift: low bits, that do not count in the number of an interval.
        base: bits of the magnitude that the first interval starts at; smaller ones
            have its code.
        zero: the code of 0.
    """

    entries: np.ndarray
    shift: int
    base: int
    zero: int

    @property
    def signed(self) -> bool:
        """Whether there are negative numbers."""
        return self.zero > 0

    @property
    def intervals(self) -> int:
        """How many intervals a sign has."""
        return len(self.entries) // (2 if self.signed else 1)


@functools.lru_cache
def code_table(codebook: tuple[float, ...]) -> CodeTable:
    """Makes the table of a codebook of 256 ascending numbers with a 0, up to 1.

    A tie goes to the lower code, and a negative number never to that of zero.
    """
    values = np.asarray(codebook, np.float32)
    limits = ((values[1:] + values[:-1]) / np.float32(2)).astype(np.float32)
    zero = int(np.flatnonzero(values == 0)[0])
    # For each sign the code nearest to zero, the step, and the last number of each code
    rows = [(zero, 1, limits[zero:])]
    if zero:
        # Here a tie goes away from zero: the last number is the one below the limit.
        below = np.nextafter(-limits[:zero][::-1], np.float32(0))
        rows.append((zero - 1, -1, below[1:]))
    smallest = min(float(last[0]) for _, _, last in rows)
    base = int(np.float32(smallest).view(np.uint32)) >> 23 << 23
    one = int(np.float32(1).view(np.uint32))
    for shift in range(23, 8, -1):
        starts = np.arange(base >> shift, (one >> shift) + 1, dtype=np.int64) << shift
        entries = []
        for code, step, last in rows:
            bits = last.view(np.uint32).astype(np.int64)
            before = np.searchsorted(bits, starts)
            # A limit on the last number of an interval is one between intervals.
            after = np.searchsorted(bits, starts + (1 << shift) - 1)
            if np.any(after - before > 1):
                break
            low = bits[np.minimum(before, len(bits) - 1)] & ((1 << shift) - 1)
            low = np.where(after > before, low, (1 << shift) - 1)
            entries.append(low << (32 - shift) | code + step * before)
        else:
            table = np.concatenate(entries).astype(np.uint32)
            return CodeTable(table, shift, base, zero)
    raise NotImplementedError("two limits of the codebook are nearer than 2**-15.")


class Step:
    """Emits a step over all blocks; a subclass has the rule of an optimizer."""

    name: str
    num_factors: int

    def __init__(
        self,
        codebooks: Codebooks,
        size: int,
        dtype,
        blocks_of_threads: int,
        refs: dict[str, Any],
    ):
        self.tables = [code_table(codebook) for codebook in codebooks]
        self.size, self.refs = size, refs
        self.half = half_of(dtype)
        self.g_bytes = 2 if self.half else 4
        self.lane = emit.thread_index() % 32
        self.warps = blocks_of_threads * (THREADS // 32)

    def rule(self, g, moments: list) -> tuple[Any, list]:
        """Emits the rule for one number: the update and the new moments."""
        raise NotImplementedError

    def build(self):
        """Emits the kernel."""
        self.copy_tables()
        pointer = emit.address(self.refs["factors"]).value
        self.factors = [
            emit.ptx(f"ld.global.nc.f32 $0, [$1 + {4 * i}];", pointer, out="f")
            for i in range(self.num_factors)
        ]
        emit.barrier()
        warp = emit.thread_index() // 32
        first = emit.block_index() * (THREADS // 32) + warp

        def body(block, loaded):
            # The next block travels while this one is computed.
            after = self.load(block + self.warps)
            self.finish(block, loaded)
            return after

        emit.loop(
            first,
            emit.const(-(-self.size // BLOCK_SIZE)),
            emit.const(self.warps),
            self.load(first),
            body,
        )

    def copy_tables(self):
        """Fills shared memory: numbers of each map in a copy a lane, then intervals."""
        tid = emit.thread_index()
        source = emit.address(self.refs["table"])
        shared = emit.address(self.refs["smem"])
        for start in range(0, 256 * len(self.tables) * 8, THREADS):
            index = tid + start
            value = emit.ptx(
                "ld.global.nc.b32 $0, [$1];",
                (source + (index // 8 * 4).wide()).value,
                out="r",
            )
            target = shared + index * 16
            emit.ptx("st.shared.v4.b32 [$0], {$1, $1, $1, $1};", target.value, value)
        source += 256 * 4 * len(self.tables)
        intervals = shared + 256 * _COPIES * len(self.tables)
        words = sum(len(table.entries) for table in self.tables)
        for start in range(0, words, THREADS):
            index = tid + start
            emit.ptx(
                "{.reg .pred p; .reg .b32 a; setp.ne.b32 p, $2, 0; "
                "@p ld.global.nc.b32 a, [$0]; @p st.shared.b32 [$1], a;}",
                (source + (index * 4).wide()).value,
                (intervals + index * 4).value,
                emit.bit(index < words),
            )
        self.numbers = [
            shared + 256 * _COPIES * i + self.lane * 4 for i in range(len(self.tables))
        ]
        self.intervals = []
        for table in self.tables:
            # Less the number of the first interval, which the bits count from 0.
            first = 4 * (table.base >> table.shift)
            self.intervals.append(intervals - first)
            intervals += 4 * len(table.entries)

    def places(self, block: emit.Int):
        """For each half of a block, the lane's first number there, and if there is."""
        for half in range(2):
            index = block * BLOCK_SIZE + self.lane * QUAD + half * (BLOCK_SIZE // 2)
            yield index, emit.bit(index < self.size)

    def load(self, block: emit.Int) -> list:
        """The gradients, codes and scales of a block, those past the end zero."""
        gradients, codes = [], [[] for _ in self.tables]
        count = self.g_bytes  # words of four numbers
        results = ", ".join(f"${i}" for i in range(count))
        zeros = " ".join(f"mov.b32 ${i}, 0;" for i in range(count))
        for index, valid in self.places(block):
            place = emit.address(self.refs["g"]) + index.wide() * self.g_bytes
            gradients += emit.ptx(
                f"{{.reg .pred p; setp.ne.b32 p, ${count + 1}, 0; {zeros} @p "
                f"ld.global.nc.L1::no_allocate.v{count}.b32 {{{results}}}, "
                f"[${count}];}}",
                place.value,
                valid,
                out="r" * count,
            )
            for i, table in enumerate(self.tables):
                place = emit.address(self.refs[f"codes{i}"]) + index.wide()
                codes[i].append(
                    emit.ptx(
                        "{.reg .pred p; setp.ne.b32 p, $2, 0; "
                        f"mov.b32 $0, {table.zero * 0x01010101}; "
                        "@p ld.global.L1::no_allocate.b32 $0, [$1];}",
                        place.value,
                        valid,
                        out="r",
                    )
                )
        exists = emit.bit(block < -(-self.size // BLOCK_SIZE))
        scales = [
            emit.ptx(
                "{.reg .pred p; setp.ne.b32 p, $2, 0; mov.b32 $0, 0; "
                "@p ld.global.f32 $0, [$1];}",
                (emit.address(self.refs[f"absmax{i}"]) + block.wide() * 4).value,
                exists,
                out="f",
            )
            for i in range(len(self.tables))
        ]
        return [*gradients, *itertools.chain(*codes), *scales]

    def finish(self, block: emit.Int, loaded: list):
        """Computes and writes a block."""
        loaded = list(loaded)
        words = [loaded.pop(0) for _ in range(2 * self.g_bytes)]
        codes = [[loaded.pop(0), loaded.pop(0)] for _ in self.tables]
        scales = loaded
        new: list[list] = [[] for _ in self.tables]
        for half, (index, valid) in enumerate(self.places(block)):
            part = words[half * self.g_bytes : (half + 1) * self.g_bytes]
            updates = []
            for j, g in enumerate(widen(part, self.half)):
                moments = [
                    self.decode(i, codes[i][half], j, scales[i])
                    for i in range(len(self.tables))
                ]
                update, moments = self.rule(g, moments)
                updates.append(update)
                for numbers, moment in zip(new, moments, strict=True):
                    numbers.append(moment)
            self.write_update(index, valid, updates)
        for i, numbers in enumerate(new):
            self.write_moment(i, block, numbers)

    def decode(self, i: int, word, j: int, scale):
        """Number `j` of a word of codes."""
        return emit.ptx(
            f"{{.reg .b32 a; .reg .f32 v; bfe.u32 a, $1, {8 * j}, 8; "
            f"mad.lo.u32 a, a, {_COPIES}, $2; ld.shared.f32 v, [a]; "
            "mul.rn.f32 $0, v, $3;}",
            word,
            self.numbers[i].value,
            scale,
            out="f",
        )

    def write_update(self, index: emit.Int, valid, updates: list):
        """Writes four updates in the type of the gradient."""
        place = emit.address(self.refs["update"]) + index.wide() * self.g_bytes
        words = narrow(updates, self.half)
        count = len(words)
        values = ", ".join(f"${i + 1}" for i in range(count))
        emit.ptx(
            f"{{.reg .pred p; setp.ne.b32 p, ${count + 1}, 0; "
            f"@p st.global.v{count}.b32 [$0], {{{values}}};}}",
            place.value,
            *words,
            valid,
        )

    def write_moment(self, i: int, block: emit.Int, numbers: list):
        """Finds the absmax of a block, and writes it and the nearest codes."""
        absmax = emit.zero()
        for number in numbers:
            absmax = emit.ptx(
                "{.reg .f32 a; abs.f32 a, $2; max.f32 $0, $1, a;}",
                absmax,
                number,
                out="f",
                pure=True,
            )
        # Magnitudes have the order of their bits.
        absmax = emit.ptx("redux.sync.max.u32 $0, $1, -1;", absmax, out="f")
        place = emit.address(self.refs[f"absmax{i}"]) + block.wide() * 4
        emit.ptx(
            "{.reg .pred p; setp.eq.u32 p, $2, 0; @p st.global.f32 [$0], $1;}",
            place.value,
            absmax,
            self.lane.value,
        )
        inverse = emit.ptx(
            f"{{.reg .pred p; .reg .f32 r; setp.lt.f32 p, $1, {_SMALLEST_ABSMAX}; "
            "rcp.rn.f32 r, $1; selp.f32 $0, 0f00000000, r, p;}",
            absmax,
            out="f",
            pure=True,
        )
        for half, (index, valid) in enumerate(self.places(block)):
            quad = numbers[half * QUAD : (half + 1) * QUAD]
            codes = [self.encode(i, number, inverse) for number in quad]
            word = emit.ptx(
                "{.reg .b32 l, h; prmt.b32 l, $1, $2, 0x0040; "
                "prmt.b32 h, $3, $4, 0x0040; prmt.b32 $0, l, h, 0x5410;}",
                *codes,
                out="r",
                pure=True,
            )
            place = emit.address(self.refs[f"codes{i}"]) + index.wide()
            emit.ptx(
                "{.reg .pred p; setp.ne.b32 p, $2, 0; @p st.global.b32 [$0], $1;}",
                place.value,
                word,
                valid,
            )

    def encode(self, i: int, number, inverse):
        """The nearest code, in the low byte."""
        table = self.tables[i]
        start = (
            "{.reg .pred p, n; .reg .f32 q, t; .reg .b32 a, b, d, e, u; "
            "mul.rn.f32 q, $1, $2; "
        )
        # A quotient that is no number becomes 1: the look-up stays in the table.
        look_up = (
            f"abs.f32 t, q; min.f32 t, t, {_ONE}; max.f32 t, t, 0f{table.base:08X}; "
            f"mov.b32 a, t; shl.b32 u, a, {32 - table.shift}; "
            f"shr.u32 a, a, {table.shift}; mad.lo.u32 a, a, 4, b; "
            "ld.shared.b32 e, [a]; setp.gt.u32 p, u, e; "
        )
        if not table.signed:
            return emit.ptx(
                f"{start} mov.b32 b, $3; {look_up} @p add.u32 e, e, 1; "
                "mov.b32 $0, e;}",
                number,
                inverse,
                self.intervals[i].value,
                out="r",
            )
        return emit.ptx(
            f"{start} setp.lt.f32 n, q, 0f00000000; selp.b32 b, $4, $3, n; "
            f"selp.b32 d, -1, 1, n; {look_up} @p add.u32 e, e, d; mov.b32 $0, e;}}",
            number,
            inverse,
            self.intervals[i].value,
            (self.intervals[i] + 4 * table.intervals).value,
            out="r",
        )


class Adam(Step):
    """Emits Adam's rule."""

    name = "adam8bit"
    num_factors = 7

    def rule(self, g, moments):
        """The update m / (sqrt(v) + eps), bias corrections in the factors; m and v."""
        b1, w1, b2, w2, inverse1, inverse2, eps = self.factors
        m, v = emit.ptx(
            "{.reg .pred p; .reg .f32 a, c; abs.f32 a, $2; "
            f"setp.lt.f32 p, a, {_INFINITY}; "
            "mul.rn.f32 c, $2, $6; fma.rn.f32 c, $3, $5, c; "
            "selp.f32 $0, c, 0f00000000, p; "
            "mul.rn.f32 c, $2, $8; mul.rn.f32 c, c, $2; fma.rn.f32 c, $4, $7, c; "
            "selp.f32 $1, c, 0f00000000, p;}",
            g,
            *moments,
            b1,
            w1,
            b2,
            w2,
            out="ff",
            pure=True,
        )
        update = emit.ptx(
            "{.reg .f32 a, c; mul.rn.f32 c, $2, $4; sqrt.approx.ftz.f32 c, c; "
            "add.rn.f32 c, c, $5; rcp.approx.ftz.f32 c, c; "
            "mul.rn.f32 a, $1, $3; mul.rn.f32 $0, a, c;}",
            m,
            v,
            inverse1,
            inverse2,
            eps,
            out="f",
            pure=True,
        )
        return update, [m, v]


class Lion(Step):
    """Emits Lion's rule."""

    name = "lion8bit"
    num_factors = 4

    def rule(self, g, moments):
        """The update sign(b1 m + w1 g), and the new m."""
        b1, w1, b2, w2 = self.factors
        update, m = emit.ptx(
            "{.reg .pred p, q; .reg .f32 a, c; abs.f32 a, $2; "
            f"setp.lt.f32 p, a, {_INFINITY}; "
            "mul.rn.f32 c, $2, $5; fma.rn.f32 c, $3, $4, c; "
            f"setp.lt.f32 q, c, 0f00000000; selp.f32 a, 0fBF800000, {_ONE}, q; "
            "setp.eq.f32 q, c, 0f00000000; selp.f32 a, 0f00000000, a, q; "
            "selp.f32 $0, a, 0f00000000, p; "
            "mul.rn.f32 c, $2, $7; fma.rn.f32 c, $3, $6, c; "
            "selp.f32 $1, c, 0f00000000, p;}",
            g,
            *moments,
            b1,
            w1,
            b2,
            w2,
            out="ff",
            pure=True,
        )
        return update, [m]


def smem_bytes(codebooks: Codebooks) -> int:
    """Shared memory of a block of threads."""
    tables = [code_table(codebook) for codebook in codebooks]
    return sum(256 * _COPIES + 4 * len(table.entries) for table in tables)


def table_operand(codebooks: Codebooks) -> np.ndarray:
    """uint32: the numbers of all maps, then the intervals of all."""
    numbers = [np.asarray(book, np.float32).view(np.uint32) for book in codebooks]
    return np.concatenate([*numbers, *(code_table(book).entries for book in codebooks)])

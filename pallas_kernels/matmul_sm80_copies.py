"""What a block of the Ampere matmul brings to shared memory, and where it lies there.

    table      256 pairs of numbers, 32 copies of each
    ring       steps of x, codes and scales
    barriers   two a stage of the ring: what it has has come, and has been read

Pieces of 16 bytes change places, so that reads meet in no bank. A warp that has read a
step says so and goes on. At the beginning of a step the next one is copied, into the
stage that all warps have read: that of the step before the last, if there are three.
"""

import itertools
from typing import Any

from pallas_kernels import emit

STEP = 64  # numbers of the contracted axis
WARP = 32  # features of a warp
TILE_M, TILE_N = 128, 256
THREADS = TILE_N // WARP * 32
WAIT = "mbarrier.test_wait.parity.shared::cta.b64"  # try_wait came with 9.0
GROUP = 16  # tiles along m that follow each other in the grid


class Copies:
    """Emits the copies of one plan, for one thread."""

    def __init__(self, plan: Any, refs: dict[str, Any]):
        self.plan, self.refs = plan, refs
        self.config = config = plan.config
        spec = plan.spec
        self.half = {"bfloat16": "bf16", "float16": "f16"}[plan.dtype]
        self.tid = emit.thread_index()
        self.lane = self.tid % 32
        self.g, self.q = self.lane // 4, self.lane % 4
        self.warp = emit.Int(
            emit.ptx(
                "shfl.sync.idx.b32 $0, $1, 0, 31, -1;",
                (self.tid // 32).value,
                out="r",
            )
        )
        self.table = emit.address(refs["smem"])
        self.ring = self.table + plan.table_bytes
        # The addresses of the barriers.
        self.come = self.ring + config.stages * plan.stage_bytes
        self.read_out = self.come + config.stages * 8
        layer = emit.const(0)
        if "layer" in refs:
            pointer = emit.address(refs["layer"]).value
            layer = emit.Int(emit.ptx("ld.global.b32 $0, [$1];", pointer, out="r"))
        layer = layer.wide()
        self.codes_global = emit.address(refs["codes"]) + layer * (spec.n * spec.k // 2)

    def place(self, tile: emit.Int) -> tuple[emit.Int, emit.Int]:
        """Where a tile begins; past the last, where the last does.

        Tiles along m follow each other in groups, whose weight tiles stay in L2.
        """
        plan = self.plan
        tile = tile.min(plan.tiles - 1)
        group = tile // (GROUP * plan.tiles_n)
        first = group * GROUP
        size = (emit.const(plan.tiles_m) - first).min(GROUP)
        place = tile - first * plan.tiles_n
        row = (first + place % size) * TILE_M
        return row, place // size * TILE_N

    def fill_table(self):
        """Copies the pairs to shared memory, 32 times."""
        for first in range(0, 256, THREADS):
            entry = self.tid + first
            source = (emit.address(self.refs["pairs"]) + entry.wide() * 4).value
            pair = emit.ptx("ld.global.nc.b32 $0, [$1];", source, out="r")
            for i in range(8):
                # Neighbouring lanes write to different banks.
                place = (
                    self.table + entry * self.config.row_bytes + (entry + i) % 8 * 16
                )
                text = "st.shared.v4.b32 [$0], {$1, $1, $1, $1};"
                emit.ptx(text, place.value, pair)

    def make_barriers(self):
        """Prepares the barriers; stages that are not filled first count as read."""
        config = self.config
        counts = (self.come, THREADS), (self.read_out, THREADS // 32)
        for barriers, count in counts:
            for stage in range(config.stages):
                emit.ptx(
                    "{.reg .pred p; setp.eq.u32 p, $1, 0; "
                    f"@p mbarrier.init.shared::cta.b64 [$0], {count};}}",
                    (barriers + stage * 8).value,
                    self.tid.value,
                )
        emit.barrier()
        for stage in range(1, config.stages):
            self.release(emit.const(stage))

    def release(self, stage: emit.Int):
        """Says that this warp has read all of a stage."""
        emit.ptx("bar.warp.sync -1;")
        emit.ptx(
            "{.reg .pred p; setp.eq.u32 p, $1, 0; "
            "@p mbarrier.arrive.shared::cta.b64 _, [$0];}",
            (self.read_out + stage * 8).value,
            self.lane.value,
        )

    def wait(self, barriers: emit.Int, stage: emit.Int, phase: emit.Int):
        """Waits at the barrier of a stage for the end of a phase, 0 or 1."""
        emit.ptx(
            "{.reg .pred p; WAIT_${:uid}: "
            f"{WAIT} p, [$0], $1; @!p bra WAIT_${{:uid}};}}",
            (barriers + stage * 8).value,
            phase.value,
        )

    def after(self, stage: emit.Int, phase: emit.Int) -> tuple[emit.Int, emit.Int]:
        """The stage that is read next, and the phase in which it comes."""
        stage = stage + 1
        ends = stage == self.config.stages
        return emit.select(ends, emit.const(0), stage), phase ^ emit.Int(emit.bit(ends))

    def stage(self, number: emit.Int) -> emit.Int:
        """The address of a stage's x, codes and scales."""
        return self.ring + number * self.plan.stage_bytes

    def load(self, number: emit.Int, place, step: emit.Int):
        """Starts the copies of a step of the tile at a place.

        Args:
            number: of the stage that they go to.
            place: of the tile.
            step: which of the tile's.
        """
        plan, parts = self.plan, self.config.parts
        self.row0, self.column0 = place
        stage, step = self.stage(number), step * parts
        self.load_x(stage, step)
        self.load_codes(stage + plan.x_bytes * parts, step)
        stage = stage + (plan.x_bytes + plan.codes_bytes) * parts
        self.load_scales(stage, step)
        emit.ptx(
            "cp.async.mbarrier.arrive.noinc.shared::cta.b64 [$0];",
            (self.come + number * 8).value,
        )

    def copy(self, target: emit.Int, source: emit.Int, to: int = 0, start: int = 0):
        """Starts the copy of 16 bytes, so many behind two addresses."""
        text = f"cp.async.cg.shared.global [$0+{to}], [$1+{start}], 16;"
        emit.ptx(text, target.value, source.value)

    def load_x(self, stage: emit.Int, step: emit.Int):
        """Copies x, with zeros past its end; piece p of row r goes to p ^ r % 2."""
        plan, config = self.plan, self.config
        row, piece = self.tid // 8, self.tid % 8
        column = step * STEP + piece * 8
        # Two factors of up to 2**32 numbers: the row in 64 bits.
        source = (self.row0 + row).wide() * (2 * plan.contracted)
        source = emit.address(self.refs["x"]) + source + (column * 2).wide()
        target = stage + row * 128 + (piece ^ row % 2) * 16
        rows = range(0, TILE_M, THREADS // 8)
        for r, part in itertools.product(rows, range(config.parts)):
            to = part * plan.x_bytes + r * 128
            start = part * STEP * 2 + r * 2 * plan.contracted
            inside = []
            if plan.m % TILE_M:
                inside.append(self.row0 + row + r < plan.m)
            if plan.contracted % (STEP * config.parts):
                inside.append(column + part * STEP < plan.contracted)
            if not inside:
                self.copy(target, source, to, start)
                continue
            size, at = emit.const(16), source + start
            for condition in inside:
                size = emit.select(condition, size, emit.const(0))
                at = emit.select(condition, at, emit.address(self.refs["x"]))
            emit.ptx(
                f"cp.async.cg.shared.global [$0+{to}], [$1], 16, $2;",
                target.value,
                at.value,
                size.value,
            )

    def load_codes(self, target: emit.Int, step: emit.Int):
        """Copies codes; what lies past the weight's end is never used."""
        plan, spec, config = self.plan, self.plan.spec, self.config
        parts = config.parts
        if plan.transposed:
            pieces, rows = TILE_N // 32, STEP * parts
        else:
            pieces, rows = 2 * parts, TILE_N
        row, piece = self.tid // pieces, self.tid % pieces
        if plan.transposed:
            top, column = step * STEP + row, self.column0 + piece * 32
        else:
            top, column = self.column0 + row, step * STEP + piece * 32
        source = self.codes_global + (top * (spec.k // 2) + column // 2).wide()
        for first in range(0, rows, THREADS // pieces):
            at = row + first
            if plan.transposed:
                place = self.row_place(at, piece)
            else:
                place = at // WARP * (WARP * 32) + at % 4 * 256
                place = place + (at // 4 % 8 ^ at % 4) * 32 + piece % 2 * 16
                place = place + piece // 2 * plan.codes_bytes
            if plan.exact:
                self.copy(target + place, source, 0, first * (spec.k // 2))
                continue
            inside = (top + first).min(spec.n - 1) * (spec.k // 2)
            inside = inside + column.min(spec.k - 32) // 2
            self.copy(target + place, self.codes_global + inside.wide())

    def row_place(self, row: emit.Int, warp: emit.Int) -> emit.Int:
        """Where a warp's codes of a row of W lie, 16 bytes.

        The rows of an `ldmatrix`, (16 j + i, 16 j + i + 2) for four j, meet in no bank.
        """
        return row * (TILE_N // 2) + (warp ^ row // 16 % 4 * 2 ^ row // 2 % 2) * 16

    def load_scales(self, target: emit.Int, step: emit.Int):
        """Copies scales; what lies past the weight's end is never used.

        No thread is left out, since a branch would keep the assembler from moving what
        comes before and after: where there are too many, several copy the same.
        """
        plan, spec, parts = self.plan, self.plan.spec, self.config.parts
        width, scales = plan.scale_width, emit.address(self.refs["scales"])
        copied = plan.scales_bytes // 16
        thread = self.tid % (copied * parts)
        part, thread = thread // copied, thread % copied
        step = step + part
        if plan.transposed:  # of each block of columns, those of the step's rows
            size, across = 2, STEP
            row, column = self.column0 // width, step * STEP
        else:  # of each block of the step, those of the tile's features
            size, across = 4, TILE_N
            row, column = step * (STEP // width), self.column0
        pieces = across * size // 16  # of a row
        row, column = row + thread // pieces, column + thread % pieces * (16 // size)
        if not plan.exact:
            row = row.min(spec.k // width - 1)
            column = column.min(spec.n - 16 // size)
        source = scales + (row * spec.n + column).wide() * size
        place = part * plan.scales_bytes + thread * 16
        self.copy(target + place, source)

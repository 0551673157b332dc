"""What a block of the Ampere matmul brings to shared memory, and where it lies there.

    table      256 pairs of numbers, 32 copies of each in rows of 256 bytes
    ring       two steps of x, codes and scales
    barriers   two a stage of the ring: what it has has come, and has been read

Pieces of 16 bytes change places, so that reads meet in no bank. A warp that has read a
step says so and goes on; a product later, when the others have said so too, the stage
is filled again.
"""

from typing import Any

from pallas_kernels import emit

STEP = 64  # numbers of the contracted axis
WARP = 64  # rows and features of a warp
WARPS_M, WARPS_N = 2, 2  # of a block, along the rows and along the features
THREADS = 32 * WARPS_M * WARPS_N
TILE_M, TILE_N = WARP * WARPS_M, WARP * WARPS_N
STAGES = 2
WAIT = "mbarrier.test_wait.parity.shared::cta.b64"  # try_wait came with 9.0
BARRIERS_BYTES = 2 * STAGES * 8
GROUP = 16  # tiles along m that follow each other in the grid
ROW_BYTES = 256  # so that a byte of codes is a byte of an offset
TABLE_BYTES = 256 * ROW_BYTES
X_BYTES = TILE_M * STEP * 2  # of a step
CODES_BYTES = TILE_N * STEP // 2


class Copies:
    """Emits the copies of one plan, for one thread."""

    def __init__(self, plan: Any, refs: dict[str, Any]):
        self.plan, self.refs = plan, refs
        spec = plan.spec
        self.half = {"bfloat16": "bf16", "float16": "f16"}[plan.dtype]
        self.tid = emit.thread_index()
        self.lane = self.tid % 32
        self.g, self.q = self.lane // 4, self.lane % 4
        warp = emit.Int(
            emit.ptx(
                "shfl.sync.idx.b32 $0, $1, 0, 31, -1;",
                (self.tid // 32).value,
                out="r",
            )
        )
        self.warp_m, self.warp_n = warp // WARPS_N, warp % WARPS_N
        self.table = emit.address(refs["smem"])
        self.ring = self.table + TABLE_BYTES
        self.come = self.ring + STAGES * plan.stage_bytes
        self.read_out = self.come + STAGES * 8
        # Tiles along m follow each other in groups, whose weight tiles stay in L2.
        block = emit.block_index()
        tiles_m, tiles_n = plan.tiles_m, plan.tiles_n
        group = block // (GROUP * tiles_n)
        first = group * GROUP
        size = (emit.const(tiles_m) - first).min(GROUP)
        place = block - first * tiles_n
        self.row0 = (first + place % size) * TILE_M
        self.column0 = place // size * TILE_N
        layer = emit.const(0)
        if "layer" in refs:
            pointer = emit.address(refs["layer"]).value
            layer = emit.Int(emit.ptx("ld.global.b32 $0, [$1];", pointer, out="r"))
        layer = layer.wide()
        self.codes_global = emit.address(refs["codes"]) + layer * (spec.n * spec.k // 2)

    def fill_table(self):
        """Copies the pairs to shared memory, 32 times."""
        for first in range(0, 256, THREADS):
            entry = self.tid + first
            source = (emit.address(self.refs["pairs"]) + entry.wide() * 4).value
            pair = emit.ptx("ld.global.nc.b32 $0, [$1];", source, out="r")
            for i in range(8):
                # Neighbouring lanes write to different banks.
                place = self.table + entry * ROW_BYTES + (entry + i) % 8 * 16
                text = "st.shared.v4.b32 [$0], {$1, $1, $1, $1};"
                emit.ptx(text, place.value, pair)

    def make_barriers(self):
        """Prepares the barriers; the last stage counts as read."""
        warps = THREADS // 32
        for barriers, count in ((self.come, THREADS), (self.read_out, warps)):
            for stage in range(STAGES):
                emit.ptx(
                    "{.reg .pred p; setp.eq.u32 p, $1, 0; "
                    f"@p mbarrier.init.shared::cta.b64 [$0], {count};}}",
                    (barriers + stage * 8).value,
                    self.tid.value,
                )
        emit.barrier()
        self.release(emit.const(STAGES - 1))

    def release(self, step: emit.Int):
        """Says that this warp has read all of a step."""
        emit.ptx("bar.warp.sync -1;")
        emit.ptx(
            "{.reg .pred p; setp.eq.u32 p, $1, 0; "
            "@p mbarrier.arrive.shared::cta.b64 _, [$0];}",
            (self.read_out + step % STAGES * 8).value,
            self.lane.value,
        )

    def wait(self, barriers: emit.Int, step: emit.Int, phase: emit.Int):
        """Waits at the barrier of a step's stage for the end of a phase."""
        emit.ptx(
            "{.reg .pred p; WAIT_${:uid}: "
            f"{WAIT} p, [$0], $1; @!p bra WAIT_${{:uid}};}}",
            (barriers + step % STAGES * 8).value,
            (phase % 2).value,
        )

    def stage(self, step: emit.Int) -> emit.Int:
        """The address of a step's x, codes and scales."""
        return self.ring + step % STAGES * self.plan.stage_bytes

    def load(self, step: emit.Int):
        """Starts the copies of a step; past the last, of the last again."""
        stage, barrier = self.stage(step), step % STAGES * 8
        step = step.min(self.plan.steps - 1)
        self.load_x(stage, step)
        self.load_codes(stage + X_BYTES, step)
        self.load_scales(stage + (X_BYTES + CODES_BYTES), step)
        emit.ptx(
            "cp.async.mbarrier.arrive.noinc.shared::cta.b64 [$0];",
            (self.come + barrier).value,
        )

    def load_x(self, stage: emit.Int, step: emit.Int):
        """Copies x, with zeros past its end; piece p of row r goes to p ^ r % 2."""
        plan = self.plan
        row, piece = self.tid // 8, self.tid % 8
        column = step * STEP + piece * 8
        # Two factors of up to 2**32 numbers: the row in 64 bits.
        source = (self.row0 + row).wide() * (2 * plan.contracted)
        source = emit.address(self.refs["x"]) + source + (column * 2).wide()
        target = stage + row * 128 + (piece ^ row % 2) * 16
        for r in range(0, TILE_M, THREADS // 8):
            inside = []
            if plan.m % TILE_M:
                inside.append(self.row0 + row + r < plan.m)
            if plan.contracted % STEP:
                inside.append(column < plan.contracted)
            place, start = target + r * 128, source + r * 2 * plan.contracted
            size = emit.const(16)
            for condition in inside:
                size = emit.select(condition, size, emit.const(0))
                start = emit.select(condition, start, emit.address(self.refs["x"]))
            emit.ptx(
                "cp.async.cg.shared.global [$0], [$1], 16, $2;",
                place.value,
                start.value,
                size.value,
            )

    def load_codes(self, target: emit.Int, step: emit.Int):
        """Copies codes; what lies past the weight's end is never used."""
        plan, spec = self.plan, self.plan.spec
        for i in range(TILE_N * STEP // 32 // THREADS):
            thread = self.tid + i * THREADS
            if plan.transposed:
                pieces = TILE_N // 32
                row, piece = thread // pieces, thread % pieces
                place = self.row_place(row, piece // 2) + piece % 2 * 16
                row = step * STEP + row
                column = self.column0 + piece * 32
            else:
                row, piece = thread // 2, thread % 2
                place = row // WARP * (WARP * 32) + row % 8 * 256
                place = place + (row // 8 % 8 ^ row % 4) * 32 + piece * 16
                row = self.column0 + row
                column = step * STEP + piece * 32
            row, column = row.min(spec.n - 1), column.min(spec.k - 32)
            source = row * (spec.k // 2) + column // 2
            emit.ptx(
                "cp.async.cg.shared.global [$0], [$1], 16;",
                (target + place).value,
                (self.codes_global + source.wide()).value,
            )

    def row_place(self, row: emit.Int, warp: emit.Int) -> emit.Int:
        """Where 64 codes of a row of W lie; rows 16 apart meet in no bank."""
        return (row ^ row // 32 % 2) * 64 + (warp ^ row // 16 % 2) * 32

    def load_scales(self, target: emit.Int, step: emit.Int):
        """Copies scales; what lies past the weight's end is never used."""
        plan, spec = self.plan, self.plan.spec
        width, scales = plan.scale_width, emit.address(self.refs["scales"])
        if plan.transposed:  # of each block of columns, those of the step's rows
            size, across = 2, STEP
            first_row, column = self.column0 // width, step * STEP
        else:  # of each block of the step, those of the tile's features
            size, across = 4, TILE_N
            first_row, column = step * (STEP // width), self.column0
        pieces = across * size // 16  # of a row
        row, piece = self.tid // pieces, self.tid % pieces
        source = (first_row + row).min(spec.k // width - 1) * spec.n
        source = source + (column + piece * (16 // size)).min(spec.n - 16 // size)
        emit.ptx(
            "{.reg .pred p; setp.ne.b32 p, $2, 0; "
            "@p cp.async.cg.shared.global [$0], [$1], 16;}",
            (target + self.tid * 16).value,
            (scales + source.wide() * size).value,
            emit.bit(self.tid < plan.num_scales * size // 16),
        )

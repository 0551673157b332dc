"""y = x @ W for few rows of x (decoding): one pass over the codes, bound by memory.

At a handful of rows the weight is all there is to read, so the kernel is a stream: each
warp loads codes straight into registers, a chunk ahead of their use, and decodes them
with one byte permute and one shared-memory load per *pair* of codes:

* A table of the 256 possible bytes, each as a pair of 16-bit numbers, is laid out once
  a lane, entry `e` of lane `l` at byte `256 e + 4 l`. Every lane stays in its own
  bank, so a warp looks up 32 arbitrary bytes in one cycle, and the address is the code
  byte put above the lane's own offset: one `prmt`. The other half of each 256 bytes
  holds the table of the double-quantized scales, found the same way.
* The pairs are, in this order, the A fragment of `mma.m16n8k16`: 16 rows of W by 16
  columns. Lane (g, t) holds rows g and g + 8, and as x may be read in any order of k,
  its share of a block of 64 columns is simply the 16 neighbours from 16 t on.
* x is the B fragment, eight rows of it. With four rows or fewer the spare columns of
  B separate *blocks*: column b' * rows + m holds row m in the blocks b' and zeros in
  the others, so several blocks accumulate in one fragment although their scales differ,
  and each lane looks up the scales of one block only.
* A product is accumulated over one block, scaled in float32 and added up in float32:
  the only rounding is that of the codebook (and of y) to 16 bits.

The grid fills the GPU once. Each cluster of `cluster` thread blocks owns a run of
16-row groups, as even as possible, and goes through them tile by tile; in a tile
`row_warps` x `k_warps` warps split the rows and k, and the blocks of a cluster split k
once more. Partial sums meet in shared memory, over the cluster through distributed
shared memory, always in the same order: results are deterministic.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm, scf

from pallas_kernels.packed import PackedSpec, PackedWeight

MAX_M = 64
_TABLE_BYTES = 64 * 1024
_SMEM_BYTES = 226 * 1024
_NUM_SMS = 132
_BLOCK = 64  # columns that share one partial sum


@dataclasses.dataclass(frozen=True)
class Tile:
    """How the work is cut.

    Attributes:
        row_groups: groups of 16 rows that a warp holds at once.
        row_warps: warps of a block of threads side by side along n.
        k_warps: warps of a block of threads that share rows and split k.
        cluster: blocks of threads that share rows and split k.
        clusters: how many run at once; None: as many as the GPU has room for.
    """

    row_groups: int
    row_warps: int
    k_warps: int
    cluster: int = 1
    clusters: int | None = None

    def __post_init__(self):
        if self.row_warps * self.k_warps not in (4, 8, 16):
            raise ValueError(f"{self} must have 4, 8 or 16 warps.")

    @property
    def groups(self) -> int:
        """Groups of 16 rows of one step of a block of threads."""
        return self.row_groups * self.row_warps

    @property
    def threads(self) -> int:
        """Threads of one block."""
        return 32 * self.row_warps * self.k_warps


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Everything static about one kernel: the problem and its tile."""

    m: int
    n: int
    k: int
    tile: Tile
    clusters: int
    half: str  # "bf16" or "f16", the type of x, of the decoded codes and of y
    block_size: int
    nested_block_size: int | None  # None: scales are float32

    @property
    def chunk_blocks(self) -> int:
        """Blocks of 64 columns that a warp loads at once from a row."""
        return 4 if self.k % (4 * _BLOCK * self.tile.cluster) == 0 else 1

    @property
    def classes(self) -> int:
        """Blocks that share one accumulator, in different columns of B."""
        return 8 // self.x_rows if self.x_rows < 8 else 1

    @property
    def x_rows(self) -> int:
        """Rows of x that are staged: m, padded."""
        if self.m <= 4 and self.chunk_blocks == 4:
            return 2 if self.m <= 2 else 4
        return -(-self.m // 8) * 8

    @property
    def x_tiles(self) -> int:
        """Fragments of eight columns of B."""
        return -(-self.m // 8)

    @property
    def block_k(self) -> int:
        """Columns of one block of threads."""
        return self.k // self.tile.cluster

    @property
    def chunks(self) -> int:
        """Chunks of one row of one block of threads."""
        return self.block_k // (_BLOCK * self.chunk_blocks)

    @property
    def row_groups(self) -> int:
        """Groups of 16 rows of the whole weight."""
        return -(-self.n // 16)

    @property
    def x_pitch(self) -> int:
        """Bytes between rows of x in shared memory; 16 more keep the banks apart."""
        return 2 * self.block_k + 16

    @property
    def sum_pitch(self) -> int:
        """Floats between columns of partial sums; 4 more keep the banks apart."""
        return 16 * self.tile.groups + 4

    @property
    def sums_bytes(self) -> int:
        """Shared memory of the partial sums of one tile."""
        return 4 * self.tile.k_warps * self.x_rows * self.sum_pitch

    @property
    def smem_bytes(self) -> int:
        """Shared memory after the table: x and two tiles of partial sums."""
        return self.x_rows * self.x_pitch + 2 * self.sums_bytes


def _ptx(text: str, *args, out: str = "", pure: bool = False):
    """Emits PTX; `out` gives the results' types, one letter each (r: 32 bits, f)."""
    types = [
        ir.F32Type.get() if t == "f" else ir.IntegerType.get_signless(32) for t in out
    ]
    if not types:
        return mgpu_utils.inline_ptx(text, *args, has_side_effects=True)
    result = mgpu_utils.inline_ptx(
        text, *args, result_types=types, has_side_effects=not pure
    )
    return result[0] if len(types) == 1 else result


class _Int:
    """A 32- or 64-bit integer of the kernel, with Python's operators."""

    def __init__(self, value):
        self.value = value

    def _other(self, x):
        if isinstance(x, _Int):
            return x.value
        return arith.constant(self.value.type, x)

    def __add__(self, x):
        return _Int(arith.addi(self.value, self._other(x)))

    def __sub__(self, x):
        return _Int(arith.subi(self.value, self._other(x)))

    def __mul__(self, x):
        return _Int(arith.muli(self.value, self._other(x)))

    def __floordiv__(self, x):
        return _Int(arith.divui(self.value, self._other(x)))

    def __mod__(self, x):
        return _Int(arith.remui(self.value, self._other(x)))

    def __lt__(self, x):
        return arith.cmpi(arith.CmpIPredicate.ult, self.value, self._other(x))

    def __eq__(self, x):  # pyright: ignore[reportIncompatibleMethodOverride]
        return arith.cmpi(arith.CmpIPredicate.eq, self.value, self._other(x))

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def wide(self):
        """The same number in 64 bits."""
        return _Int(arith.extui(ir.IntegerType.get_signless(64), self.value))

    def min(self, x: int):
        """The smaller of the two."""
        return _Int(arith.minui(self.value, self._other(x)))


def _const(x: int) -> _Int:
    return _Int(arith.constant(ir.IntegerType.get_signless(32), x))


def _values(*numbers: int) -> list:
    return [_const(x).value for x in numbers]


def _address(ref) -> _Int:
    """The address of a ref: 64 bits in global memory, 32 bits in shared memory."""
    pointer = mgpu_utils.memref_ptr(ref)
    bits = 32 if mgpu_utils.is_smem_ref(ref) else 64
    return _Int(llvm.ptrtoint(ir.IntegerType.get_signless(bits), pointer))


def _loop(start, stop, step, carry, body):
    """`for i in range(start, stop, step): carry = body(i, carry)`, carry flat."""
    op = scf.ForOp(start.value, stop.value, step.value, list(carry))
    with ir.InsertionPoint(op.body):
        scf.YieldOp(list(body(_Int(op.induction_variable), list(op.inner_iter_args))))
    return list(op.results)


class _Kernel:
    """Emits the kernel of one plan, part by part, for one thread."""

    def __init__(self, plan: _Plan, refs: dict[str, Any]):
        self.plan, self.refs = plan, refs
        tile = plan.tile
        self.tid = _Int(
            arith.index_cast(
                ir.IntegerType.get_signless(32), gpu.thread_id(gpu.Dimension.x)
            )
        )
        self.lane = self.tid % 32
        # The same in all lanes, and the compiler may know it.
        warp = _Int(
            _ptx(
                "shfl.sync.idx.b32 $0, $1, 0, 31, -1;",
                (self.tid // 32).value,
                out="r",
            )
        )
        self.k_warp, self.row_warp = warp % tile.k_warps, warp // tile.k_warps
        self.g, self.t = self.lane // 4, self.lane % 4
        block = _Int(_ptx("mov.u32 $0, %ctaid.x;", out="r", pure=True))
        self.rank, cluster = block % tile.cluster, block // tile.cluster
        self.lane_offset = (self.lane * 4).value
        self.table = _address(refs["table_smem"])
        self.x_smem = _address(refs["smem"])
        self.sums_smem = self.x_smem + plan.x_rows * plan.x_pitch
        # This cluster's run of rows, and the first row of this lane.
        first = cluster * plan.row_groups // plan.clusters
        last = (cluster + 1) * plan.row_groups // plan.clusters
        self.first_row = first * 16
        self.end_row = (last * 16).min(plan.n)
        self.tiles = (last - first + (tile.groups - 1)) // tile.groups
        self.lane_row = (
            self.first_row + self.row_warp * (16 * tile.row_groups) + self.g
        )
        layer = _const(0)
        if "layer" in refs:
            layer = _Int(
                _ptx("ld.global.b32 $0, [$1];", _address(refs["layer"]).value, out="r")
            )
        layer = layer.wide()
        k0 = self.rank * plan.block_k
        self.codes = (
            _address(refs["codes"])
            + layer * (plan.n * plan.k // 2)
            + (self.t * 8 + k0 // 2).wide()
        )
        self.k_block = k0 // _BLOCK
        num_scales = -(-plan.n * plan.k // plan.block_size)
        scale_bytes = 4 if plan.nested_block_size is None else 1
        self.absmax = _address(refs["absmax"]) + layer * (num_scales * scale_bytes)
        if plan.nested_block_size is not None:
            num_nested = -(-num_scales // plan.nested_block_size)
            self.nested = _address(refs["nested_absmax"]) + layer * (4 * num_nested)
            pointer = _address(refs["offset"]) + layer * 4
            self.offset = _ptx("ld.global.nc.f32 $0, [$1];", pointer.value, out="f")
        # Which of the blocks of an accumulator this lane reads x of, and holds sums of.
        self.x_class = self.g // plan.x_rows
        self.sum_class = (self.t * 2) // plan.x_rows

    # Loading.

    @property
    def packed_scales(self) -> bool:
        """Whether the quantized scales of a chunk are one aligned word."""
        plan = self.plan
        return (
            plan.nested_block_size is not None
            and plan.block_size == _BLOCK
            and plan.chunk_blocks == 4
        )

    def rows(self, tile: _Int, valid) -> list:
        """This lane's rows of a tile, each with whether it is to be loaded."""
        row = self.lane_row + tile * (16 * self.plan.tile.groups)
        rows = [row + 8 * i for i in range(2 * self.plan.tile.row_groups)]
        return [(r, _bit(arith.andi(r < self.end_row, valid))) for r in rows]

    def load_codes(self, rows: list, chunk: _Int, block: int) -> list:
        """Eight bytes of each row: this lane's 16 columns of a block."""
        plan = self.plan
        first = rows[0][0] * (plan.k // 2) + chunk * (plan.chunk_blocks * _BLOCK // 2)
        pointer = self.codes + first.wide()
        words = []
        for i, (_, valid) in enumerate(rows):
            words += _ptx(
                "{.reg .pred p; setp.ne.b32 p, $3, 0; mov.b32 $0, 0; mov.b32 $1, 0; "
                "@p ld.global.nc.L1::no_allocate.L2::128B.v2.b32 {$0, $1}, "
                f"[$2 + {i * 8 * (plan.k // 2) + block * _BLOCK // 2}];}}",
                pointer.value,
                valid,
                out="rr",
            )
        return words

    def load_scales(self, rows: list, chunk: _Int) -> list:
        """The scales, or their codes and nested scales, of each row of a chunk."""
        plan = self.plan
        load = (
            "{.reg .pred p; setp.ne.b32 p, $2, 0; mov.b32 $0, 0; "
            "@p ld.global.nc.%s $0, [$1];}"
        )
        words = []
        for row, valid in rows:
            first = row * (plan.k // _BLOCK) + self.k_block + chunk * plan.chunk_blocks
            per_scale = plan.block_size // _BLOCK
            if self.packed_scales:
                pointer = self.absmax + first.wide()
                words.append(_ptx(load % "b32", pointer.value, valid, out="r"))
            else:
                size, kind = (4, "b32") if plan.nested_block_size is None else (1, "u8")
                for i in range(0, plan.chunk_blocks, plan.classes):
                    index = (first + self.sum_class + i) // per_scale
                    pointer = self.absmax + index.wide() * size
                    words.append(_ptx(load % kind, pointer.value, valid, out="r"))
            if plan.nested_block_size is not None:
                index = first // (per_scale * plan.nested_block_size)
                pointer = self.nested + index.wide() * 4
                words.append(_ptx(load % "b32", pointer.value, valid, out="r"))
        return words

    def scale(self, words: list, row: int, i: int):
        """The scale of one row in the `i`-th accumulation of a chunk."""
        plan = self.plan
        per_row = len(words) // (2 * plan.tile.row_groups)
        words = words[row * per_row : (row + 1) * per_row]
        if plan.nested_block_size is None:
            return arith.bitcast(ir.F32Type.get(), words[i])
        word = words[0] if self.packed_scales else words[i]
        byte = self.sum_class + i * plan.classes if self.packed_scales else _const(0)
        return _ptx(
            "{.reg .b32 a; .reg .f32 v; prmt.b32 a, $1, $2, $3; add.u32 a, a, $4; "
            "ld.shared.f32 v, [a + 128]; fma.rn.f32 $0, v, $5, $6;}",
            word,
            self.lane_offset,
            (byte * 16 + 0x7604).value,
            self.table.value,
            arith.bitcast(ir.F32Type.get(), words[-1]),
            self.offset,
            out="f",
        )

    # Shared memory.

    def build_table(self):
        """Writes the 256 entries, each once a lane."""
        plan = self.plan
        values = _address(self.refs["table"])
        pieces = 16 if plan.nested_block_size is not None else 8
        threads = plan.tile.threads
        share = max(1, threads // 256)  # threads that fill one entry together
        for first in range(0, 256, threads):
            entry = (self.tid + first) % 256
            pointer = values + entry.wide() * 4
            pair = _ptx("ld.global.nc.b32 $0, [$1];", pointer.value, out="r")
            scale = _ptx("ld.global.nc.b32 $0, [$1 + 1024];", pointer.value, out="r")
            for i in range(pieces // share):
                # Neighbouring lanes write to different banks.
                piece = (
                    self.lane + i + (self.tid // 256) * (pieces // share)
                ) % pieces
                value = arith.select(piece < 8, pair, scale)
                address = self.table + entry * 256 + piece * 16
                _ptx(
                    "st.shared.v4.b32 [$0], {$1, $1, $1, $1};", address.value, value
                )

    def stage_x(self):
        """Copies this block's columns of x to shared memory, with rows of zeros."""
        plan = self.plan
        per_row = plan.block_k // 8
        total, threads = plan.x_rows * per_row, plan.tile.threads
        x = _address(self.refs["x"])
        k0 = self.rank * plan.block_k

        def copy(first: _Int, count: int):
            copies = []
            for i in range(count):
                piece = first + self.tid + i * threads
                row, column = piece // per_row, piece % per_row
                valid = arith.andi(row < plan.m, piece < total)
                pointer = x + (row * plan.k + k0 + column * 8).wide() * 2
                values = _ptx(
                    "{.reg .pred p; setp.ne.b32 p, $5, 0; mov.b32 $0, 0; "
                    "mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0; "
                    "@p ld.global.nc.v4.b32 {$0, $1, $2, $3}, [$4];}",
                    pointer.value,
                    _bit(valid),
                    out="rrrr",
                )
                address = self.x_smem + row * plan.x_pitch + column * 16
                copies.append((address, values, piece < total))
            for address, values, inside in copies:
                _ptx(
                    "{.reg .pred p; setp.ne.b32 p, $5, 0; "
                    "@p st.shared.v4.b32 [$0], {$1, $2, $3, $4};}",
                    address.value,
                    *values,
                    _bit(inside),
                )

        trips = -(-total // threads)
        unroll = min(trips, 8)
        if trips <= unroll:
            copy(_const(0), trips)
            return

        def body(i, carry):
            copy(i * threads, unroll)
            return carry

        _loop(_const(0), _const(trips), _const(unroll), [], body)

    def load_x(self, chunk: _Int, block: int, j: int) -> list:
        """This lane's B fragments of a block: 16 columns of one row of x."""
        plan = self.plan
        row = self.g % plan.x_rows if plan.classes > 1 else self.g + 8 * j
        address = (
            self.x_smem
            + row * plan.x_pitch
            + chunk * (plan.chunk_blocks * 2 * _BLOCK)
            + self.t * 32
        )
        if plan.classes == 1:
            load = "ld.shared.v4.b32 {$0, $1, $2, $3}, [$4 + %d];"
            args = (address.value,)
        else:
            load = (
                "{.reg .pred p; setp.ne.b32 p, $5, 0; mov.b32 $0, 0; mov.b32 $1, 0; "
                "mov.b32 $2, 0; mov.b32 $3, 0; "
                "@p ld.shared.v4.b32 {$0, $1, $2, $3}, [$4 + %d];}"
            )
            args = (address.value, _bit(self.x_class == block % plan.classes))
        words = []
        for piece in range(2):
            words += _ptx(load % (block * 2 * _BLOCK + 16 * piece), *args, out="rrrr")
        return words

    # Arithmetic.

    def decode(self, word) -> list:
        """Four bytes of codes to four pairs of numbers."""
        lookups = "".join(
            f"prmt.b32 a, $4, $5, {0x7604 + 16 * i}; add.u32 a, a, $6; "
            f"ld.shared.b32 ${i}, [a]; "
            for i in range(4)
        )
        return list(
            _ptx(
                "{.reg .b32 a; " + lookups + "}",
                word,
                self.lane_offset,
                self.table.value,
                out="rrrr",
            )
        )

    def mma(self, a: list, b: list, c: list) -> list:
        """c + a @ b, 16 rows of W by 16 columns by 8 rows of x."""
        half = self.plan.half
        return list(
            _ptx(
                f"mma.sync.aligned.m16n8k16.row.col.f32.{half}.{half}.f32 "
                "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
                *a,
                *b,
                *c,
                out="ffff",
                pure=True,
            )
        )

    def accumulate(self, chunk, codes: list, scales: list, sums: list, refill):
        """Adds one chunk's products to `sums`; calls `refill(block)` as codes free."""
        plan = self.plan
        groups = plan.tile.row_groups
        zero = arith.constant(ir.F32Type.get(), 0.0)
        sums = list(sums)
        for i in range(plan.chunk_blocks // plan.classes):
            parts = [[zero] * 4 for _ in range(groups)]
            for block in range(i * plan.classes, (i + 1) * plan.classes):
                words = codes[block]
                pairs = [
                    self.decode(words[2 * r]) + self.decode(words[2 * r + 1])
                    for r in range(2 * groups)
                ]
                refill(block)
                for j in range(plan.x_tiles):
                    x = self.load_x(chunk, block, j)
                    if plan.classes == 1:
                        parts = [[zero] * 4 for _ in range(groups)]
                    for step in range(0, 8, 2):
                        for group in range(groups):
                            low, high = pairs[2 * group], pairs[2 * group + 1]
                            a = [low[step], high[step], low[step + 1], high[step + 1]]
                            parts[group] = self.mma(a, x[step : step + 2], parts[group])
                    if plan.classes == 1:
                        self._add_scaled(scales, i, j, parts, sums)
            if plan.classes > 1:
                self._add_scaled(scales, i, 0, parts, sums)
        return sums

    def _add_scaled(self, scales, i, j, parts, sums):
        for group, part in enumerate(parts):
            for r in range(4):
                scale = scales[2 * group + r // 2][i]
                at = (group * self.plan.x_tiles + j) * 4 + r
                sums[at] = _ptx(
                    "fma.rn.f32 $0, $1, $2, $3;",
                    scale,
                    part[r],
                    sums[at],
                    out="f",
                    pure=True,
                )

    # The kernel.

    def run(self):
        """Emits everything."""
        plan = self.plan
        tile, blocks = plan.tile, plan.chunk_blocks
        per_block = 4 * tile.row_groups
        num_sums, num_codes = 4 * tile.row_groups * plan.x_tiles, blocks * per_block
        zeros = [arith.constant(ir.F32Type.get(), 0.0)] * num_sums
        step, chunks = tile.k_warps, _const(plan.chunks)

        def tile_body(index, state):
            def chunk_body(chunk, carry):
                codes = carry[num_sums : num_sums + num_codes]
                words = carry[num_sums + num_codes :]
                # What comes next: this tile's next chunk, or the next tile's first.
                more = chunk + step < chunks
                next_tile = index + _Int(arith.select(more, *_values(0, 1)))
                next_chunk = _Int(
                    arith.select(more, (chunk + step).value, self.k_warp.value)
                )
                rows = self.rows(next_tile, next_tile < self.tiles)
                scales = [
                    [self.scale(words, r, i) for i in range(blocks // plan.classes)]
                    for r in range(2 * tile.row_groups)
                ]
                next_words = self.load_scales(rows, next_chunk)
                next_codes = []
                sums = self.accumulate(
                    chunk,
                    [codes[b * per_block :][:per_block] for b in range(blocks)],
                    scales,
                    carry[:num_sums],
                    lambda b: next_codes.extend(self.load_codes(rows, next_chunk, b)),
                )
                return sums + next_codes + next_words

            state = _loop(self.k_warp, chunks, _const(step), zeros + state, chunk_body)
            self.reduce(index, state[:num_sums])
            return state[num_sums:]

        # Loads of the first chunk run while the table is built and x is staged.
        rows = self.rows(_const(0), self.k_warp < chunks)
        state = [w for b in range(blocks) for w in self.load_codes(rows, self.k_warp, b)]
        state += self.load_scales(rows, self.k_warp)
        self.build_table()
        self.stage_x()
        gpu.barrier()
        _loop(_const(0), self.tiles, _const(1), state, tile_body)
        if tile.cluster > 1:
            self._cluster_barrier()  # nobody leaves while another reads its memory

    def _cluster_barrier(self):
        _ptx("barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;")

    def reduce(self, index: _Int, sums: list):
        """Adds the partial sums of all warps and blocks of the cluster, writes y.

        Two tiles' sums have room, so one barrier a tile is enough.
        """
        plan, tile = self.plan, self.plan.tile
        buffer = self.sums_smem + index % 2 * plan.sums_bytes
        for distance in range(1, 4):  # lanes that hold other blocks of the same rows
            if plan.classes == 4 and distance < 3 or (plan.classes, distance) == (2, 2):
                sums = [
                    _ptx(
                        "{.reg .f32 o; shfl.sync.bfly.b32 o, $1, $2, 31, -1; "
                        "add.rn.f32 $0, $1, o;}",
                        s,
                        _const(distance).value,
                        out="f",
                    )
                    for s in sums
                ]
        keep = _bit(self.t * 2 < plan.x_rows)
        row0 = self.row_warp * (16 * tile.row_groups) + self.g
        column0 = self.k_warp * plan.x_rows + self.t * 2
        for group in range(tile.row_groups):
            for j in range(plan.x_tiles):
                for r in range(4):
                    column = column0 + (8 * j + r % 2)
                    row = row0 + (16 * group + 8 * (r // 2))
                    address = buffer + (column * plan.sum_pitch + row) * 4
                    _ptx(
                        "{.reg .pred p; setp.ne.b32 p, $2, 0; "
                        "@p st.shared.f32 [$0], $1;}",
                        address.value,
                        sums[(group * plan.x_tiles + j) * 4 + r],
                        keep,
                    )
        if tile.cluster == 1:
            gpu.barrier()
        else:
            self._cluster_barrier()
        rows = 16 * tile.groups // tile.cluster  # that this block adds up
        y = _address(self.refs["y"])

        def body(i, carry):
            row = self.rank * rows + i % rows
            x_row = i // rows
            total = arith.constant(ir.F32Type.get(), 0.0)
            for block in range(tile.cluster):
                for warp in range(tile.k_warps):
                    at = (x_row + warp * plan.x_rows) * plan.sum_pitch + row
                    total = arith.addf(total, self._load_sum(buffer + at * 4, block))
            n = self.first_row + index * (16 * tile.groups) + row
            pointer = y + (x_row * plan.n + n).wide() * 2
            _ptx(
                "{.reg .pred p; .reg .b16 h; setp.ne.b32 p, $2, 0; "
                f"cvt.rn.{plan.half}.f32 h, $1; @p st.global.b16 [$0], h;}}",
                pointer.value,
                total,
                _bit(n < self.end_row),
            )
            return carry

        _loop(self.tid, _const(plan.m * rows), _const(tile.threads), [], body)

    def _load_sum(self, address: _Int, block: int):
        if self.plan.tile.cluster == 1:
            return _ptx("ld.shared.f32 $0, [$1];", address.value, out="f")
        return _ptx(
            "{.reg .b32 a; mapa.shared::cluster.u32 a, $1, $2; "
            "ld.shared::cluster.f32 $0, [a];}",
            address.value,
            _const(block).value,
            out="f",
        )


def _bit(condition):
    """A condition as a 32-bit integer, which PTX text can take."""
    return arith.extui(ir.IntegerType.get_signless(32), condition)


def lookup_table(spec: PackedSpec, dtype) -> np.ndarray:
    """The 256 pairs of a byte's two numbers and the 256 nested numbers, as words.

    Args:
        spec: whose codebooks to take.
        dtype: bfloat16 or float16.

    Returns:
        uint32 [512]. Word `e` has the number of the high half of `e`, the even
        column, in its low half; words from 256 on are the bits of float32 numbers.
    """
    numbers = np.asarray(spec.codebook, np.float32).astype(dtype).view(np.uint16)
    numbers = numbers.astype(np.uint32)
    byte = np.arange(256)
    pairs = numbers[byte >> 4] | numbers[byte & 15] << 16
    nested = np.zeros(256, np.float32)
    if spec.nested_codebook is not None:
        nested = np.asarray(spec.nested_codebook, np.float32)
    return np.concatenate([pairs, nested.view(np.uint32)])


def choose_tile(m: int, n: int, k: int) -> Tile:
    """The tile for a shape, by rule; see docs/kernels_decoding.md for the figures."""
    chunk = 4 * _BLOCK if k % (4 * _BLOCK) == 0 else _BLOCK
    warps = 16 if m <= 16 else 8
    cluster = 1
    while cluster < 8 and m * k // cluster > 40 * 1024 and k % (2 * cluster * chunk) == 0:
        cluster *= 2
    chunks = k // (chunk * cluster)
    k_warps = max(
        (w for w in (1, 2, 4, 8, 16) if w <= warps),
        key=lambda w: (chunks / (-(-chunks // w) * w) > 0.9, w),
    )
    return Tile(2, warps // k_warps, k_warps, cluster)


def _plan(x_shape, dtype, packed: PackedWeight, spec: PackedSpec, tile) -> _Plan:
    """Checks what this kernel can do."""
    m, k = x_shape
    n = spec.n
    if dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"{dtype=} of x must be bfloat16 or float16.")
    if spec.bits != 4:
        raise NotImplementedError(f"codes of {spec.bits} bits must have 4.")
    if not 1 <= m <= MAX_M:
        raise NotImplementedError(f"{m=} rows of x must be 1 to {MAX_M}.")
    if k % _BLOCK:
        raise NotImplementedError(f"{k=} must be a multiple of {_BLOCK}.")
    if spec.block_size < _BLOCK or spec.block_size & (spec.block_size - 1):
        raise NotImplementedError(
            f"block_size={spec.block_size} must be a power of two from {_BLOCK} on."
        )
    nested = spec.nested_block_size if packed.nested_absmax is not None else None
    if nested is not None and (nested < 4 or nested & (nested - 1)):
        raise NotImplementedError(
            f"nested_block_size={nested} must be a power of two from 4 on."
        )
    half = "bf16" if dtype == jnp.bfloat16 else "f16"
    if n * k // 2 >= 2**32:
        raise NotImplementedError(f"{n=} times {k=} codes must be less than 4 GiB.")
    tile = tile or choose_tile(m, n, k)
    if k % (_BLOCK * tile.cluster):
        raise NotImplementedError(f"{k=} cannot be cut by {tile}.")
    room = _NUM_SMS if tile.cluster <= 2 else _NUM_SMS // 16 * 16
    clusters = tile.clusters or room // tile.cluster
    clusters = min(clusters, -(-n // (16 * tile.groups)) if n < 16 * clusters else clusters)
    plan = _Plan(m, n, k, tile, clusters, half, spec.block_size, nested)
    if plan.smem_bytes + _TABLE_BYTES > _SMEM_BYTES:
        raise NotImplementedError(f"x of {m=} rows and {k=} does not fit {tile}.")
    return plan


def matmul(
    x: jax.Array, packed: PackedWeight, spec: PackedSpec, *, tile: Tile | None = None
) -> jax.Array:
    """y = x @ W for up to 64 rows of x.

    Each block of 64 columns is accumulated in float32 on the codebook's numbers in x's
    type, multiplied by its float32 scale, and added up in float32.

    Args:
        x: bfloat16 or float16 [..., k], at most 64 rows in all.
        packed: the weight, 4-bit codes.
        spec: what its arrays mean.
        tile: how to cut the work; by default `choose_tile`.

    Returns:
        [..., n], in x's type.

    Raises:
        NotImplementedError: if this kernel cannot: other types, more rows, k not a
            multiple of 64, block sizes that are not powers of two from 64 on.
    """
    rows = x.reshape(-1, x.shape[-1])
    plan = _plan(rows.shape, x.dtype, packed, spec, tile)
    operands = {
        "x": rows,
        "codes": packed.codes,
        "absmax": packed.absmax,
        "table": jnp.asarray(lookup_table(spec, x.dtype)),
    }
    if packed.nested_absmax is not None:
        operands["nested_absmax"] = packed.nested_absmax
        operands["offset"] = jnp.reshape(packed.offset, (-1,))
    if packed.layer is not None:
        operands["layer"] = jnp.reshape(packed.layer, (1,)).astype(jnp.int32)
    y = _call(plan, tuple(operands))(*operands.values())
    return y.reshape(*x.shape[:-1], spec.n)


@functools.lru_cache(maxsize=None)
def _call(plan: _Plan, names: tuple[str, ...]):
    """The kernel of a plan, taking the operands called `names`."""
    tile = plan.tile

    def matvec(*refs, table_smem, smem):
        *operands, y = refs
        named = dict(zip(names, operands, strict=True))
        named |= {"y": y, "table_smem": table_smem, "smem": smem}

        @plgpu.inline_mgpu(arg_types=({name: plgpu.RefType() for name in named},))
        def emit(_, refs):
            _Kernel(plan, refs).run()

        emit(named)

    dtype = jnp.bfloat16 if plan.half == "bf16" else jnp.float16
    cluster = {"cluster": (tile.cluster,), "cluster_names": ("c",)}
    return plgpu.kernel(
        matvec,
        out_type=jax.ShapeDtypeStruct((plan.m, plan.n), dtype),
        grid=(plan.clusters,),
        grid_names=("i",),
        **(cluster if tile.cluster > 1 else {}),
        num_threads=tile.threads // 128,
        thread_name="wg",
        scratch_types={
            "table_smem": plgpu.SMEM((_TABLE_BYTES,), jnp.uint8),
            "smem": plgpu.SMEM((plan.smem_bytes,), jnp.uint8),
        },
    )

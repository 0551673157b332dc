"""y = x @ W and dx = dy @ Wᵀ for GPUs from Ampere on: `cp.async` and `mma.sync`.

One kernel for both products. A block of 256 threads computes 128 x 128 numbers of the
result and walks the contracted axis 64 at a time:

    cp.async        activations two steps ahead, codes three
    decode          each thread: 32 codes of one row to 16-bit numbers, by byte permutes
                    from a table that holds the codebook times the block's scale
    ldmatrix, mma   eight warps, 64 x 32 numbers each, float32 accumulators

While the tensor cores work on one decoded tile, the next is decoded into the other, so
there is one barrier a step. The weight is decoded once a block, in its own layout
[n, k]: the forward reads it as it lies, the backward transposes in `ldmatrix.trans`.
The numbers multiplied are exactly those of `dequantize` in the activations' type.

Rows of 128 or 256 bytes in shared memory have their 16-byte pieces permuted by the
row (`piece ^ row % 8`), which keeps every access free of bank conflicts.
"""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np

from pallas_kernels import emit, tuning
from pallas_kernels.decode import decode_word
from pallas_kernels.packed import PackedSpec, PackedWeight

TILE_M = 128  # rows of the result, of one block of threads
TILE_N = 128  # columns of the result
TILE_C = 64  # of the contracted axis, a step
STAGES = 3
_THREADS = 256
_WARP_M, _WARP_N = 64, 32
_PIECE = 32  # codes that a thread decodes a step: 16 bytes of one row
_GROUP = 16  # tiles along m that follow each other in the grid
_ACTIVATION_BYTES = TILE_M * TILE_C * 2
_CODES_BYTES = TILE_N * TILE_C // 2
_DECODED_BYTES = TILE_N * TILE_C * 2
SMEM_BYTES = STAGES * (_ACTIVATION_BYTES + _CODES_BYTES) + 2 * _DECODED_BYTES + 1024


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything static about one kernel.

    The weight is [n, k]. The result is [m, n], contracted over k, or, transposed,
    [m, k], contracted over n.
    """

    m: int
    spec: PackedSpec
    dtype: str
    transposed: bool

    @property
    def columns(self) -> int:
        """Columns of the result."""
        return self.spec.k if self.transposed else self.spec.n

    @property
    def contracted(self) -> int:
        """Length of the contracted axis."""
        return self.spec.n if self.transposed else self.spec.k

    @property
    def grid(self) -> int:
        """Tiles of the result."""
        return -(-self.m // TILE_M) * -(-self.columns // TILE_N)

    @property
    def steps(self) -> int:
        """Steps along the contracted axis."""
        return -(-self.contracted // TILE_C)

    @property
    def row_pieces(self) -> int:
        """Pieces of codes in a row of a weight tile."""
        return (TILE_N if self.transposed else TILE_C) // _PIECE


class Body:
    """Emits the kernel of one plan, for one thread."""

    def __init__(self, plan: Plan, refs: dict[str, Any]):
        self.plan, self.refs = plan, refs
        spec = plan.spec
        self.ops = emit.lane_ops(plan.dtype)
        self.tid = emit.thread_index()
        self.lane = self.tid % 32
        warp = emit.Int(
            emit.ptx(
                "shfl.sync.idx.b32 $0, $1, 0, 31, -1;",
                (self.tid // 32).value,
                out="r",
            )
        )
        self.warp_m, self.warp_n = warp // 4 * _WARP_M, warp % 4 * _WARP_N
        self.activations = emit.address(refs["smem"])
        self.codes = self.activations + STAGES * _ACTIVATION_BYTES
        self.decoded = self.codes + STAGES * _CODES_BYTES
        self.scale_table = self.decoded + 2 * _DECODED_BYTES
        # Tiles along m follow each other in groups, whose weight tiles stay in L2.
        block = emit.block_index()
        tiles_m, tiles_n = -(-plan.m // TILE_M), -(-plan.columns // TILE_N)
        group = block // (_GROUP * tiles_n)
        first = group * _GROUP
        size = (emit.const(tiles_m) - first).min(_GROUP)
        place = block - first * tiles_n
        self.row0 = (first + place % size) * TILE_M
        self.column0 = place // size * TILE_N
        layer = emit.const(0)
        if "layer" in refs:
            pointer = emit.address(refs["layer"]).value
            layer = emit.Int(emit.ptx("ld.global.b32 $0, [$1];", pointer, out="r"))
        layer = layer.wide()
        self.codes_global = emit.address(refs["codes"]) + layer * (spec.n * spec.k // 2)
        nested = spec.nested_codebook is not None
        self.absmax = emit.address(refs["absmax"]) + layer * (
            spec.num_blocks * (1 if nested else 4)
        )
        if nested:
            num_nested = -(-spec.num_blocks // spec.nested_block_size)
            self.nested = emit.address(refs["nested_absmax"]) + layer * (4 * num_nested)
            pointer = (emit.address(refs["offset"]) + layer * 4).value
            self.offset = emit.ptx("ld.global.nc.f32 $0, [$1];", pointer, out="f")
            pointer = emit.address(refs["table"]) + self.tid.wide() * 4
            number = emit.ptx("ld.global.nc.b32 $0, [$1];", pointer.value, out="r")
            address = (self.scale_table + self.tid * 4).value
            emit.ptx("st.shared.b32 [$0], $1;", address, number)
        # This thread's piece of a weight tile.
        self.piece_row = self.tid // plan.row_pieces
        self.piece = self.tid % plan.row_pieces

    def weight_place(self, step: emit.Int) -> tuple[emit.Int, emit.Int]:
        """The row and the first column of this thread's piece in the weight."""
        row, column = self.piece_row, self.piece * _PIECE
        if self.plan.transposed:
            return step * TILE_C + row, self.column0 + column
        return self.column0 + row, step * TILE_C + column

    def exists(self, step: emit.Int):
        """Whether this thread's piece lies in the weight."""
        row, column = self.weight_place(step)
        return emit.both(row < self.plan.spec.n, column < self.plan.spec.k)

    # Copies.

    def copy(self, target: emit.Int, base: emit.Int, offset: emit.Int, exists):
        """Starts a copy of 16 bytes, or of zeros."""
        offset = emit.select(exists, offset, emit.const(0))
        size = emit.select(exists, emit.const(16), emit.const(0))
        emit.ptx(
            "cp.async.cg.shared.global [$0], [$1], 16, $2;",
            target.value,
            (base + offset.wide()).value,
            size.value,
        )

    def load_codes(self, step: emit.Int):
        """Starts the copy of this thread's codes of a step, or of zeros."""
        row, column = self.weight_place(step)
        target = self.codes + step % STAGES * _CODES_BYTES + self.tid * 16
        offset = row * (self.plan.spec.k // 2) + column // 2
        self.copy(target, self.codes_global, offset, self.exists(step))

    def load_activations(self, step: emit.Int):
        """Starts the copies of a step's activations, with zeros past the end."""
        plan = self.plan
        stage = step % STAGES
        x = emit.address(self.refs["x"])
        target = self.activations + stage * _ACTIVATION_BYTES
        for i in range(TILE_M * TILE_C // 8 // _THREADS):
            index = self.tid + i * _THREADS
            row, piece = index // 8, index % 8
            column = step * TILE_C + piece * 8
            inside = emit.both(self.row0 + row < plan.m, column < plan.contracted)
            # Two factors of up to 2**32 numbers: the row in 64 bits.
            start = x + (self.row0 + row).wide() * (2 * plan.contracted)
            start = emit.Int(emit.pick(inside, start.value, x.value))
            place = target + row * 128 + (piece ^ row % 8) * 16
            self.copy(place, start, column * 2, inside)

    def load_scale(self, step: emit.Int):
        """The scale of this thread's piece in a step; 0 where there is none."""
        spec = self.plan.spec
        row, column = self.weight_place(step)
        exists = emit.bit(self.exists(step))
        index = (row * (spec.k // _PIECE) + column // _PIECE) // (
            spec.block_size // _PIECE
        )
        load = (
            "{.reg .pred p; setp.ne.b32 p, $2, 0; mov.b32 $0, 0; "
            "@p ld.global.nc.%s $0, [$1];}"
        )
        if spec.nested_codebook is None:
            pointer = (self.absmax + index.wide() * 4).value
            return emit.ptx(load % "f32", pointer, exists, out="f")
        pointer = (self.absmax + index.wide()).value
        code = emit.ptx(load % "u8", pointer, exists, out="r")
        pointer = self.nested + (index // spec.nested_block_size).wide() * 4
        nested = emit.ptx(load % "f32", pointer.value, exists, out="f")
        return emit.ptx(
            "{.reg .b32 a; .reg .f32 v; .reg .pred p; mad.lo.u32 a, $1, 4, $2; "
            "ld.shared.f32 v, [a]; mul.rn.f32 v, v, $3; add.rn.f32 $0, v, $4; "
            "setp.eq.b32 p, $5, 0; @p mov.b32 $0, 0;}",
            code,
            self.scale_table.value,
            nested,
            self.offset,
            exists,
            out="f",
        )

    # Arithmetic.

    def scaled_table(self, scale) -> tuple[list, list]:
        """The codebook times a scale, as `decode_word` takes it: 32 instructions."""
        kind = {"bfloat16": "bf16x2", "float16": "f16x2"}[self.plan.dtype]
        bits = np.asarray(self.plan.spec.codebook, np.float32).view(np.uint32)
        numbers = [
            emit.ptx(f"mul.rn.f32 $0, $1, 0f{b:08X};", scale, out="f", pure=True)
            for b in bits.tolist()
        ]
        pairs = [
            emit.ptx(f"cvt.rn.{kind}.f32 $0, $2, $1;", *pair, out="r", pure=True)
            for pair in itertools.batched(numbers, 2)
        ]
        low, high = (
            [
                emit.ptx(f"prmt.b32 $0, $1, $2, {order};", *four, out="r", pure=True)
                for four in itertools.batched(pairs, 2)
            ]
            for order in (0x6420, 0x7531)
        )
        return low, high

    def decode(self, step: emit.Int, scale):
        """Decodes this thread's piece of a step's weight tile."""
        plan = self.plan
        source = self.codes + step % STAGES * _CODES_BYTES + self.tid * 16
        words = emit.ptx(
            "ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];", source.value, out="rrrr"
        )
        table = self.scaled_table(scale)
        row = self.piece_row
        target = self.decoded + step % 2 * _DECODED_BYTES
        target = target + row * (2 * plan.row_pieces * _PIECE)
        for i, word in enumerate(words):
            pairs = decode_word(self.ops, word, table)
            place = (self.piece * 4 + i) ^ row % 8
            emit.ptx(
                "st.shared.v4.b32 [$0], {$1, $2, $3, $4};",
                (target + place * 16).value,
                *pairs,
            )

    def load_matrices(self, base: emit.Int, row: emit.Int, piece: emit.Int, pitch, how):
        """Four 8 x 8 matrices; each lane gives one row's place."""
        address = base + row * pitch + (piece ^ row % 8) * 16
        return emit.ptx(
            f"ldmatrix.sync.aligned.m8n8.x4{how}.shared.b16 {{$0, $1, $2, $3}}, [$4];",
            address.value,
            out="rrrr",
        )

    def multiply(self, step: emit.Int, sums: list) -> list:
        """Adds a step's products to this warp's 64 x 32 sums."""
        plan, lane, sums = self.plan, self.lane, list(sums)
        half = {"bfloat16": "bf16", "float16": "f16"}[plan.dtype]
        activations = self.activations + step % STAGES * _ACTIVATION_BYTES
        decoded = self.decoded + step % 2 * _DECODED_BYTES
        for c in range(0, TILE_C, 16):
            a = []
            for i in range(0, _WARP_M, 16):
                row, piece = self.warp_m + i + lane % 16, lane // 16 + c // 8
                a.append(self.load_matrices(activations, row, piece, 128, ""))
            b = []
            for j in range(0, _WARP_N, 16):
                if plan.transposed:
                    row = lane % 16 + c
                    piece = self.warp_n // 8 + lane // 16 + j // 8
                    four = self.load_matrices(decoded, row, piece, 256, ".trans")
                else:
                    row = self.warp_n + j + lane % 8 + lane // 16 * 8
                    piece = lane // 8 % 2 + c // 8
                    four = self.load_matrices(decoded, row, piece, 128, "")
                b += [four[:2], four[2:]]
            for i, a_words in enumerate(a):
                for j, b_words in enumerate(b):
                    at = 4 * (i * len(b) + j)
                    sums[at : at + 4] = emit.ptx(
                        f"mma.sync.aligned.m16n8k16.row.col.f32.{half}.{half}.f32 "
                        "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, "
                        "{$10, $11, $12, $13};",
                        *a_words,
                        *b_words,
                        *sums[at : at + 4],
                        out="ffff",
                        pure=True,
                    )
        return sums

    # The kernel.

    def run(self):
        """Emits everything."""
        steps = self.plan.steps
        sums = [emit.zero()] * (_WARP_M * _WARP_N // 32)
        zero, one = emit.const(0), emit.const(1)
        self.load_activations(zero)
        self.load_codes(zero)
        self.load_codes(one)
        emit.ptx("cp.async.commit_group;")
        self.load_activations(one)
        self.load_codes(emit.const(2))
        emit.ptx("cp.async.commit_group;")
        emit.barrier()  # the table of scales is complete
        first, scale = self.load_scale(zero), self.load_scale(one)
        emit.ptx("cp.async.wait_group 1;")
        self.decode(zero, first)  # a thread decodes only what it copied itself

        def body(step, carry):
            scale, *sums = carry
            # All but the latest group: this step's activations, the next one's codes.
            emit.ptx("cp.async.wait_group 1;")
            # Everyone's part of this step has come and is decoded, and the buffers of
            # the step before are free.
            emit.barrier()
            self.load_activations(step + 2)
            self.load_codes(step + 3)
            emit.ptx("cp.async.commit_group;")
            next_scale = self.load_scale(step + 2)
            self.decode(step + 1, scale)
            return [next_scale, *self.multiply(step, sums)]

        carry = emit.loop(zero, emit.const(steps), one, [scale, *sums], body)
        self.store(carry[1:])

    def store(self, sums: list):
        """Writes y: a lane has pairs of neighbouring columns."""
        plan = self.plan
        kind = {"bfloat16": "bf16x2", "float16": "f16x2"}[plan.dtype]
        y = emit.address(self.refs["y"])
        for i in range(0, _WARP_M, 16):
            for j in range(0, _WARP_N, 8):
                for r in range(2):
                    row = self.row0 + self.warp_m + self.lane // 4 + (i + 8 * r)
                    column = self.column0 + self.warp_n + self.lane % 4 * 2 + j
                    at = 4 * (i // 16 * (_WARP_N // 8) + j // 8) + 2 * r
                    pointer = y + row.wide() * (2 * plan.columns) + column.wide() * 2
                    emit.ptx(
                        "{.reg .pred p; .reg .b32 w; setp.ne.b32 p, $3, 0; "
                        f"cvt.rn.{kind}.f32 w, $2, $1; @p st.global.b32 [$0], w;}}",
                        pointer.value,
                        *sums[at : at + 2],
                        emit.bit(emit.both(row < plan.m, column < plan.columns)),
                    )


def _run(x, packed: PackedWeight, spec: PackedSpec, transposed: bool) -> jax.Array:
    """Checks what this kernel can do, and runs it."""
    capability = tuning.compute_capability()
    if capability is not None and capability < 8:
        raise NotImplementedError(f"{capability=}: cp.async came with 8.0.")
    if not x.size:
        raise NotImplementedError(f"{x.shape=} has no rows.")
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"dtype={x.dtype} must be bfloat16 or float16.")
    if spec.bits != 4:
        raise NotImplementedError(f"codes of {spec.bits} bits must have 4.")
    if spec.k % TILE_C or spec.n % 8:
        raise NotImplementedError(
            f"k={spec.k} must be a multiple of {TILE_C} and n={spec.n} of 8."
        )
    if spec.n * spec.k // 2 >= 2**32:
        raise NotImplementedError(f"{spec.n} x {spec.k} codes are 4 GiB or more.")
    size = spec.block_size
    if size < _PIECE or size & (size - 1):
        raise NotImplementedError(
            f"block_size={size} must be a power of two from {_PIECE} on."
        )
    rows = x.reshape(-1, x.shape[-1])
    plan = Plan(rows.shape[0], spec, jnp.dtype(x.dtype).name, transposed)
    operands = {"x": rows, "codes": packed.codes, "absmax": packed.absmax}
    if spec.nested_codebook is not None:
        operands["nested_absmax"] = packed.nested_absmax
        operands["offset"] = jnp.reshape(packed.offset, (-1,))
        operands["table"] = jnp.asarray(np.asarray(spec.nested_codebook, np.float32))
    if packed.layer is not None:
        operands["layer"] = jnp.reshape(packed.layer, (1,)).astype(jnp.int32)
    y = _kernel(plan, tuple(operands))(*operands.values())
    return y.reshape(*x.shape[:-1], plan.columns)


@functools.cache
def _kernel(plan: Plan, names: tuple[str, ...]):
    """The kernel of a plan, taking the operands called `names`."""

    def body(*refs, smem):
        named = dict(zip((*names, "y"), refs, strict=True)) | {"smem": smem}

        @plgpu.inline_mgpu(arg_types=({name: plgpu.RefType() for name in named},))
        def run(_, refs):
            Body(plan, refs).run()

        run(named)  # pyright: ignore[reportCallIssue]

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((plan.m, plan.columns), plan.dtype),
        grid=(plan.grid,),
        grid_names=("i",),
        num_threads=_THREADS // 128,
        thread_name="wg",
        scratch_types={"smem": plgpu.SMEM((SMEM_BYTES,), jnp.uint8)},
        kernel_name="matmul_dx_sm80" if plan.transposed else "matmul_sm80",
    )


def matmul(x: jax.Array, packed: PackedWeight, spec: PackedSpec) -> jax.Array:
    """Multiplies, y = x @ W, accumulated in float32.

    Args:
        x: bfloat16 or float16 [..., k].
        packed: the weight, 4-bit codes.
        spec: what its arrays mean.

    Returns:
        [..., n], in x's type.

    Raises:
        NotImplementedError: if this kernel cannot: other types, k not a multiple of 64,
            n not of 8, block sizes that are not powers of two from 32 on.
    """
    return _run(x, packed, spec, transposed=False)


def matmul_dx(dy: jax.Array, packed: PackedWeight, spec: PackedSpec) -> jax.Array:
    """Multiplies by the transpose, dx = dy @ Wᵀ, accumulated in float32.

    Args:
        dy: bfloat16 or float16 [..., n].
        packed: the weight, 4-bit codes.
        spec: what its arrays mean.

    Returns:
        [..., k], in dy's type.

    Raises:
        NotImplementedError: as `matmul`.
    """
    return _run(dy, packed, spec, transposed=True)

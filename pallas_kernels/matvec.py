"""y = x @ W for few rows of x (decoding): one pass over the codes, bound by memory.

At a handful of rows the weight is all there is to read, so the kernel is a stream of
codes into shared memory, decoded a *pair* of codes at a time:

* A table of the 256 possible bytes, each as a pair of 16-bit numbers, is laid out once
  a lane, entry `e` of lane `l` at byte `256 e + 4 l`. Every lane stays in its own
  bank, so a warp looks up 32 arbitrary bytes in one cycle, and the address is the code
  byte put above the lane's own offset: one `prmt` and one load for two codes.
* The pairs are, in this order, the A fragment of `mma.m16n8k16`: 16 rows of W by 16
  columns. Lane (g, t) holds two rows, and as x may be read in any order of k, its
  share of a block of 64 columns is simply the 16 neighbours from 16 t on.
* x is the B fragment, eight rows of it. With four rows or fewer the spare columns of
  B separate *blocks*: column b' * rows + m holds row m in the blocks b' and zeros in
  the others, so several blocks accumulate in one fragment although their scales differ,
  and each lane looks up the scales of one block only.
* A product is accumulated over one block, scaled in float32 and added up in float32:
  the only rounding is that of the codebook (and of y) to 16 bits.

The grid fills the GPU once: each block of threads owns a run of 16-row groups, as even
as possible. Two bodies share this:

* `matvec_slices`, up to 16 rows: each warp owns columns, 256 at a time, keeps their x
  in registers and takes all rows through them.
* `matvec_body`, for the rest: x lies in shared memory, the TMA unit fills a ring of
  each warp, and `row_warps` x `k_warps` warps split the rows and k tile by tile.

Partial sums meet in shared memory, always in the same order: results are deterministic.
"""

import functools
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np

from pallas_kernels import few_rows, matvec_body, matvec_slices, tuning
from pallas_kernels.decode import pair_table
from pallas_kernels.matvec_plan import BLOCK, CHUNK, TABLE_BYTES, Plan, Tile
from pallas_kernels.matvec_slices_plan import SlicePlan, Slices
from pallas_kernels.packed import PackedSpec, PackedWeight

MAX_M = 32
SLICES_MAX_M = 16
_SMEM_BYTES = 226 * 1024


def lookup_table(spec: PackedSpec, dtype) -> np.ndarray:
    """The 256 pairs of a byte's two numbers and the 256 nested numbers, as words.

    Args:
        spec: whose codebooks to take.
        dtype: bfloat16 or float16.

    Returns:
        uint32 [512]. Word `e` has the number of the high half of `e`, the even
        column, in its low half; words from 256 on are the bits of float32 numbers.
    """
    pairs = pair_table(spec.codebook, jnp.dtype(dtype).name)
    nested = np.zeros(256, np.float32)
    if spec.nested_codebook is not None:
        nested = np.asarray(spec.nested_codebook, np.float32)
    return np.concatenate([pairs, nested.view(np.uint32)])


def candidate_tiles(m: int, n: int, k: int) -> list[Tile]:
    """Tiles for a shape, the likely fastest first; not all of them fit.

    A tile covers all rows of a block of threads where it can. More rows of x want more
    rows of W in a warp, since these share what is read of x.
    """
    groups = -(
        -n // (16 * tuning.multiprocessors())
    )  # of 16 rows, of a block of threads
    chunks = -(-k // CHUNK)
    found = []
    for phases in (1, 2, 4, 8, 16, 32, 64):
        per_phase = -(-chunks // phases)
        for row_groups in (2, 4, 1) if m <= 8 else (4, 2, 1):
            for warps in (8, 16, 12) if m <= 8 else (8,):
                for k_warps in (16, 12, 8, 6, 4, 3, 2, 1):
                    if warps % k_warps or k_warps > per_phase:
                        continue
                    for stages in (3, 2):
                        tile = Tile(
                            row_groups, warps // k_warps, k_warps, stages, phases
                        )
                        tiles = -(-groups // tile.groups)
                        rounds = -(-per_phase // k_warps) * phases
                        # Chunks that a warp decodes, idle ones included.
                        work = tiles * tile.groups * rounds * k_warps
                        waste = work / (groups * chunks)
                        found.append((phases, waste > 1.2, tiles, len(found), tile))
    return [tile for *_, tile in sorted(found, key=lambda t: t[:4])]


def candidate_slices(m: int, n: int, k: int) -> list[Slices]:
    """Ways to give slices of columns to warps, the likely fastest first.

    Few rows of x need few registers, and allow more warps. Little shared memory is
    faster than deep rings (measured).
    """
    slices = k // CHUNK
    phases = -(-slices // (20 if m <= 8 else 16))
    k_warps = -(-slices // phases)
    groups = -(-n // (16 * tuning.multiprocessors()))
    batches = range(groups, 0, -1) if m <= 8 else (1,)
    return [Slices(k_warps, phases, 1, batch) for batch in batches]


def make_plan(
    m: int,
    dtype,
    packed: PackedWeight,
    spec: PackedSpec,
    tile: Tile | Slices | None,
) -> Plan | SlicePlan:
    """Checks what this kernel can do, and chooses how."""
    n, k = spec.n, spec.k
    tuning.require(9, "the TMA unit came with 9.0")
    few_rows.check(m, MAX_M, dtype, spec)
    if spec.block_size < BLOCK or spec.block_size & (spec.block_size - 1):
        raise NotImplementedError(
            f"block_size={spec.block_size} must be a power of two from {BLOCK} on."
        )
    nested = spec.nested_block_size if packed.nested_absmax is not None else None
    if nested is not None and (nested < 4 or nested & (nested - 1)):
        raise NotImplementedError(
            f"nested_block_size={nested} must be a power of two from 4 on."
        )
    grid = min(tuning.multiprocessors(), -(-n // 16))
    name = jnp.dtype(dtype).name
    if tile is not None:
        candidates = [tile]
    else:
        sliced = m <= SLICES_MAX_M and k % CHUNK == 0 and spec.block_size == BLOCK
        candidates = candidate_slices(m, n, k) if sliced and k >= 8 * CHUNK else []
        candidates += candidate_tiles(m, n, k)
    for candidate in candidates:
        if isinstance(candidate, Slices):
            plan = SlicePlan(m, n, k, name, nested, candidate, grid)
        else:
            plan = Plan(m, n, k, name, nested, candidate, grid, spec.block_size)
        if plan.total_smem_bytes <= _SMEM_BYTES:
            return plan
    raise NotImplementedError(f"x of {m=} rows and {k=} does not fit {tile or 'here'}.")


def matmul(
    x: jax.Array,
    packed: PackedWeight,
    spec: PackedSpec,
    *,
    tile: Tile | Slices | None = None,
) -> jax.Array:
    """Multiplies up to 32 rows, y = x @ W.

    Each block of 64 columns is accumulated in float32 on the codebook's numbers in x's
    type, multiplied by its float32 scale, and added up in float32.

    Args:
        x: bfloat16 or float16 [..., k], at most 32 rows in all.
        packed: the weight, 4-bit codes.
        spec: what its arrays mean.
        tile: how to cut the work; by default the first candidate that fits.

    Returns:
        [..., n], in x's type.

    Raises:
        NotImplementedError: if this kernel cannot: GPUs before Hopper, other types,
            more rows, k not a multiple of 64, block sizes that are not powers of two
            from 64 on.
    """
    rows = x.reshape(-1, x.shape[-1])
    plan = make_plan(rows.shape[0], x.dtype, packed, spec, tile)
    table = jnp.asarray(lookup_table(spec, x.dtype))
    operands = few_rows.operands(rows, packed, table=table)
    y = _kernel(plan, tuple(operands))(*operands.values())
    return y.reshape(*x.shape[:-1], spec.n)


@functools.cache
def _kernel(plan: Plan | SlicePlan, names: tuple[str, ...]):
    """The kernel of a plan, taking the operands called `names`."""
    body: Any = {Plan: matvec_body, SlicePlan: matvec_slices}[type(plan)].Body

    def matvec(*refs, table_smem, ring, smem):
        *operands, y = refs
        named = dict(zip(names, operands, strict=True))
        named |= {"y": y, "table_smem": table_smem, "ring": ring, "smem": smem}

        @plgpu.inline_mgpu(arg_types=({name: plgpu.RefType() for name in named},))
        def run(ctx, refs):
            body(plan, ctx, refs).run()

        run(named)  # pyright: ignore[reportCallIssue]

    return plgpu.kernel(
        matvec,
        out_type=jax.ShapeDtypeStruct((plan.m, plan.n), plan.dtype),
        grid=(plan.grid,),
        grid_names=("i",),
        num_threads=plan.threads // 128,
        thread_name="wg",
        scratch_types={
            "table_smem": plgpu.SMEM((TABLE_BYTES,), jnp.uint8),
            "ring": plgpu.SMEM((plan.ring_bytes,), jnp.uint8),
            "smem": plgpu.SMEM((plan.smem_offsets["end"],), jnp.uint8),
        },
    )

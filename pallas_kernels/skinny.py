"""y = x @ W for tens of rows of x: wgmma on codes that warps decode as they come.

Too many rows for `matvec`, which holds x in registers; too few to pay for a loader that
rearranges codes, as in `matmul_sm90`. A block of threads computes tiles of 256
features, 64 for each of four warpgroups:

* wgmma's first operand is the decoded weight, from registers; its second is x in shared
  memory. So yᵀ is accumulated, and x may have 8, 16, ... 128 rows.
* Two warps of one more warpgroup keep two rings full by TMA: tiles of x of 128 columns,
  and codes of 256 columns of all features. Little but these copies, one table look-up
  for two weights and wgmma itself goes through shared memory, which bounds the kernel.
* wgmma wants pairs of neighbouring columns, bytes of codes, in neighbouring lanes. A
  lane loads 16 bytes of one row, and the four lanes of a quad give each other theirs:
  4 x 4 bytes are transposed in registers, and three words change places.
* Every byte is looked up in a table of pairs of which each lane has a copy in its own
  bank of shared memory, as in `matvec`, and multiplied by the scale in 16 bits.
* Tiles are laid end to end and cut into as many runs as there are multiprocessors, so
  that all end together. Parts of a tile meet in device memory, always in the same
  order: results are deterministic. A third warp tells that a part is there, and brings
  one to shared memory before it is needed.

Here are the op and its checks; `skinny_plan` says how the work is cut, `skinny_body`
what a thread does.
"""

import dataclasses
import functools

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels import few_rows, tuning
from pallas_kernels.matvec_plan import BLOCK, TABLE_BYTES
from pallas_kernels.packed import PackedSpec, PackedWeight
from pallas_kernels.skinny_body import Body
from pallas_kernels.skinny_plan import SMEM_BYTES, Cut, SkinnyPlan

MAX_M = 128


def candidate_cuts(m: int) -> list[Cut]:
    """Cuts for so many rows, the likely fastest first; not all of them fit."""
    if m <= 32:
        return [Cut(3, 4, lead=1), Cut(4, 4), Cut(4, 4, lead=1)]
    if m <= 64:
        return [Cut(3, 4, at_once=2), Cut(3, 4), Cut(3, 4, lead=1), Cut(4, 4)]
    return [Cut(3, 2), Cut(3, 2, lead=1), Cut(2, 3)]


def make_plan(
    m: int, dtype, packed: PackedWeight, spec: PackedSpec, cut: Cut | None
) -> SkinnyPlan:
    """Checks what this kernel can do, and chooses how."""
    n, k = spec.n, spec.k
    capability = tuning.compute_capability()
    if capability is not None and int(capability) != 9:
        raise NotImplementedError(f"{capability=}: Hopper, 9.0, only.")
    few_rows.check(m, MAX_M, dtype, spec)
    if n % 2:
        raise NotImplementedError(f"{n=} must be even.")
    if spec.block_size % BLOCK:
        raise NotImplementedError(
            f"block_size={spec.block_size} must be a multiple of {BLOCK}."
        )
    nested = spec.nested_block_size if packed.nested_absmax is not None else None
    name = jnp.dtype(dtype).name
    for candidate in [cut] if cut is not None else candidate_cuts(m):
        plan = SkinnyPlan(
            m, n, k, name, nested, candidate, 1, spec.block_size, spec.codebook
        )
        if plan.total_smem_bytes <= SMEM_BYTES:
            grid = min(tuning.multiprocessors(), plan.units)
            return dataclasses.replace(plan, grid=grid)
    raise NotImplementedError(f"{m=} rows of x do not fit {cut or 'here'}.")


def matmul(
    x: jax.Array,
    packed: PackedWeight,
    spec: PackedSpec,
    *,
    cut: Cut | None = None,
) -> jax.Array:
    """Multiplies up to 128 rows, y = x @ W.

    Accumulates in float32; a weight is code times scale, both and their product rounded
    to the type of `x`.

    Args:
        x: bfloat16 or float16 [..., k], at most 128 rows in all.
        packed: the weight, 4-bit codes.
        spec: what its arrays mean.
        cut: how to cut the work; by default the first candidate that fits.

    Returns:
        [..., n], in x's type.

    Raises:
        NotImplementedError: if this kernel cannot: GPUs other than Hopper, other types,
            more rows, k or blocks that are not multiples of 64, n odd.
    """
    rows = x.reshape(-1, x.shape[-1])
    plan = make_plan(rows.shape[0], x.dtype, packed, spec, cut)
    # A kernel leaves them as they were, 0.
    own = {"counters": jnp.zeros(plan.num_counters, jnp.int32)}
    if packed.nested_absmax is not None:
        own["nested_codebook"] = jnp.array(spec.nested_codebook, jnp.float32)
    operands = few_rows.operands(rows, packed, **own)
    y, _ = _kernel(plan, tuple(operands))(*operands.values())
    return y.reshape(*x.shape[:-1], spec.n)


@functools.cache
def _kernel(plan: SkinnyPlan, names: tuple[str, ...]):
    """The kernel of a plan, taking the operands called `names`."""

    def skinny(*refs, table_smem, smem):
        *operands, y, parts = refs
        named = dict(zip(names, operands, strict=True))
        named |= {"y": y, "parts": parts, "table_smem": table_smem, "smem": smem}

        @plgpu.inline_mgpu(arg_types=({name: plgpu.RefType() for name in named},))
        def run(ctx, refs):
            Body(plan, ctx, refs).run()

        run(named)  # pyright: ignore[reportCallIssue]

    return plgpu.kernel(
        skinny,
        out_type=(
            jax.ShapeDtypeStruct((plan.m, plan.n), plan.dtype),
            # What each block leaves of the tile that it did not begin.
            jax.ShapeDtypeStruct((plan.grid, plan.part_floats), jnp.float32),
        ),
        grid=(plan.grid,),
        grid_names=("i",),
        num_threads=plan.cut.threads // 128,
        thread_name="wg",
        scratch_types={
            "smem": plgpu.SMEM((plan.smem_offsets["end"],), jnp.uint8),
            "table_smem": plgpu.SMEM((TABLE_BYTES,), jnp.uint8),
        },
    )

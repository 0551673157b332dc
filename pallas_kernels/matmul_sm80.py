"""y = x @ W and dx = dy @ Wᵀ for GPUs from Ampere on: `cp.async` and `mma.sync`.

One kernel for both products. A block of 128 threads computes 128 x 128 numbers of the
result, a warp 64 x 64 of them, and walks the contracted axis 64 at a time:

    cp.async      x, codes and scales, two stages
    ld.shared     x, which is an operand of `mma` as it comes, and codes, to registers
    decode        a byte of two codes to a pair of numbers, by a load from a table in
                  shared memory, times the block's scale: the other operand of `mma`
    mma           32 products of 16 x 8 x 16 for each 16 numbers of the contracted axis

The decoded weight is in registers only. The next product's numbers are decoded while
the tensor cores work on this one. Warps wait for each other's copies, and for each
other's reading before a stage is filled again, at barriers that each passes in its own
time. Each warp decodes its own features, so each weight is decoded twice a block. Two
blocks share a multiprocessor where its shared memory suffices (106 KB each: on
9.0, not on Ampere).

Scales are decoded by XLA before, and put in the order in which blocks copy them.

Code, scale and their product are each rounded to 16 bits: relative error against
float64 3.2e-3 in bfloat16, 3.7e-4 in float16.
"""

import dataclasses
import functools

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels import reference, tuning
from pallas_kernels.decode import pair_table
from pallas_kernels.matmul_sm80_body import Body
from pallas_kernels.matmul_sm80_copies import (
    BARRIERS_BYTES,
    CODES_BYTES,
    STAGES,
    STEP,
    TABLE_BYTES,
    THREADS,
    TILE_M,
    TILE_N,
    X_BYTES,
)
from pallas_kernels.packed import PackedSpec, PackedWeight


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
    def tiles_m(self) -> int:
        """Tiles along the rows of the result."""
        return -(-self.m // TILE_M)

    @property
    def tiles_n(self) -> int:
        """Tiles along its columns."""
        return -(-self.columns // TILE_N)

    @property
    def steps(self) -> int:
        """Steps along the contracted axis."""
        return -(-self.contracted // STEP)

    @property
    def scale_width(self) -> int:
        """Columns of a weight tile that share a scale."""
        return min(self.spec.block_size, STEP)

    @property
    def num_scales(self) -> int:
        """Scales of a weight tile."""
        return TILE_N * STEP // self.scale_width

    @property
    def stage_bytes(self) -> int:
        """Of a step: x, codes, scales."""
        return X_BYTES + CODES_BYTES + self.num_scales * (2 if self.transposed else 4)

    @property
    def smem_bytes(self) -> int:
        """Shared memory of a block."""
        return TABLE_BYTES + STAGES * self.stage_bytes + BARRIERS_BYTES


def _run(x, packed: PackedWeight, spec: PackedSpec, transposed: bool) -> jax.Array:
    """Checks what this kernel can do, and runs it."""
    capability = tuning.compute_capability()
    if capability is not None and capability < 9:
        # Pallas itself, not this kernel: compiling it there ends the process.
        raise NotImplementedError(
            f"{capability=}: Pallas' Mosaic GPU backend (jax 0.11) puts elect.sync, of "
            "9.0, into every kernel; leave `implementation` out."
        )
    if not x.size:
        raise NotImplementedError(f"{x.shape=} has no rows.")
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"dtype={x.dtype} must be bfloat16 or float16.")
    if spec.bits != 4:
        raise NotImplementedError(f"codes of {spec.bits} bits must have 4.")
    if spec.k % STEP or spec.n % 8:
        raise NotImplementedError(
            f"k={spec.k} must be a multiple of {STEP} and n={spec.n} of 8."
        )
    if spec.n * spec.k // 2 >= 2**32:
        raise NotImplementedError(f"{spec.n} x {spec.k} codes are 4 GiB or more.")
    size = spec.block_size
    if size < 32 or size & (size - 1):
        raise NotImplementedError(
            f"block_size={size} must be a power of two from 32 on."
        )
    rows = x.reshape(-1, x.shape[-1])
    plan = Plan(rows.shape[0], spec, jnp.dtype(x.dtype).name, transposed)
    operands = {"x": rows, "codes": packed.codes, "scales": make_scales(packed, plan)}
    operands["pairs"] = jnp.asarray(pair_table(spec.codebook, plan.dtype))
    if packed.layer is not None:
        operands["layer"] = jnp.reshape(packed.layer, (1,)).astype(jnp.int32)
    y = _kernel(plan, tuple(operands))(*operands.values())
    return y.reshape(*x.shape[:-1], plan.columns)


def make_scales(packed: PackedWeight, plan: Plan) -> jax.Array:
    """The scales in 16 bits, as `Copies` takes them.

    Returns:
        [k / scale_width, n], transposed in the type of x; else uint32, each twice.
    """
    spec, width = plan.spec, plan.scale_width
    packed = reference.select_layer(dataclasses.replace(packed, codes=None))
    scales = reference.decode_absmax(packed, spec).reshape(-1)
    scales = jnp.repeat(scales, spec.block_size // width)[: spec.n * spec.k // width]
    scales = scales.reshape(spec.n, spec.k // width).T.astype(plan.dtype)
    if plan.transposed:
        return scales
    bits = jax.lax.bitcast_convert_type(scales, jnp.uint16).astype(jnp.uint32)
    return bits | bits << jnp.uint32(16)


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
        grid=(plan.tiles_m * plan.tiles_n,),
        grid_names=("i",),
        num_threads=THREADS // 128,
        thread_name="wg",
        scratch_types={"smem": plgpu.SMEM((plan.smem_bytes,), jnp.uint8)},
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

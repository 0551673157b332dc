"""y = x @ W and dx = dy @ Wᵀ for GPUs from Ampere on: `cp.async` and `mma.sync`.

One kernel for both products. A block of 256 threads computes tiles of 128 x 256 numbers
of the result, one after the other, a warp all 128 rows of 32 features, and walks the
contracted axis 64 or 128 at a time:

    cp.async      x, codes and scales, two or three stages
    ld.shared     x, which is an operand of `mma` as it comes, and codes, to registers
    decode        a byte of two codes to a pair of numbers, by a load from a table in
                  shared memory, times the block's scale: the other operand of `mma`
    mma           32 products of 16 x 8 x 16 for each 16 numbers of the contracted axis

What counts is how many instructions there are beside each `mma`, so a warp has as many
rows as its registers hold sums of: each weight is decoded by one warp, once for 128
rows. The decoded weight is in registers only, and the next product's numbers are
decoded while the tensor cores work on this one. Warps wait for each other's copies, and
for each other's reading before a stage is filled again, at barriers that each passes in
its own time. A block is one to a multiprocessor, and copies the first step of its next
tile while it is at the last of this one.

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
from pallas_kernels.matmul_sm80_copies import STEP, THREADS, TILE_M, TILE_N
from pallas_kernels.packed import PackedSpec, PackedWeight


@dataclasses.dataclass(frozen=True)
class Config:
    """What a block's shared memory is used for.

    Attributes:
        stages: steps that lie in it at once.
        parts: of 64 numbers of the contracted axis, of a step.
        row_bytes: of the table of pairs: 128, or 256, half of it empty, where a byte of
            codes is a byte of an offset.
    """

    stages: int
    parts: int
    row_bytes: int


# The first that fits is taken: on 9.0, on 8.0, on 8.6 and 8.9.
CONFIGS = (Config(3, 2, 256), Config(3, 1, 256), Config(2, 1, 128))


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
    config: Config
    multiprocessors: int

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
    def tiles(self) -> int:
        """Tiles of the result."""
        return self.tiles_m * self.tiles_n

    @property
    def blocks(self) -> int:
        """Blocks of threads, which take tiles in turn."""
        return min(self.tiles, self.multiprocessors)

    @property
    def steps(self) -> int:
        """Steps along the contracted axis."""
        return -(-self.contracted // (STEP * self.config.parts))

    @property
    def exact(self) -> bool:
        """Whether tiles and steps end where the weight does."""
        width = STEP * self.config.parts
        return not (self.columns % TILE_N or self.contracted % width)

    @property
    def scale_width(self) -> int:
        """Columns of a weight tile that share a scale."""
        return min(self.spec.block_size, STEP)

    @property
    def x_bytes(self) -> int:
        """Of x, of a part of a step."""
        return TILE_M * STEP * 2

    @property
    def codes_bytes(self) -> int:
        """Of codes, of a part of a step."""
        return TILE_N * STEP // 2

    @property
    def scales_bytes(self) -> int:
        """Of scales, of a part of a step."""
        count = TILE_N * STEP // self.scale_width
        return count * (2 if self.transposed else 4)

    @property
    def stage_bytes(self) -> int:
        """Of a step: x, codes, scales."""
        return (self.x_bytes + self.codes_bytes + self.scales_bytes) * self.config.parts

    @property
    def table_bytes(self) -> int:
        """Of the table of pairs."""
        return 256 * self.config.row_bytes

    @property
    def smem_bytes(self) -> int:
        """Shared memory of a block, two barriers a stage included."""
        return self.table_bytes + self.config.stages * (self.stage_bytes + 2 * 8)


def make_plan(m: int, dtype, spec: PackedSpec, transposed: bool) -> Plan:
    """Checks what this kernel can do, and chooses how.

    Raises:
        NotImplementedError: if it cannot.
    """
    tuning.require(8, "cp.async came with 8.0")
    if dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"{dtype=} must be bfloat16 or float16.")
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
    available, name = tuning.shared_memory(), jnp.dtype(dtype).name
    for config in CONFIGS:
        plan = Plan(m, spec, name, transposed, config, tuning.multiprocessors())
        if plan.smem_bytes <= available:
            return plan
    raise NotImplementedError(
        f"A block needs {plan.smem_bytes} bytes of shared memory; there are "
        f"{available}."
    )


def _run(x, packed: PackedWeight, spec: PackedSpec, transposed: bool) -> jax.Array:
    """Runs the kernel."""
    if not x.size:
        raise NotImplementedError(f"{x.shape=} has no rows.")
    rows = x.reshape(-1, x.shape[-1])
    plan = make_plan(rows.shape[0], x.dtype, spec, transposed)
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
        grid=(plan.blocks,),
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

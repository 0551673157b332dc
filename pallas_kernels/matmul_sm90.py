"""Matmuls with a 4-bit weight on Hopper GPUs, for many rows of x.

    matmul      y[m, n]  = x[m, k]  @ W[n, k]ᵀ
    matmul_dx   dx[m, k] = dy[m, n] @ W[n, k]

Both read the codes as they are stored and decode them into registers: no decoded copy
of a weight exists in device or shared memory. A block of three warpgroups computes 128
features of `tile_m` rows:

    loader     copies tiles of x (or dy) by TMA, and puts codes and scales into shared
               memory in the order in which the consumers' lanes want them
    consumers  two warpgroups, each 64 features: wgmma with the decoded weight as its
               first operand, from registers, and x transposed as its second, from
               shared memory, so that what is accumulated is a tile of yᵀ. While the
               tensor cores work on a step of 64 numbers of the contraction, the warps
               decode the next.

What a lane must hold of the first operand are pairs along the contraction of two rows.
Which features the rows are is free: neighbours, so that results need no exchange of
lanes. A lane loads its 32 weights of a step at once, 16 bytes.

    forward    pairs lie in a byte of codes. The loader transposes 4 x 4 bytes, so that
               a lane's bytes are neighbours.
    backward   pairs lie in two rows of codes. The loader puts their nibbles together
               into bytes of pairs, and then does the same.

A byte of two codes becomes a pair of numbers by one load from a table of all 256, of
which every lane has a copy in its own bank of shared memory, or by byte permutes (see
`decode.py`).

Here are the ops and their configuration; `matmul_sm90_body` has the kernel,
`matmul_sm90_loader` how codes and scales arrive, `matmul_sm90_consumer` how they become
operands and how results leave, and `matmul_sm90_lanes` what one lane does.
"""

import dataclasses
import functools
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels import decode, tuning
from pallas_kernels.matmul_sm90_body import (
    CODE_STAGES,
    OUT_SLOTS,
    TILE_FEATURES,
    body,
    scratch,
)
from pallas_kernels.matmul_sm90_consumer import OUT_ROWS
from pallas_kernels.matmul_sm90_lanes import (
    CODES_BYTES,
    LANES,
    SPAN_STEPS,
    STEP,
    STEP_WORDS,
    TABLE_BYTES,
)
from pallas_kernels.packed import PackedSpec, PackedWeight

if TYPE_CHECKING:
    from jaxtyping import Array, Float

# Shared memory of a block on Hopper, less what barriers and the compiler take.
_SHARED_BYTES = 225 * 1024

Pass = Literal["forward", "backward"]


@dataclasses.dataclass(frozen=True)
class Config:
    """How the output is cut and how deep the pipeline is.

    Attributes:
        tile_m: rows of x of a block.
        stages: tiles of x in shared memory.
        cluster: 2 lets pairs of blocks, neighbours in features, share tiles of x.
        raster: which of rows and features varies faster from block to block.
        raster_width: how many tiles of the faster one before the slower one moves.
        divided: whether tiles that do not fill the last round of multiprocessors are
            divided along the contraction, and added up in float32.
        permuted: words of codes, of a lane's four a step, that are decoded by byte
            permutes; the others by the table. Permutes are slow, but leave shared
            memory, which bounds the kernel too, to the tensor cores.
    """

    tile_m: int = 256
    stages: int = 4
    cluster: int = 1
    raster: Literal["rows", "features"] = "rows"
    raster_width: int = 8
    permuted: int = 1
    divided: bool = False

    def __post_init__(self):
        if self.tile_m not in (64, 128, 192, 256):
            raise ValueError(f"{self.tile_m=} must be 64, 128, 192 or 256.")
        if self.stages < 2:
            raise ValueError(f"{self.stages=} must be at least 2.")
        if self.cluster not in (1, 2):
            raise ValueError(f"{self.cluster=} must be 1 or 2.")
        if self.raster not in ("rows", "features"):
            raise ValueError(f"{self.raster=} must be 'rows' or 'features'.")
        if not 0 <= self.permuted <= STEP_WORDS:
            raise ValueError(f"{self.permuted=} must be 0 to {STEP_WORDS}.")
        if self.divided and self.cluster > 1:
            raise ValueError("Tiles of a cluster are not divided: use cluster=1.")
        if self.shared_bytes > _SHARED_BYTES:
            raise ValueError(
                f"{self} takes {self.shared_bytes} bytes of shared memory, a block has "
                f"{_SHARED_BYTES}: use fewer stages."
            )

    @property
    def shared_bytes(self) -> int:
        """Bytes of shared memory, barriers not counted."""
        return (
            TABLE_BYTES * (self.permuted < STEP_WORDS)
            + 256 * 4
            + self.stages * self.tile_m * STEP * 2
            + CODE_STAGES * (CODES_BYTES + LANES * SPAN_STEPS * 4)
            + 2 * OUT_SLOTS * OUT_ROWS * 64 * 2
        )


def matmul(
    x: "Float[Array, 'm k']",
    packed: PackedWeight,
    spec: PackedSpec,
    *,
    config: Config | None = None,
    addend: "tuple[Float[Array, 'm r'], Float[Array, 'n r']] | None" = None,
    onto: "Float[Array, 'm n'] | None" = None,
) -> "Float[Array, 'm n']":
    """Multiplies by a quantized weight: y = x @ Wᵀ, W the dequantized [n, k].

    Accumulates in float32; a weight is code times scale, both and their product rounded
    to the type of `x`.

    Args:
        x: bfloat16 or float16.
        packed: the weight; a stack of weights if `packed.layer` says which one.
        spec: what its arrays mean.
        config: tiles and stages; None chooses by shape.
        addend: t and u, of which y gets t @ uᵀ added, in the same accumulators.
        onto: what y is added to, in float32, before it is rounded.

    Returns:
        y in the type of `x`.

    Raises:
        ValueError: if `x` does not fit the weight.
        NotImplementedError: for a type, format or shape the kernel does not do.
    """
    return _call("forward", x, packed, spec, config, addend, onto)


def matmul_dx(
    dy: "Float[Array, 'm n']",
    packed: PackedWeight,
    spec: PackedSpec,
    *,
    config: Config | None = None,
    addend: "tuple[Float[Array, 'm r'], Float[Array, 'k r']] | None" = None,
    onto: "Float[Array, 'm k'] | None" = None,
) -> "Float[Array, 'm k']":
    """The gradient of `matmul` with respect to x: dx = dy @ W.

    Args:
        dy: bfloat16 or float16.
        packed: the weight, as in `matmul`.
        spec: what its arrays mean.
        config: tiles and stages; None chooses by shape.
        addend: t and u, of which dx gets t @ uᵀ added, in the same accumulators.
        onto: what dx is added to, in float32, before it is rounded.

    Returns:
        dx in the type of `dy`.

    Raises:
        ValueError: if `dy` does not fit the weight.
        NotImplementedError: for a type, format or shape the kernel does not do.
    """
    return _call("backward", dy, packed, spec, config, addend, onto)


def default_config(direction: Pass, m: int, spec: PackedSpec) -> Config:
    """The configuration that should be fastest for this shape; see `tuning`."""
    op = "matmul" if direction == "forward" else "matmul_dx"
    tiling = tuning.best_tiling(op, m, spec)
    return Config(
        tile_m=tiling.tile_m,
        stages={256: 4, 192: 5, 128: 6, 64: 8}[tiling.tile_m],
        cluster=2 if tiling.pairs else 1,
        divided=tiling.divided,
    )


def candidates() -> list[Config]:
    """Configurations among which measurements choose."""
    return [
        *(Config(permuted=p) for p in (0, 1, 2)),
        Config(cluster=2),
        Config(divided=True),
        Config(tile_m=192, stages=5),
        Config(tile_m=192, stages=5, divided=True),
        Config(tile_m=128, stages=6),
        Config(tile_m=128, stages=6, divided=True),
        Config(tile_m=64, stages=8, divided=True),
    ]


def _check(direction: Pass, x: Any, packed: PackedWeight, spec: PackedSpec) -> None:
    """Says no to what the kernel cannot do, before anything is traced."""
    contraction = spec.k if direction == "forward" else spec.n
    if x.ndim != 2 or x.shape[1] != contraction:
        raise ValueError(
            f"{x.shape=} does not fit the {direction} pass of a weight of "
            f"{spec.n} x {spec.k}: its last axis must be {contraction}."
        )
    capability = tuning.compute_capability()
    if capability is not None and int(capability) != 9:
        raise NotImplementedError(f"{capability=}: Hopper, 9.0, only.")
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"{x.dtype=}: bfloat16 or float16 only.")
    if spec.bits != 4:
        raise NotImplementedError(f"{spec.bits=}: 4-bit formats only.")
    if spec.block_size % STEP or not spec.blocks_in_rows:
        raise NotImplementedError(
            f"{spec.block_size=} must be a multiple of {STEP} that divides {spec.k=}."
        )
    if not x.shape[0]:
        raise NotImplementedError("x has no rows.")
    stacked = packed.layer is not None
    if packed.codes.ndim != 2 + stacked:
        raise ValueError(
            f"{packed.codes.shape=} must have {2 + stacked} axes "
            f"{'with' if stacked else 'without'} a layer index."
        )


def _call(direction, x, packed, spec, config, addend, onto):
    _check(direction, x, packed, spec)
    if addend is not None and x.shape[1] <= STEP:
        # On an H200 the result was off by 2e-2: steps of an addend follow a whole span.
        raise NotImplementedError(
            f"An addend with a contraction of {x.shape[1]}: {STEP + 1} or more only."
        )
    features = spec.n if direction == "forward" else spec.k
    if onto is not None and features % 2:
        raise NotImplementedError(f"An odd number of features to add: {features}.")
    config = config or default_config(direction, x.shape[0], spec)
    return _product(
        x,
        packed,
        addend,
        onto,
        direction=direction,
        spec=spec,
        config=config,
        workers=tuning.multiprocessors() // config.cluster,
    )


# Compiled as part of what calls it. But it is traced once for all calls that are alike,
# and so lowered once in a program, which takes a second.
@functools.partial(
    jax.jit, static_argnames=("direction", "spec", "config", "workers"), inline=True
)
def _product(x, packed, addend, onto, *, direction, spec, config, workers):
    m, out_features = x.shape[0], spec.n if direction == "forward" else spec.k
    # TMA sees rows in eights and columns in sixty-fours, and fills up and cuts off what
    # a tile has beyond them. No copy for the shapes of language models.
    columns_pad = -x.shape[1] % STEP
    if m % 8 or columns_pad:
        x = jnp.pad(x, ((0, -m % 8), (0, columns_pad)))
    tail = []
    if addend is not None:
        t, u = addend
        rows_pad, rank_pad = x.shape[0] - m, -t.shape[1] % STEP
        t = jnp.pad(t, ((0, rows_pad), (0, rank_pad)))
        u = jnp.pad(u, ((0, 0), (0, rank_pad)))
        tail = [t, u]
    out_shape = (x.shape[0], out_features + -out_features % STEP)
    row_blocks = spec.k // spec.block_size
    stacked = packed.layer is not None
    layers = packed.codes.shape[0] if stacked else 1
    layer = [packed.layer.reshape(1).astype(jnp.int32)] if stacked else []
    # [layers * n, k / 2]: the layer is an offset of rows
    codes = packed.codes.reshape(layers * spec.n, spec.k // 2)
    scales = [packed.absmax.reshape(layers * spec.n * row_blocks)]
    if spec.nested_codebook is not None:
        scales += [
            packed.nested_absmax.reshape(-1),
            packed.offset.reshape(layers),
            jnp.array(spec.nested_codebook, jnp.float32),
        ]
    pairs = decode.pair_table(spec.codebook, x.dtype.name)
    out_type = jax.ShapeDtypeStruct(out_shape, x.dtype)
    counters = []
    if config.divided:
        # A worker leaves one part at most.
        part = (workers, TILE_FEATURES * config.tile_m)
        out_type = out_type, jax.ShapeDtypeStruct(part, jnp.float32)
        # A kernel leaves them as they were, 0.
        counters = [jnp.zeros(8 * workers, jnp.int32)]
    kernel = plgpu.kernel(
        functools.partial(
            body,
            forward=direction == "forward",
            spec=spec,
            config=config,
            stacked=stacked,
            tail=tail[0].shape[1] // STEP if tail else 0,
            added=onto is not None,
        ),
        out_type=out_type,
        scratch_types=scratch(x.dtype, spec, config),
        grid=(workers,),
        grid_names=("sm",),
        cluster=(config.cluster,),
        cluster_names=("cluster",),
        num_threads=3,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True
        ),
        kernel_name=f"packed_matmul_{direction}",
    )
    out = kernel(
        jnp.array(pairs),
        x,
        codes,
        *layer,
        *tail,
        *([] if onto is None else [onto]),
        *counters,
        *scales,
    )
    if config.divided:
        out, _ = out
    return out if out.shape == (m, out_features) else out[:m, :out_features]

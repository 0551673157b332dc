"""Matmuls with a 4-bit weight on Hopper GPUs, for many rows of x.

    matmul      y[m, n]  = x[m, k]  @ W[n, k]ᵀ
    matmul_dx   dx[m, k] = dy[m, n] @ W[n, k]

Both read the codes as they are stored and decode them into shared memory, never into
device memory. A block of three warpgroups computes 128 features of `tile_m` rows:

    loader     copies tiles of x (or dy) and of codes by TMA, and makes float32 scales
    consumers  two warpgroups, each 64 features: while the tensor cores work on one
               span of 128 numbers of the contraction, the warps decode the next into a
               swizzled tile of shared memory, a block of 64 weights a lane (see
               `decode.py`); wgmma takes the decoded tile as its first operand and x
               transposed as its second, so that what is accumulated is a tile of yᵀ

The decoded tile of a consumer and a span is two halves of [64, 64] numbers, k running
fastest as the codes do: forward, 64 features by twice 64 of k; backward, twice 64 of n
by 64 features, and wgmma reads it transposed. Nothing else differs between the passes.
"""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, llvm
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jaxtyping import Array, Float

from pallas_kernels import decode
from pallas_kernels.packed import PackedSpec, PackedWeight

# Features of a block; a warpgroup of consumers has half of them.
TILE_FEATURES = 128
# Contraction of a wgmma: 64 16-bit numbers are the 128 bytes of a swizzled row.
STEP = 64
# Steps that are decoded together, so that every lane of a consumer has 64 weights.
SPAN_STEPS = 2
SPAN = STEP * SPAN_STEPS
# Spans of codes and scales in shared memory: one read, one on its way.
CODE_STAGES = 2
# Decoded spans in shared memory: one under wgmma, one being written.
WEIGHT_STAGES = 2
# Results leave in tiles of so many rows, through two of them a consumer.
OUT_ROWS = 32
OUT_SLOTS = 2
# Shared memory of a block on Hopper, less a little for barriers.
SHARED_BYTES = 227 * 1024 - 512
LANES = 128
# A lane of each of the three warpgroups brings 168.
LOADER_REGISTERS = 56
CONSUMER_REGISTERS = 224

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
    """

    tile_m: int = 256
    stages: int = 4
    cluster: int = 1
    raster: Literal["rows", "features"] = "rows"
    raster_width: int = 8

    def __post_init__(self):
        if self.tile_m not in (64, 128, 192, 256):
            raise ValueError(f"{self.tile_m=} must be 64, 128, 192 or 256.")
        if self.stages < 2:
            raise ValueError(f"{self.stages=} must be at least 2.")
        if self.cluster not in (1, 2):
            raise ValueError(f"{self.cluster=} must be 1 or 2.")
        if self.raster not in ("rows", "features"):
            raise ValueError(f"{self.raster=} must be 'rows' or 'features'.")
        if self.shared_bytes > SHARED_BYTES:
            raise ValueError(
                f"{self} takes {self.shared_bytes} bytes of shared memory, a block has "
                f"{SHARED_BYTES}: use fewer stages."
            )

    @property
    def shared_bytes(self) -> int:
        """Bytes of shared memory, barriers not counted."""
        return (
            self.stages * self.tile_m * STEP * 2
            + WEIGHT_STAGES * TILE_FEATURES * SPAN * 2
            + CODE_STAGES * TILE_FEATURES * (SPAN // 2 + SPAN_STEPS * 4)
            + 2 * OUT_SLOTS * OUT_ROWS * 64 * 2
        )


def matmul(
    x: Float[Array, "m k"],
    packed: PackedWeight,
    spec: PackedSpec,
    *,
    config: Config | None = None,
) -> Float[Array, "m n"]:
    """Multiplies by a quantized weight: y = x @ Wᵀ, W the dequantized [n, k].

    Accumulates in float32; a weight is code times scale in float32, rounded once to the
    type of `x`.

    Args:
        x: bfloat16 or float16.
        packed: the weight; a stack of weights if `packed.layer` says which one.
        spec: what its arrays mean.
        config: tiles and stages; None chooses by shape.

    Returns:
        y in the type of `x`.

    Raises:
        ValueError: if `x` does not fit the weight.
        NotImplementedError: for a type, format or shape the kernel does not do.
    """
    return _call("forward", x, packed, spec, config)


def matmul_dx(
    dy: Float[Array, "m n"],
    packed: PackedWeight,
    spec: PackedSpec,
    *,
    config: Config | None = None,
) -> Float[Array, "m k"]:
    """The gradient of `matmul` with respect to x: dx = dy @ W.

    Args:
        dy: bfloat16 or float16.
        packed: the weight, as in `matmul`.
        spec: what its arrays mean.
        config: tiles and stages; None chooses by shape.

    Returns:
        dx in the type of `dy`.

    Raises:
        ValueError: if `dy` does not fit the weight.
        NotImplementedError: for a type, format or shape the kernel does not do.
    """
    return _call("backward", dy, packed, spec, config)


def default_config(direction: Pass, m: int, spec: PackedSpec) -> Config:
    """The configuration measured best on an H200 for about this shape."""
    del direction, spec
    if m <= 64:
        return Config(tile_m=64, stages=8)
    if m <= 128:
        return Config(tile_m=128, stages=6)
    return Config()


def _check(direction: Pass, x: Any, packed: PackedWeight, spec: PackedSpec) -> None:
    """Says no to what the kernel cannot do, before anything is traced."""
    contraction = spec.k if direction == "forward" else spec.n
    if x.ndim != 2 or x.shape[1] != contraction:
        raise ValueError(
            f"{x.shape=} does not fit the {direction} pass of a weight of "
            f"{spec.n} x {spec.k}: its last axis must be {contraction}."
        )
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


def _num_sms() -> int:
    """Multiprocessors of the device the kernel is for; an H200's without a device."""
    if device := jax.sharding.get_abstract_mesh().abstract_device:
        return device.num_cores
    device = jax.devices()[0]
    return device.core_count if device.platform == "gpu" else 132


def _call(direction, x, packed, spec, config):
    _check(direction, x, packed, spec)
    config = config or default_config(direction, x.shape[0], spec)
    m, out_features = x.shape[0], spec.n if direction == "forward" else spec.k
    # TMA sees rows in eights and columns in sixty-fours, and fills up and cuts off what
    # a tile has beyond them. No copy for the shapes of language models.
    columns_pad = -x.shape[1] % STEP
    if m % 8 or columns_pad:
        x = jnp.pad(x, ((0, -m % 8), (0, columns_pad)))
    out_shape = (x.shape[0], out_features + -out_features % STEP)
    row_blocks = spec.k // spec.block_size
    layers = 1 if packed.layer is None else packed.codes.shape[0]
    layer = jnp.zeros((), jnp.int32) if packed.layer is None else packed.layer
    # [layers * n, k / 2]: the layer is an offset of rows
    codes = packed.codes.reshape(layers * spec.n, spec.k // 2)
    scales = [packed.absmax.reshape(layers * spec.n * row_blocks)]
    if spec.nested_codebook is not None:
        scales += [
            packed.nested_absmax.reshape(-1),
            packed.offset.reshape(layers),
            jnp.array(spec.nested_codebook, jnp.float32),
        ]
    kernel = plgpu.kernel(
        functools.partial(_body, direction=direction, spec=spec, config=config),
        out_type=jax.ShapeDtypeStruct(out_shape, x.dtype),
        scratch_types=_scratch(x.dtype, spec, config),
        grid=(_num_sms() // config.cluster,),
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
    out = kernel(layer.reshape(1).astype(jnp.int32), x, codes, *scales)
    return out if out.shape == (m, out_features) else out[:m, :out_features]


def _swizzled(items: int = STEP, row_bytes: int = 128) -> tuple:
    return (plgpu.TilingTransform((8, items)), plgpu.SwizzleTransform(row_bytes))


def _codes_transforms(spec: PackedSpec) -> tuple:
    """How a span of codes, [128, 64 bytes], lies in shared memory.

    A lane reads along its row: swizzled, so that no two rows meet in a bank, unless
    TMA cannot, where a row of the weight is no multiple of 64 bytes.
    """
    return _swizzled(64, 64) if spec.k % SPAN == 0 and spec.n % 8 == 0 else ()


def _scratch(dtype, spec, config):
    if config.cluster > 1:
        x_empty = plgpu.ClusterBarrier(
            collective_axes=("cluster",), num_arrivals=2, num_barriers=config.stages
        )
    else:
        x_empty = plgpu.Barrier(num_arrivals=2, num_barriers=config.stages)
    return dict(
        x_smem=plgpu.SMEM(
            (config.stages, config.tile_m, STEP), dtype, transforms=_swizzled()
        ),
        w_smem=plgpu.SMEM(
            (WEIGHT_STAGES, 2, SPAN_STEPS, 64, STEP), dtype, transforms=_swizzled()
        ),
        codes_smem=plgpu.SMEM(
            (CODE_STAGES, TILE_FEATURES, SPAN // 2),
            jnp.uint8,
            transforms=_codes_transforms(spec),
        ),
        scales_smem=plgpu.SMEM((CODE_STAGES, 2 * LANES), jnp.float32),
        out_smem=plgpu.SMEM(
            (2, OUT_SLOTS, OUT_ROWS, 64), dtype, transforms=_swizzled()
        ),
        x_full=plgpu.Barrier(num_barriers=config.stages),
        x_empty=x_empty,
        # the copy of the codes, and the scales
        codes_full=plgpu.Barrier(num_arrivals=2, num_barriers=CODE_STAGES),
        codes_empty=plgpu.Barrier(num_arrivals=2, num_barriers=CODE_STAGES),
    )


def _body(layer_gmem, x_gmem, codes_gmem, *refs, direction, spec, config, **s):
    *scales_gmem, out_gmem = refs
    forward = direction == "forward"
    m, contraction = x_gmem.shape
    dtype = jnp.dtype(x_gmem.dtype)
    tile_m = config.tile_m
    spans = pl.cdiv(contraction, SPAN)
    tiles = (
        pl.cdiv(m, tile_m),
        pl.cdiv(out_gmem.shape[1], TILE_FEATURES * config.cluster),
    )
    num_tiles = tiles[0] * tiles[1]
    layer = layer_gmem[0]
    x_smem, w_smem, codes_smem, scales_smem, out_smem = (
        s[f"{name}_smem"] for name in ("x", "w", "codes", "scales", "out")
    )
    wg = lax.axis_index("wg")

    def place(index):
        """First row and first feature of a tile."""
        mi, fi = plgpu.planar_snake(
            index, tiles, 0 if config.raster == "rows" else 1, config.raster_width
        )
        if config.cluster > 1:
            fi = fi * config.cluster + lax.axis_index("cluster")
        return mi * tile_m, fi * TILE_FEATURES

    def slot(count, stages):
        return lax.rem(count, jnp.int32(stages))

    def load():
        plgpu.set_max_registers(LOADER_REGISTERS, action="decrease")
        scales = _Scales(forward, spec, scales_gmem)
        offset = scales.offset(layer)
        first = lax.axis_index("sm")

        def copy_codes(count, f0, i, predicate):
            at = slot(count, CODE_STAGES)
            row, column = (f0, i * SPAN) if forward else (i * SPAN, f0)
            plgpu.copy_gmem_to_smem(
                codes_gmem.at[
                    pl.ds(layer * spec.n + row, TILE_FEATURES),
                    pl.ds(pl.multiple_of(lax.div(column, 2), SPAN // 2), SPAN // 2),
                ],
                codes_smem.at[at],
                s["codes_full"].at[at],
                predicate=predicate,
            )

        def put_scales(count, raw):
            at = slot(count, CODE_STAGES)
            scales.put(raw, offset, scales_smem.at[at])
            plgpu.barrier_arrive(s["codes_full"].at[at])

        def copy_x(count, m0, i):
            at = slot(count, config.stages)
            plgpu.barrier_wait(s["x_empty"].at[at])
            plgpu.copy_gmem_to_smem(
                x_gmem.at[pl.ds(m0, tile_m), pl.ds(i * STEP, STEP)],
                x_smem.at[at],
                s["x_full"].at[at],
                collective_axes="cluster" if config.cluster > 1 else None,
            )

        _, f_first = place(first)
        plgpu.barrier_wait(s["codes_empty"].at[0])
        copy_codes(jnp.int32(0), f_first, jnp.int32(0), first < num_tiles)
        put_scales(jnp.int32(0), scales.load(layer, f_first, jnp.int32(0)))

        @plgpu.nd_loop((num_tiles,), collective_axes="sm")
        def _(info):
            tile = info.index[0]
            m0, f0 = place(tile)
            next_tile = tile + lax.axis_size("sm")
            has_next = next_tile < num_tiles
            _, f_next = place(jnp.minimum(next_tile, num_tiles - 1))

            def span(i, _):
                count = info.local_index * spans + i
                # Codes and scales a span ahead: they are decoded a span ahead.
                last = i + 1 == spans
                f_ahead = jnp.where(last, f_next, f0)
                ahead = jnp.where(last, 0, i + 1)
                plgpu.barrier_wait(s["codes_empty"].at[slot(count + 1, CODE_STAGES)])
                copy_codes(count + 1, f_ahead, ahead, ~last | has_next)
                raw = scales.load(layer, f_ahead, ahead)
                for half in range(SPAN_STEPS):
                    copy_x(count * SPAN_STEPS + half, m0, i * SPAN_STEPS + half)
                put_scales(count + 1, raw)

            lax.fori_loop(0, spans, span, None)

        if config.cluster > 1:
            # A block must not end before its neighbour has released everything.
            for i in range(config.stages):
                plgpu.barrier_wait(s["x_empty"].at[i])

    def consume():
        plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
        for i in range(config.stages):
            plgpu.barrier_arrive(s["x_empty"].at[i])
        for i in range(CODE_STAGES):
            plgpu.barrier_arrive(s["codes_empty"].at[i])

        def decode_span(count):
            at = slot(count, CODE_STAGES)
            plgpu.barrier_wait(s["codes_full"].at[at])
            _decode_span(
                forward,
                spec,
                dtype.name,
                codes_smem.at[at],
                scales_smem.at[at],
                w_smem.at[slot(count, WEIGHT_STAGES), wg],
                wg,
            )
            # Every lane's stores are done and fenced before the next wgmma.
            plgpu.commit_smem()
            plgpu.barrier_arrive(s["codes_empty"].at[at])

        decode_span(jnp.int32(0))

        @plgpu.nd_loop((num_tiles,), collective_axes="sm")
        def _(info):
            m0, f0 = place(info.index[0])
            span0 = info.local_index * spans

            def release(step, predicate=None):
                plgpu.barrier_arrive(
                    s["x_empty"].at[slot(step, config.stages)], predicate=predicate
                )

            @functools.partial(pl.run_scoped, acc=plgpu.ACC((64, tile_m), jnp.float32))
            def _(acc):
                def span(i, _):
                    count = span0 + i
                    for half in range(SPAN_STEPS):
                        step = count * SPAN_STEPS + half
                        at = slot(step, config.stages)
                        plgpu.barrier_wait(s["x_full"].at[at])
                        w = w_smem.at[slot(count, WEIGHT_STAGES), wg, half]
                        plgpu.wgmma(acc, w if forward else w.T, x_smem.at[at].T)
                        # The same half of the span before is done: its x is free,
                        # and after the second half its decoded tile too.
                        plgpu.wgmma_wait(SPAN_STEPS)
                        before = step + (config.stages - 1) * SPAN_STEPS
                        release(before, i > 0)

                    # After the last one of all too: of stale codes, never used.
                    decode_span(count + 1)

                lax.fori_loop(0, spans, span, None)
                plgpu.wgmma_wait(0)
                for half in range(SPAN_STEPS):
                    release((span0 + spans - 1) * SPAN_STEPS + half)
                y = plgpu.layout_cast(
                    acc[...].astype(dtype), plgpu.Layout.WGMMA_TRANSPOSED
                )
                for i in range(tile_m // OUT_ROWS):
                    rows = pl.ds(m0 + i * OUT_ROWS, OUT_ROWS)
                    out = out_smem.at[wg, i % OUT_SLOTS]
                    plgpu.wait_smem_to_gmem(OUT_SLOTS - 1, wait_read_only=True)
                    out.T[...] = y[:, i * OUT_ROWS : (i + 1) * OUT_ROWS]
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(
                        out, out_gmem.at[rows, pl.ds(f0 + wg * 64, 64)]
                    )

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    lax.cond(wg < 2, consume, load)


def _decode_span(forward, spec, dtype, codes_smem, scales_smem, w_smem, wg):
    """Decodes a consumer's part of a span, from shared memory to shared memory.

    A lane has 64 weights of a row, which share a scale. Forward, lane t has row
    t mod 64 of the consumer's 64 features and half t div 64 of the span; backward, row
    t of the span and the columns of the consumer's features.
    """
    codes_transforms = _codes_transforms(spec)

    @plgpu.inline_mgpu(
        arg_types=(
            plgpu.RefType(codes_transforms),
            plgpu.RefType(),
            plgpu.RefType(_swizzled()),
            plgpu.Layout.WG_SPLAT,
        )
    )
    def run(_, codes, scales, w, wg):
        ops = decode.LaneOps(dtype)
        lane, wg = _lane(), _scalar(wg)
        codes, scales, w = map(_shared_address, (codes, scales, w))
        if forward:
            side = _shift(lane, 6)
            row = _add(arith.andi(lane, _c(63)), _multiply(wg, 64))
        else:
            side, row = wg, lane
        scale = _load_shared(
            _add(scales, _multiply(_add(_multiply(side, LANES), row), 4)), "f32"
        )[0]
        # A 64-byte swizzle: bits 1 and 2 of the row on the index of the 16 bytes.
        swizzle = arith.andi(_shift(row, 1), _c(3)) if codes_transforms else _c(0)
        source = _add(codes, _multiply(row, SPAN // 2))
        words = []
        for half in range(2):
            chunk = arith.xori(_add(_multiply(side, 2), half), swizzle)
            words += _load_shared(_add(source, _multiply(chunk, 16)), "v4.b32")
        table = decode.scaled_table(ops, spec.codebook, scale)
        # Both passes: row t of two tiles of 64 rows on end. Its 16-byte chunks are
        # swizzled by three bits of the row: eight lanes fill all banks.
        target = _add(w, _multiply(lane, STEP * 2))
        low = arith.andi(lane, _c(7))
        for chunk, word in enumerate(words):
            _store_shared(
                _add(target, _multiply(arith.xori(low, _c(chunk)), 16)),
                decode.decode_word(ops, word, table),
            )

    run(codes_smem, scales_smem, w_smem, wg)


class _Scales:
    """The loader's work on scales: two a lane and span, to float32.

    Lane t has row t of the 128 rows of codes and its two blocks of 64 columns.
    """

    def __init__(self, forward, spec, gmem):
        self.forward, self.spec, self.gmem = forward, spec, gmem
        self.nested = spec.nested_codebook is not None
        self.row_blocks = spec.k // spec.block_size
        # both in one load
        self.vector = spec.block_size == STEP and self.row_blocks % 2 == 0

    @staticmethod
    def _per_lane(count, dtype):
        layout = plgpu.Layout.WG_STRIDED((LANES * count,), vec_size=count)
        return plgpu.ShapeDtypeStruct((LANES * count,), dtype, layout)

    def offset(self, layer):
        """What was subtracted from the scales, one copy a lane."""
        if not self.nested:
            return None
        out = self._per_lane(1, jnp.float32)

        @plgpu.inline_mgpu(
            arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT), return_type=out
        )
        def read(_, ref, layer):
            return _lanes(_load_global(ref, _scalar(layer), "f32"), out)

        return read(self.gmem[2], layer)

    def load(self, layer, f0, span):
        """Starts the loads of the scales of a span."""
        if self.nested:
            counts = (1, 1) if self.vector else (2, 2)
            types = (jnp.uint32, jnp.float32)
        else:
            counts, types = (2,), (jnp.float32,)
        out = tuple(map(self._per_lane, counts, types))
        refs = tuple(self.gmem[: 1 + self.nested])
        kinds = (("u16",) if self.vector else ("u8",), ("f32",))
        if not self.nested:
            kinds = (("v2.f32",) if self.vector else ("f32",),)

        @plgpu.inline_mgpu(
            arg_types=(
                tuple(plgpu.RefType() for _ in refs),
                *(plgpu.Layout.WG_SPLAT,) * 3,
            ),
            return_type=out,
        )
        def read(_, refs, layer, f0, span):
            places = self._places(*map(_scalar, (layer, f0, span)))
            results = []
            for i, (ref, (kind,), struct) in enumerate(
                zip(refs, kinds, out, strict=True)
            ):
                values = []
                for place in places:
                    values += _load_global(ref, place[i], kind)
                results.append(_lanes(values, struct))
            return tuple(results)

        return read(refs, layer, f0, span)

    def _places(self, layer, f0, span):
        """Index of the scale, and of its nested scale, of each load of a lane."""
        spec, blocks = self.spec, self.row_blocks
        start = _multiply(span, SPAN)
        row, column = (f0, start) if self.forward else (start, f0)
        row = _minimum(_add(row, _lane()), spec.n - 1)
        places = []
        for half in range(1 if self.vector else 2):
            block = _quotient(_add(column, half * STEP), spec.block_size)
            # the last pair of blocks may be a single one
            block = _minimum(block, blocks - (2 if self.vector else 1))
            index = _add(_multiply(row, blocks), block)
            outer = _quotient(index, spec.nested_block_size)
            num_outer = -(-spec.num_blocks // spec.nested_block_size)
            places.append(
                (
                    _add(_multiply(layer, spec.num_blocks), index),
                    _add(_multiply(layer, num_outer), outer),
                )
            )
        return places

    def put(self, raw, offset, scales_smem):
        """Finishes what `load` started and stores [2, 128] scales."""
        inputs = (*raw, offset) if self.nested else raw
        layouts = tuple(
            plgpu.Layout.WG_STRIDED(r.shape, vec_size=r.shape[0] // LANES)
            for r in inputs
        )
        table = (self.gmem[3],) if self.nested else ()

        @plgpu.inline_mgpu(
            arg_types=(
                plgpu.RefType(),
                tuple(plgpu.RefType() for _ in table),
                layouts,
            )
        )
        def compute(_, target, table, inputs):
            values, *rest = map(_registers, inputs)
            if self.nested:
                outer, (offset,) = rest
                if self.vector:
                    values = [arith.andi(values[0], _c(255)), _shift(values[0], 8)]
                    outer = outer * 2
                values = [
                    arith.addf(
                        arith.mulf(_load_global(table[0], v, "f32")[0], a), offset
                    )
                    for v, a in zip(values, outer, strict=True)
                ]
            address = _add(_shared_address(target), _multiply(_lane(), 4))
            for half, value in enumerate(values):
                _store_shared(_add(address, half * LANES * 4), [value], "f32")

        compute(scales_smem, table, inputs)


# What follows is arithmetic of one lane on MLIR values.


def _i32():
    return ir.IntegerType.get_signless(32)


def _c(x: int):
    return mgpu_utils.c(x, _i32())


def _as_value(x):
    return _c(x) if isinstance(x, int) else x


def _add(a, b):
    return arith.addi(a, _as_value(b))


def _multiply(a, b: int):
    return arith.muli(a, _c(b))


def _quotient(a, b: int):
    return arith.divui(a, _c(b))


def _minimum(a, b: int):
    return arith.minui(a, _c(b))


def _shift(a, bits: int):
    return arith.shrui(a, _c(bits))


def _lane():
    return arith.andi(mgpu_utils.thread_idx(), _c(LANES - 1))


def _scalar(array: mgpu.FragmentedArray):
    return array.registers.item()


def _registers(array: mgpu.FragmentedArray) -> list:
    """The values a lane holds of an array strided over the warpgroup."""
    (vector,) = array.registers.flat
    count = ir.VectorType(vector.type).shape[0]
    return [llvm.extractelement(vector, mgpu_utils.c(i, _i32())) for i in range(count)]


def _lanes(values, struct: plgpu.ShapeDtypeStruct) -> mgpu.FragmentedArray:
    """The inverse of `_registers`."""
    element = mgpu_utils.dtype_to_ir_type(struct.dtype)
    vector = llvm.mlir_undef(ir.VectorType.get((len(values),), element))
    for i, value in enumerate(values):
        vector = llvm.insertelement(vector, value, mgpu_utils.c(i, _i32()))
    return mgpu.FragmentedArray(
        _registers=np.array([vector], dtype=object),
        _layout=struct.layout.to_mgpu(),
        _is_signed=mgpu_utils.is_signed(struct.dtype),
    )


def _load_global(ref, index, kind: str) -> list:
    """Loads from global memory, at an index counted in elements of `ref`."""
    i64 = ir.IntegerType.get_signless(64)
    size = mgpu_utils.bitwidth(ir.MemRefType(ref.type).element_type) // 8
    base = llvm.ptrtoint(i64, mgpu_utils.memref_ptr(ref))
    offset = arith.muli(arith.extui(i64, index), mgpu_utils.c(size, i64))
    address = arith.addi(base, offset)
    return _load("global.nc", address, "l", kind)


def _shared_address(ref):
    return llvm.ptrtoint(_i32(), mgpu_utils.memref_ptr(ref))


def _load_shared(address, kind: str) -> list:
    """Loads from shared memory, of 32-bit registers."""
    return _load("shared", address, "r", kind)


def _store_shared(address, values, kind: str = "v4.b32") -> None:
    """Stores 32-bit registers to shared memory."""
    names = [f"${i + 1}" for i in range(len(values))]
    names = f"{{{', '.join(names)}}}" if len(values) > 1 else names[0]
    letter = "f" if kind.endswith("f32") else "r"
    llvm.inline_asm(
        ir.Type.parse("!llvm.void"),
        [address, *values],
        f"st.shared.{kind} [$0], {names};",
        ",".join(["r"] + [letter] * len(values)),
        has_side_effects=True,
    )


def _load(space: str, address, address_letter: str, kind: str) -> list:
    is_float = kind.endswith("f32")
    element = ir.F32Type.get() if is_float else _i32()
    count = int(kind[1]) if kind.startswith("v") else 1
    names = ", ".join(f"${i}" for i in range(count))
    result = llvm.inline_asm(
        ir.Type.parse(f"!llvm.struct<({', '.join([str(element)] * count)})>")
        if count > 1
        else element,
        [address],
        f"ld.{space}.{kind} {f'{{{names}}}' if count > 1 else names}, [${count}];",
        ",".join(["=f" if is_float else "=r"] * count + [address_letter]),
        has_side_effects=True,
    )
    if count == 1:
        return [result]
    return [llvm.extractvalue(element, result, [i]) for i in range(count)]

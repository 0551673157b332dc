"""The Hopper kernel: loader and consumers; `matmul_sm90` tells the design."""

# What `inline_mgpu` returns and the transforms are, Pallas does not say in types.
# pyright: reportCallIssue=false, reportAbstractUsage=false
# pyright: reportPrivateImportUsage=false

import functools

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels import matmul_sm90_lanes as lanes
from pallas_kernels.matmul_sm90_lanes import (
    LANES,
    SPAN,
    SPAN_BYTES,
    SPAN_STEPS,
    STEP,
    STEP_WORDS,
    TABLE_BYTES,
    TABLE_ROW,
)
from pallas_kernels.packed import PackedSpec

# Features of a block; a warpgroup of consumers has half of them.
TILE_FEATURES = 128
# Spans of codes and scales in shared memory: one read, one on its way.
CODE_STAGES = 2
# Results leave in tiles of so many rows, through two of them a consumer.
OUT_ROWS = 32
OUT_SLOTS = 2
# A lane of each of the three warpgroups brings 168.
LOADER_REGISTERS = 56
CONSUMER_REGISTERS = 224


def _swizzled(items: int = STEP, row_bytes: int = 128) -> tuple:
    return (plgpu.TilingTransform((8, items)), plgpu.SwizzleTransform(row_bytes))


def _codes_transforms(spec: PackedSpec) -> tuple:
    """How a span of codes, [128, 64 bytes], lies in shared memory.

    A lane reads along its row: swizzled, so that no two rows meet in a bank, unless
    TMA cannot, where a row of the weight is no multiple of 64 bytes.
    """
    return _swizzled(64, 64) if spec.k % SPAN == 0 and spec.n % 8 == 0 else ()


def scratch(dtype, spec, config) -> dict:
    """Shared memory and barriers of a block."""
    if config.cluster > 1:
        x_empty = plgpu.ClusterBarrier(
            collective_axes=("cluster",), num_arrivals=2, num_barriers=config.stages
        )
    else:
        x_empty = plgpu.Barrier(num_arrivals=2, num_barriers=config.stages)
    table = {}
    if config.permuted < STEP_WORDS:
        table = dict(
            table_smem=plgpu.SMEM((TABLE_BYTES // 4,), jnp.uint32),
            # each consumer writes half of it
            table_full=plgpu.Barrier(num_arrivals=2),
        )
    return table | dict(
        x_smem=plgpu.SMEM(
            (config.stages, config.tile_m, STEP), dtype, transforms=_swizzled()
        ),
        codes_smem=plgpu.SMEM(
            (CODE_STAGES, TILE_FEATURES, SPAN_BYTES),
            jnp.uint8,
            transforms=_codes_transforms(spec),
        ),
        # pairs of 16-bit scales: see `_Scales.put`
        scales_smem=plgpu.SMEM((CODE_STAGES, 2 * LANES), jnp.uint32),
        out_smem=plgpu.SMEM(
            (2, OUT_SLOTS, OUT_ROWS, 64), dtype, transforms=_swizzled()
        ),
        x_full=plgpu.Barrier(num_barriers=config.stages),
        x_empty=x_empty,
        # the copy of the codes, and the scales
        codes_full=plgpu.Barrier(num_arrivals=2, num_barriers=CODE_STAGES),
        codes_empty=plgpu.Barrier(num_arrivals=2, num_barriers=CODE_STAGES),
    )


def body(layer_gmem, pairs_gmem, x_gmem, codes_gmem, *refs, forward, spec, config, **s):
    """What a block does; all refs but `s`, the scratch, are in device memory."""
    *scales_gmem, out_gmem = refs
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
    x_smem, codes_smem, scales_smem, out_smem = (
        s[f"{name}_smem"] for name in ("x", "codes", "scales", "out")
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
        scales = _Scales(forward, spec, dtype.name, scales_gmem)
        offset = scales.offset(layer)
        first = lax.axis_index("sm")

        def copy_codes(count, f0, i, predicate):
            at = slot(count, CODE_STAGES)
            row, column = (f0, i * SPAN) if forward else (i * SPAN, f0)
            plgpu.copy_gmem_to_smem(
                codes_gmem.at[
                    pl.ds(layer * spec.n + row, TILE_FEATURES),
                    pl.ds(pl.multiple_of(lax.div(column, 2), SPAN_BYTES), SPAN_BYTES),
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
        decoders = [lanes.Permute(spec.codebook, dtype.name)] * config.permuted
        decoders += [lanes.Table()] * (STEP_WORDS - config.permuted)
        table = ()
        if config.permuted < STEP_WORDS:
            table = (s["table_smem"],)
            _write_table(pairs_gmem, *table, wg)
            plgpu.barrier_arrive(s["table_full"])
            plgpu.barrier_wait(s["table_full"])

        def decode_step(count, half):
            at = slot(count, CODE_STAGES)
            if half == 0:
                plgpu.barrier_wait(s["codes_full"].at[at])
            refs = codes_smem.at[at], scales_smem.at[at], *table
            w = _decode_step(forward, spec, dtype, decoders, half, refs, wg)
            if half == 1:
                plgpu.barrier_arrive(s["codes_empty"].at[at])
            return w

        def release(step, predicate=None):
            at = slot(step + config.stages, config.stages)
            plgpu.barrier_arrive(s["x_empty"].at[at], predicate=predicate)

        @plgpu.nd_loop(
            (num_tiles,),
            collective_axes="sm",
            init_carry=decode_step(jnp.int32(0), 0),
        )
        def _(info, carry):
            m0, f0 = place(info.index[0])
            span0 = info.local_index * spans

            @functools.partial(pl.run_scoped, acc=plgpu.ACC((64, tile_m), jnp.float32))
            def w_last(acc):
                def multiply(w, step):
                    at = slot(step, config.stages)
                    plgpu.barrier_wait(s["x_full"].at[at])
                    plgpu.wgmma(acc, w, x_smem.at[at].T)
                    # The step before is done: its x is free, and its weights.
                    plgpu.wgmma_wait(1)

                def span(i, w):
                    count = span0 + i
                    step = count * SPAN_STEPS
                    multiply(w, step)
                    release(step - 1, i > 0)
                    w = decode_step(count, 1)
                    multiply(w, step + 1)
                    release(step)
                    # After the last one of all too: of stale codes, never used.
                    return decode_step(count + 1, 0)

                w = lax.fori_loop(0, spans, span, carry)
                plgpu.wgmma_wait(0)
                release((span0 + spans) * SPAN_STEPS - 1)
                y = acc[...]
                for i in range(tile_m // OUT_ROWS):
                    rows = pl.ds(m0 + i * OUT_ROWS, OUT_ROWS)
                    out = out_smem.at[wg, i % OUT_SLOTS]
                    plgpu.wait_smem_to_gmem(OUT_SLOTS - 1, wait_read_only=True)
                    _store_rows(dtype, y, i * OUT_ROWS, out)
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(
                        out, out_gmem.at[rows, pl.ds(f0 + wg * 64, 64)]
                    )
                return w

            return w_last

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    lax.cond(wg < 2, consume, load)


def _write_table(pairs_gmem, table_smem, wg):
    """Copies the pairs to shared memory, 32 times; a lane does one of them."""

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), plgpu.RefType(), plgpu.Layout.WG_SPLAT)
    )
    def run(_, pairs, table, wg):
        byte = lanes.scalar(wg) * LANES + lanes.lane_index()
        (pair,) = lanes.load("global.nc.b32", lanes.global_address(pairs, byte))
        row = lanes.address(table) + byte * TABLE_ROW
        for i in range(8):
            # eight lanes write eight different groups of banks
            lanes.store("v4.b32", row + ((byte + i) & 7) * 16, [pair] * 4)

    run(pairs_gmem, table_smem, wg)


def _decode_step(forward, spec, dtype, decoders, half, refs, wg):
    """A consumer's first operand of wgmma, for step `half` of a span.

    Returns:
        [64, 64] of `dtype`, features (`lanes.feature` of the row) by contraction.
    """
    transforms = _codes_transforms(spec)
    step = lanes.forward_step if forward else lanes.backward_step

    @plgpu.inline_mgpu(
        arg_types=(
            plgpu.RefType(transforms),
            *(plgpu.RefType() for _ in refs[1:]),
            plgpu.Layout.WG_SPLAT,
        ),
        return_type=plgpu.ShapeDtypeStruct((64, STEP), dtype, plgpu.Layout.WGMMA),
    )
    def run(_, *args):
        *memory, wg = args
        ops = lanes.LaneOps(dtype.name, *memory)
        layout = plgpu.Layout.WGMMA.to_mgpu()
        pair_type = ir.VectorType.get((2,), mgpu_utils.dtype_to_ir_type(dtype))
        out = np.empty(layout.registers_shape((64, STEP)), dtype=object)
        by_column = out.reshape(STEP // 8, 2)
        operand = step(
            ops, decoders, half, lanes.lane_index(), lanes.scalar(wg), bool(transforms)
        )
        for row, column, pair in operand:
            by_column[column, row] = mgpu_utils.bitcast(pair.value, pair_type)
        return mgpu.FragmentedArray(_registers=out, _layout=layout, _is_signed=None)

    return run(*refs, wg)


def _store_rows(dtype, y, first, out_smem):
    """Writes 32 columns of yᵀ, from `first` on, as rows of 64 features."""

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.RefType(_swizzled())))
    def run(_, y, out):
        ops = lanes.LaneOps(dtype.name)
        lane = lanes.lane_index()
        feature = lanes.feature(lane)
        base = lanes.address(out) + (feature & 7) * 2
        values = y.registers.reshape(-1, 2)
        for block in range(OUT_ROWS // 8):
            both = values[first // 8 + block]
            for e in range(2):
                row = (lane & 3) * 2 + (8 * block + e)
                at = mgpu_utils.c(e, ir.IntegerType.get_signless(32))
                pair = ops.round_pair(*(llvm.extractelement(r, at) for r in both))
                place = (feature >> 3) ^ (row & 7)
                lanes.store("b32", base + row * 128 + place * 16, [pair])

    run(y, out_smem)


class _Scales:
    """The loader's work on scales: two a lane and span, decoded and rounded.

    Lane t has row t of the 128 rows of codes and its two blocks of 64 columns.
    """

    def __init__(self, forward, spec, dtype, gmem):
        self.forward, self.spec, self.dtype, self.gmem = forward, spec, dtype, gmem
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
            where = lanes.global_address(ref, lanes.scalar(layer))
            return lanes.from_registers(lanes.load("global.nc.f32", where), out)

        return read(self.gmem[2], layer)

    def load(self, layer, f0, span):
        """Starts the loads of the scales of a span."""
        if self.nested:
            kinds = ("u16" if self.vector else "u8", "f32")
            counts = (1, 1) if self.vector else (2, 2)
            types = (jnp.uint32, jnp.float32)
        else:
            kinds, counts = ("v2.f32" if self.vector else "f32",), (2,)
            types = (jnp.float32,)
        out = tuple(map(self._per_lane, counts, types))
        refs = tuple(self.gmem[: 1 + self.nested])

        @plgpu.inline_mgpu(
            arg_types=(
                tuple(plgpu.RefType() for _ in refs),
                *(plgpu.Layout.WG_SPLAT,) * 3,
            ),
            return_type=out,
        )
        def read(_, refs, layer, f0, span):
            places = self._places(*map(lanes.scalar, (layer, f0, span)))
            results = []
            for i, (ref, kind, struct) in enumerate(zip(refs, kinds, out, strict=True)):
                values = []
                for place in places:
                    where = lanes.global_address(ref, place[i])
                    values += lanes.load(f"global.nc.{kind}", where)
                results.append(lanes.from_registers(values, struct))
            return tuple(results)

        return read(refs, layer, f0, span)

    def _places(self, layer, f0, span):
        """Index of the scale, and of its nested scale, of each load of a lane."""
        spec, blocks = self.spec, self.row_blocks
        row, column = (f0, span * SPAN) if self.forward else (span * SPAN, f0)
        row = (row + lanes.lane_index()).minimum(spec.n - 1)
        num_outer = -(-spec.num_blocks // spec.nested_block_size)
        places = []
        for half in range(1 if self.vector else 2):
            block = (column + half * STEP) // spec.block_size
            # beyond the last block: any scale will do, x or the result ends there
            block = block.minimum(blocks - (2 if self.vector else 1))
            index = row * blocks + block
            outer = index // spec.nested_block_size
            places.append((layer * spec.num_blocks + index, layer * num_outer + outer))
        return places

    def put(self, raw, offset, scales_smem):
        """Finishes what `load` started and stores it for the consumers."""
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
            values, *rest = map(lanes.registers, inputs)
            if self.nested:
                outer, (offset,) = rest
                if self.vector:
                    values = [values[0] & 255, values[0] >> 8]
                    outer = outer * 2
                values = [
                    arith.addf(arith.mulf(number, by), offset)
                    for code, by in zip(values, outer, strict=True)
                    for number in lanes.load(
                        "global.nc.f32", lanes.global_address(table[0], code)
                    )
                ]
            ops = lanes.LaneOps(self.dtype)
            target = lanes.address(target)
            offsets = lanes.scale_addresses(self.forward, lanes.lane_index())
            kind = "b32" if self.forward else "b16"
            for value, at in zip(values, offsets, strict=True):
                lanes.store(kind, target + at, [ops.round_pair(value, value)])

        compute(scales_smem, table, inputs)

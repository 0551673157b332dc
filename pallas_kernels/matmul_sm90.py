"""Matmuls with a 4-bit weight on Hopper GPUs, for many rows of x.

    matmul      y[m, n]  = x[m, k]  @ W[n, k]ᵀ
    matmul_dx   dx[m, k] = dy[m, n] @ W[n, k]

Both read the codes as they are stored and decode them into shared memory, never into
device memory. A block of four warpgroups computes 128 features of `tile_m` rows, 64
numbers of the contraction a step:

    loader     one warp copies tiles of x (or dy), one tiles of codes, by TMA
    decoder    codes -> 16-bit numbers, scaled, in a 128-byte swizzled tile of shared
               memory, one block of 64 weights a lane (see `decode.py`)
    consumers  two warpgroups, each 64 features: wgmma, the decoded tile its first
               operand, x transposed its second, so that what it accumulates is a tile
               of yᵀ; written out transposed

A step's decoded tile is [128, 64] numbers of W in the forward pass and [64, 128] in the
backward pass, always with k running fastest as the codes do; the backward pass lets
wgmma read it transposed. Nothing else differs between the two.
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
# Contraction of a step: 64 16-bit numbers are the 128 bytes of a swizzled row.
STEP = 64
# Codes are copied, and scales loaded, for this many steps at a time.
GROUP = 4
# Bytes of codes of a group, either pass: 128 features x 256 / 2.
GROUP_BYTES = TILE_FEATURES * STEP * GROUP // 2
# Groups of codes in shared memory: one read, one on its way.
CODE_STAGES = 2
# Shared memory of a block on Hopper, less a little for barriers.
SHARED_BYTES = 227 * 1024 - 512
LANES = 128

Pass = Literal["forward", "backward"]


@dataclasses.dataclass(frozen=True)
class Config:
    """How the output is cut and how deep the pipeline is.

    Attributes:
        tile_m: rows of x of a block.
        stages: tiles of x in shared memory.
        weight_stages: decoded tiles in shared memory.
        out_slots: tiles of 64 rows, of each consumer, in which results wait to be
            written.
        cluster: 2 lets pairs of blocks, neighbours in features, share tiles of x.
        raster: which of rows and features varies faster from block to block.
        raster_width: how many tiles of the faster one before the slower one moves.
        decoder_registers: of the 504 a lane of each of the three warpgroups brings.
    """

    tile_m: int = 256
    stages: int = 4
    weight_stages: int = 3
    out_slots: int = 1
    cluster: int = 1
    raster: Literal["rows", "features"] = "rows"
    raster_width: int = 8
    decoder_registers: int = 88

    def __post_init__(self):
        if self.tile_m not in (64, 128, 192, 256):
            raise ValueError(f"{self.tile_m=} must be 64, 128, 192 or 256.")
        if self.cluster not in (1, 2):
            raise ValueError(f"{self.cluster=} must be 1 or 2.")
        if not 2 <= self.weight_stages <= self.stages <= self.weight_stages + GROUP:
            raise ValueError(
                f"{self.weight_stages=} must be at least 2, and {self.stages=} equal to "
                f"it or up to {GROUP} more."
            )
        if self.out_slots not in (1, 2):
            raise ValueError(f"{self.out_slots=} must be 1 or 2.")
        if self.shared_bytes > SHARED_BYTES:
            raise ValueError(
                f"{self} takes {self.shared_bytes} bytes of shared memory, a block has "
                f"{SHARED_BYTES}: use fewer stages."
            )

    @property
    def consumer_registers(self) -> int:
        """Registers of a lane of the consumers."""
        return (504 - self.decoder_registers) // 2

    @property
    def shared_bytes(self) -> int:
        """Bytes of shared memory, barriers not counted."""
        return (
            self.stages * self.tile_m * STEP * 2
            + self.weight_stages * TILE_FEATURES * STEP * 2
            + CODE_STAGES * GROUP_BYTES
            + 2 * self.out_slots * 64 * 64 * 2
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
        return Config(tile_m=64, stages=6, weight_stages=4)
    if m <= 128:
        return Config(tile_m=128, stages=5, weight_stages=4)
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
        functools.partial(
            _body, direction=direction, spec=spec, config=config, layers=layers
        ),
        out_type=jax.ShapeDtypeStruct(out_shape, x.dtype),
        scratch_types=_scratch(direction, x.dtype, spec, config),
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


def _swizzled(bytes_per_item: int = 2) -> tuple:
    return (
        plgpu.TilingTransform((8, 128 // bytes_per_item)),
        plgpu.SwizzleTransform(128),
    )


def _codes_transforms(direction: Pass, spec: PackedSpec) -> tuple:
    """How a group of codes lies in shared memory.

    Forward it is [128, 128 bytes], and a lane reads along its row: swizzled, so that
    no two rows meet in a bank. TMA cannot where a row is no multiple of 128 bytes.
    """
    can = spec.k % (GROUP * STEP) == 0 and spec.n % 8 == 0
    return _swizzled(1) if direction == "forward" and can else ()


def _scratch(direction, dtype, spec, config):
    rows = (TILE_FEATURES, 2 * STEP) if direction == "forward" else (GROUP * STEP, 64)
    empty = functools.partial(
        plgpu.Barrier
        if config.cluster == 1
        else functools.partial(plgpu.ClusterBarrier, collective_axes=("cluster",)),
        num_arrivals=2,
        num_barriers=config.weight_stages,
    )
    return dict(
        x_smem=plgpu.SMEM(
            (config.stages, config.tile_m, STEP), dtype, transforms=_swizzled()
        ),
        # forward: half h of the features, [64 of n, 64 of k]; backward: the same
        # shape, the half of the columns
        w_smem=plgpu.SMEM(
            (config.weight_stages, 2, 64, STEP), dtype, transforms=_swizzled()
        ),
        codes_smem=plgpu.SMEM(
            (CODE_STAGES, *rows),
            jnp.uint8,
            transforms=_codes_transforms(direction, spec),
        ),
        out_smem=plgpu.SMEM(
            (2, config.out_slots, 64, 64), dtype, transforms=_swizzled()
        ),
        x_full=plgpu.Barrier(num_barriers=config.stages),
        w_full=plgpu.Barrier(num_barriers=config.weight_stages),
        codes_full=plgpu.Barrier(num_barriers=CODE_STAGES),
        # a step's tiles, x and decoded, are consumed
        empty=empty(),
    )


def _body(layer_gmem, x_gmem, codes_gmem, *refs, direction, spec, config, layers, **s):
    *scales_gmem, out_gmem = refs
    del layers
    forward = direction == "forward"
    m, contraction = x_gmem.shape
    features = out_gmem.shape[1]
    dtype = jnp.dtype(x_gmem.dtype)
    tile_m = config.tile_m
    groups = pl.cdiv(contraction, STEP * GROUP)
    steps = groups * GROUP
    tiles = (
        pl.cdiv(m, tile_m),
        pl.cdiv(features, TILE_FEATURES * config.cluster),
    )
    num_tiles = tiles[0] * tiles[1]
    # How many steps tiles of x are asked for ahead of the decoder, which itself is up
    # to `weight_stages` ahead of the consumers.
    lead = config.stages - config.weight_stages
    row0 = layer_gmem[0] * spec.n
    x_smem, w_smem, codes_smem, out_smem = (
        s[name] for name in ("x_smem", "w_smem", "codes_smem", "out_smem")
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

    def for_each_tile(body):
        """Runs `body(index of the tile, groups done before)` for each tile."""

        @plgpu.nd_loop((num_tiles,), collective_axes="sm")
        def _(info):
            body(info.index[0], info.local_index * groups)

    def slot(count, stages):
        return lax.rem(count, jnp.int32(stages))

    def copy_x(count, m0, i, predicate):
        at = slot(count, config.stages)
        plgpu.copy_gmem_to_smem(
            x_gmem.at[pl.ds(m0, tile_m), pl.ds(i * STEP, STEP)],
            x_smem.at[at],
            s["x_full"].at[at],
            collective_axes="cluster" if config.cluster > 1 else None,
            predicate=predicate,
        )

    def copy_codes(count, f0, i, predicate):
        at = slot(count, CODE_STAGES)
        if forward:
            rows = pl.ds(row0 + f0, TILE_FEATURES)
            columns = pl.ds(i * (GROUP * STEP // 2), GROUP * STEP // 2)
        else:
            rows = pl.ds(row0 + i * (GROUP * STEP), GROUP * STEP)
            columns = pl.ds(lax.div(f0, jnp.int32(2)), 64)
        plgpu.copy_gmem_to_smem(
            codes_gmem.at[rows, columns],
            codes_smem.at[at],
            s["codes_full"].at[at],
            predicate=predicate,
        )

    def produce():
        plgpu.set_max_registers(config.decoder_registers, action="decrease")
        decoder = _Decoder(forward, spec, dtype.name, scales_gmem)
        offset = decoder.offset(layer_gmem[0])
        first = lax.axis_index("sm")
        m_first, f_first = place(first)
        has_work = first < num_tiles
        for i in range(lead):
            copy_x(jnp.int32(i), m_first, jnp.int32(i), has_work)
        copy_codes(jnp.int32(0), f_first, jnp.int32(0), has_work)

        @for_each_tile
        def _(tile, group0):
            next_tile = tile + lax.axis_size("sm")
            has_next = next_tile < num_tiles
            m0, f0 = place(tile)
            m_next, f_next = place(jnp.minimum(next_tile, num_tiles - 1))

            def group(i, scales):
                codes_at = slot(group0 + i, CODE_STAGES)
                last = i + 1 == groups
                # Every lane is done with the codes of the group before.
                plgpu.commit_smem()
                copy_codes(
                    group0 + i + 1,
                    jnp.where(last, f_next, f0),
                    jnp.where(last, 0, i + 1),
                    ~last | has_next,
                )
                # The scales of the next group come while this one is decoded.
                raw = decoder.load(layer_gmem[0], f0, jnp.minimum(i + 1, groups - 1))
                plgpu.barrier_wait(s["codes_full"].at[codes_at])
                for g in range(GROUP):
                    step = i * GROUP + g
                    count = group0 * GROUP + step
                    at = slot(count, config.weight_stages)
                    plgpu.barrier_wait(s["empty"].at[at])
                    # This step's release freed the tile of x `stages` steps after
                    # the one released.
                    ahead = step + lead
                    wrap = ahead >= steps
                    copy_x(
                        count + lead,
                        jnp.where(wrap, m_next, m0),
                        jnp.where(wrap, ahead - steps, ahead),
                        ~wrap | has_next,
                    )
                    decoder.decode(g, codes_smem.at[codes_at], w_smem.at[at], scales)
                    plgpu.barrier_arrive(s["w_full"].at[at])
                return decoder.finish(raw, offset)

            start = decoder.finish(
                decoder.load(layer_gmem[0], f0, jnp.int32(0)), offset
            )
            lax.fori_loop(0, groups, group, start)

        # A block must not end before its neighbour has released everything.
        for i in range(config.weight_stages):
            plgpu.barrier_wait(s["empty"].at[i])

    def consume():
        plgpu.set_max_registers(config.consumer_registers, action="increase")
        for i in range(config.weight_stages):
            plgpu.barrier_arrive(s["empty"].at[i])

        @for_each_tile
        def _(tile, group0):
            m0, f0 = place(tile)
            step0 = group0 * GROUP

            def release(count, predicate=None):
                at = slot(count, config.weight_stages)
                plgpu.barrier_arrive(s["empty"].at[at], predicate=predicate)

            @functools.partial(pl.run_scoped, acc=plgpu.ACC((64, tile_m), jnp.float32))
            def _(acc):
                def step(i, _):
                    count = step0 + i
                    x_at = slot(count, config.stages)
                    w_at = slot(count, config.weight_stages)
                    plgpu.barrier_wait(s["x_full"].at[x_at])
                    plgpu.barrier_wait(s["w_full"].at[w_at])
                    w = w_smem.at[w_at, wg]
                    plgpu.wgmma(acc, w if forward else w.T, x_smem.at[x_at].T)
                    plgpu.wgmma_wait(1)
                    release(count + (config.weight_stages - 1), i > 0)

                lax.fori_loop(0, steps, step, None)
                plgpu.wgmma_wait(0)
                release(step0 + (steps - 1))
                y = plgpu.layout_cast(
                    acc[...].astype(dtype), plgpu.Layout.WGMMA_TRANSPOSED
                )
                for i in range(tile_m // 64):
                    at = i % config.out_slots
                    plgpu.wait_smem_to_gmem(config.out_slots - 1, wait_read_only=True)
                    out_smem.at[wg, at].T[...] = y[:, i * 64 : (i + 1) * 64]
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(
                        out_smem.at[wg, at],
                        out_gmem.at[pl.ds(m0 + i * 64, 64), pl.ds(f0 + wg * 64, 64)],
                    )

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    lax.cond(wg < 2, consume, produce)


class _Decoder:
    """The code of the decoder warpgroup: a lane decodes a block of 64 weights a step.

    Forward: lane t has row t of the 128. Backward: lanes 2 r and 2 r + 1 have row r of
    the 64, first and second half of its 128 columns.
    """

    def __init__(self, forward, spec, dtype, scales_gmem):
        self.forward, self.spec, self.dtype = forward, spec, dtype
        self.codes_transforms = _codes_transforms(
            "forward" if forward else "backward", spec
        )
        self.scales_gmem = scales_gmem
        self.nested = spec.nested_codebook is not None
        self.row_blocks = spec.k // spec.block_size
        # GROUP consecutive scales of a row in one load
        self.vector = (
            forward and spec.block_size == STEP and self.row_blocks % GROUP == 0
        )

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
            value = _load_global(ref, _scalar(layer), "f32")[0]
            return _lanes([value], out)

        return read(self.scales_gmem[1 + 1], layer)

    def load(self, layer, f0, group):
        """Starts the loads of the scales of a group."""
        if self.nested:
            counts = (1, 1) if self.vector else (GROUP, GROUP)
            types = (jnp.uint32, jnp.float32)
        else:
            counts, types = (GROUP,), (jnp.float32,)
        out = tuple(map(self._per_lane, counts, types))
        refs = self.scales_gmem[: 1 + self.nested]

        @plgpu.inline_mgpu(
            arg_types=(
                tuple(plgpu.RefType() for _ in refs),
                *(plgpu.Layout.WG_SPLAT,) * 3,
            ),
            return_type=out,
        )
        def read(_, refs, layer, f0, group):
            layer, f0, group = map(_scalar, (layer, f0, group))
            loads = self._addresses(layer, f0, group)
            if not self.nested:
                if self.vector:
                    return (_lanes(_load_global(refs[0], loads[0][0], "v4.f32"), out[0]),)
                values = [_load_global(refs[0], q, "f32")[0] for q, _ in loads]
                return (_lanes(values, out[0]),)
            kind = "u32" if self.vector else "u8"
            codes = [_load_global(refs[0], q, kind)[0] for q, _ in loads]
            outer = [_load_global(refs[1], a, "f32")[0] for _, a in loads]
            return _lanes(codes, out[0]), _lanes(outer, out[1])

        return read(tuple(refs), layer, f0, group)

    def _addresses(self, layer, f0, group):
        """Index of the scale, and of its nested scale, of each load of a lane."""
        spec, blocks = self.spec, self.row_blocks
        lane = _lane()
        if self.forward:
            row = _minimum(_add(f0, lane), spec.n - 1)
            places = [
                (row, _add(_multiply(group, GROUP * STEP), g * STEP))
                for g in range(1 if self.vector else GROUP)
            ]
            places = [
                (row, _minimum(_quotient(k, spec.block_size), blocks - 1))
                for row, k in places
            ]
        else:
            half = arith.andi(lane, _c(1))
            k = _add(f0, _multiply(half, STEP))
            block = _minimum(_quotient(k, spec.block_size), blocks - 1)
            rows = [
                _add(_add(_multiply(group, GROUP * STEP), g * STEP), _shift(lane, 1))
                for g in range(GROUP)
            ]
            places = [(_minimum(row, spec.n - 1), block) for row in rows]
        out = []
        for row, block in places:
            index = _add(_multiply(row, blocks), block)
            nested = _quotient(index, spec.nested_block_size)
            num_nested = -(-spec.num_blocks // spec.nested_block_size)
            out.append(
                (
                    _add(_multiply(layer, spec.num_blocks), index),
                    _add(_multiply(layer, num_nested), nested),
                )
            )
        return out

    def finish(self, raw, offset):
        """Scales in float32 from what `load` has brought, GROUP a lane."""
        if not self.nested:
            return raw[0]
        out = self._per_lane(GROUP, jnp.float32)
        layouts = tuple(
            plgpu.Layout.WG_STRIDED(r.shape, vec_size=r.shape[0] // LANES)
            for r in (*raw, offset)
        )

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), *layouts), return_type=out)
        def compute(_, table, codes, outer, offset):
            codes, outer, (offset,) = map(_registers, (codes, outer, offset))
            if self.vector:
                codes = [
                    arith.andi(_shift(codes[0], 8 * g), _c(255)) for g in range(GROUP)
                ]
                outer = outer * GROUP
            values = [_load_global(table, code, "f32")[0] for code in codes]
            scales = [
                arith.addf(arith.mulf(v, a), offset)
                for v, a in zip(values, outer, strict=True)
            ]
            return _lanes(scales, out)

        return compute(self.scales_gmem[3], *raw, offset)

    def decode(self, g, codes_smem, w_smem, scales):
        """Decodes step `g` of a group, from shared memory to shared memory."""
        codes_type = plgpu.RefType(self.codes_transforms)
        layout = plgpu.Layout.WG_STRIDED(scales.shape, vec_size=GROUP)

        @plgpu.inline_mgpu(
            arg_types=(codes_type, plgpu.RefType(_swizzled()), layout)
        )
        def run(_, codes, w, scales):
            ops = decode.LaneOps(self.dtype)
            lane = _lane()
            codes, w = _shared_address(codes), _shared_address(w)
            if self.forward:
                row, low3 = lane, arith.andi(lane, _c(7))
                source = _add(codes, _multiply(lane, 128))
                swizzle = low3 if self.codes_transforms else _c(0)
                sources = [
                    _add(source, _multiply(arith.xori(swizzle, _c(2 * g + h)), 16))
                    for h in range(2)
                ]
                first = _c(0)
            else:
                row, odd = _shift(lane, 1), arith.andi(lane, _c(1))
                low3 = arith.andi(row, _c(7))
                # Odd lanes start with their second half: no two of eight lanes meet
                # in a bank.
                source = _add(codes, _multiply(lane, 32))
                source = _add(source, g * STEP * 64)
                sources = [
                    _add(source, _multiply(arith.xori(odd, _c(h)), 16))
                    for h in range(2)
                ]
                first = _multiply(odd, 4)
                w = _add(w, _multiply(odd, 64 * 128))
            target = _add(w, _multiply(row, 128))
            table = decode.scaled_table(
                ops, self.spec.codebook, _registers(scales)[g]
            )
            words = [word for a in sources for word in _load_shared(a)]
            for chunk, word in enumerate(words):
                place = arith.xori(arith.xori(low3, first), _c(chunk))
                _store_shared(
                    _add(target, _multiply(place, 16)),
                    decode.decode_word(ops, word, table),
                )
            # What follows reads the tile through the asynchronous proxy.
            llvm.inline_asm(
                ir.Type.parse("!llvm.void"),
                [],
                "fence.proxy.async.shared::cta;",
                "",
                has_side_effects=True,
            )

        run(codes_smem, w_smem, scales)


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
    return [
        llvm.extractelement(vector, mgpu_utils.c(i, _i32())) for i in range(count)
    ]


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
    is_float = kind.endswith("f32")
    element = ir.F32Type.get() if is_float else _i32()
    count = 4 if kind.startswith("v4") else 1
    letter = "=f" if is_float else "=r"
    names = ", ".join(f"${i}" for i in range(count))
    names = f"{{{names}}}" if count > 1 else names
    result = llvm.inline_asm(
        ir.Type.parse(f"!llvm.struct<({', '.join([str(element)] * count)})>")
        if count > 1
        else element,
        [address],
        f"ld.global.nc.{kind} {names}, [${count}];",
        ",".join([letter] * count + ["l"]),
        has_side_effects=True,
    )
    if count == 1:
        return [result]
    return [llvm.extractvalue(element, result, [i]) for i in range(count)]


def _shared_address(ref):
    return llvm.ptrtoint(_i32(), mgpu_utils.memref_ptr(ref))


def _load_shared(address) -> list:
    """Four registers from shared memory."""
    result = llvm.inline_asm(
        ir.Type.parse("!llvm.struct<(i32, i32, i32, i32)>"),
        [address],
        "ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];",
        "=r,=r,=r,=r,r",
        has_side_effects=True,
    )
    return [llvm.extractvalue(_i32(), result, [i]) for i in range(4)]


def _store_shared(address, values) -> None:
    """Four registers to shared memory."""
    llvm.inline_asm(
        ir.Type.parse("!llvm.void"),
        [address, *values],
        "st.shared.v4.b32 [$0], {$1, $2, $3, $4};",
        "r,r,r,r,r",
        has_side_effects=True,
    )

"""What a consumer of the Hopper kernel does with its lanes: operands in, results out.

It loads codes and scales that the loader left in shared memory, makes the first operand
of wgmma of them, or of the numbers of an addend, and writes rows of what was
accumulated.
"""

# What `inline_mgpu` returns and the transforms are, Pallas does not say in types.
# pyright: reportCallIssue=false, reportAbstractUsage=false
# pyright: reportPrivateImportUsage=false

import jax.experimental.pallas.mosaic_gpu as plgpu
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from pallas_kernels import matmul_sm90_lanes as lanes
from pallas_kernels.matmul_sm90_lanes import LANES, STEP, STEP_WORDS, TABLE_ROW
from pallas_kernels.matmul_sm90_loader import per_lane, strided
from pallas_kernels.matmul_sm90_onto import add_pair, row_offsets
from pallas_kernels.words import half_of

# Results leave in tiles of so many rows.
OUT_ROWS = 64


def swizzled() -> tuple:
    """How tiles that TMA or wgmma reads lie in shared memory."""
    return (plgpu.TilingTransform((8, STEP)), plgpu.SwizzleTransform(128))


def write_table(pairs_gmem, table_smem, wg):
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


def fetch_step(forward, half, codes_smem, scales_smem, wg):
    """Loads a consumer's codes and scales of step `half` of a span."""
    out = per_lane(STEP_WORDS), per_lane(2 if forward else 8)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), plgpu.RefType(), plgpu.Layout.WG_SPLAT),
        return_type=out,
    )
    def run(_, codes, scales, wg):
        lane, wg = lanes.lane_index(), lanes.scalar(wg)
        at = lanes.codes_address(half, lane, wg)
        words = lanes.load("shared.v4.b32", lanes.address(codes) + at)
        values = []
        for at, count in lanes.scale_loads(forward, half, lane, wg):
            kind = f"shared.v{count}.b32"
            values += lanes.load(kind, lanes.address(scales) + at)
        return tuple(map(lanes.from_registers, (words, values), out))

    return run(codes_smem, scales_smem, wg)


def look_up(decoders, dtype, words, table):
    """A consumer's pairs of numbers of a step's words, not scaled yet."""
    out = per_lane(STEP // 4)

    @plgpu.inline_mgpu(
        arg_types=(strided(words), tuple(plgpu.RefType() for _ in table)),
        return_type=out,
    )
    def run(_, words, table):
        ops = lanes.LaneOps(dtype.name, *table)
        pairs = lanes.look_up(ops, decoders, lanes.registers(words))
        return lanes.from_registers(pairs, out)

    return run(words, table)


def scale(forward, dtype, pairs, scales):
    """A consumer's first operand of wgmma from what `look_up` returned.

    Returns:
        [64, 64] of `dtype`, features (`lanes.feature` of the row) by contraction.
    """

    @plgpu.inline_mgpu(
        arg_types=(strided(pairs), strided(scales)), return_type=_operand_type(dtype)
    )
    def run(_, pairs, scales):
        ops = lanes.LaneOps(dtype.name)
        inputs = map(lanes.registers, (pairs, scales))
        return _operand(dtype, lanes.scale_pairs(ops, forward, *inputs))

    return run(pairs, scales)


def _operand_type(dtype):
    return plgpu.ShapeDtypeStruct((64, STEP), dtype, plgpu.Layout.WGMMA)


def _operand(dtype, pairs):
    """The first operand of wgmma from row, column of eight and pair of registers."""
    layout = plgpu.Layout.WGMMA.to_mgpu()
    pair_type = ir.VectorType.get((2,), mgpu_utils.dtype_to_ir_type(dtype))
    out = np.empty(layout.registers_shape((64, STEP)), dtype=object)
    by_column = out.reshape(STEP // 8, 2)
    for row, column, pair in pairs:
        by_column[column, row] = mgpu_utils.bitcast(pair.value, pair_type)
    return mgpu.FragmentedArray(_registers=out, _layout=layout, _is_signed=None)


def load_tail(u_gmem, f0, wg, step):
    """Starts a consumer's loads of its first operand of a step of the addend."""
    out = per_lane(STEP // 4)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), *(plgpu.Layout.WG_SPLAT,) * 2), return_type=out
    )
    def run(_, u, f0, wg):
        f0, wg = map(lanes.scalar, (f0, wg))
        lane = lanes.lane_index()
        features, columns = ir.MemRefType(u.type).shape
        first, pairs = lanes.tail_source(lane, wg)
        words = []
        for row in range(2):
            # beyond the last row any number will do: the result ends there
            feature = (f0 + first + row).minimum(features - 1)
            where = lanes.row_address(u, feature, columns * 2, (lane & 3) * 4)
            for column in pairs:
                at = (step * STEP + column) * 2
                words += lanes.load("global.nc.b32", where, at)
        return lanes.from_registers(words, out)

    return run(u_gmem, f0, wg)


def tail_operand(dtype, words):
    """A consumer's first operand of wgmma from what `load_tail` loaded.

    The assembler makes every product of a kernel wait for the one before if the
    operands of one are defined while another runs. A product by 1 defines them here.
    """

    @plgpu.inline_mgpu(arg_types=(strided(words),), return_type=_operand_type(dtype))
    def run(_, words):
        ops = lanes.LaneOps(dtype.name)
        one = lanes.Word(int(np.ones(2, dtype).view(np.uint32)[0]))
        words = enumerate(lanes.registers(words))
        products = ((i, ops.multiply_pair(word, one)) for i, word in words)
        return _operand(dtype, ((*divmod(i, STEP // 8), pair) for i, pair in products))

    return run(words)


def store_rows(dtype, y, first, words, out_smem):
    """Writes 64 columns of yᵀ, from `first` on, as rows of 64 features.

    `words` has what they are added to, if there is any: see `Onto.load`.
    """

    @plgpu.inline_mgpu(
        arg_types=(
            plgpu.Layout.WGMMA,
            tuple(map(strided, words)),
            plgpu.RefType(swizzled()),
        )
    )
    def run(_, y, words, out):
        ops = lanes.LaneOps(dtype.name)
        lane = lanes.lane_index()
        feature = lanes.feature(lane)
        base = lanes.address(out) + (feature & 7) * 2
        values = y.registers.reshape(-1, 2)
        added = [lanes.registers(one) for one in words]
        for i, offset in enumerate(row_offsets(OUT_ROWS)):
            both = values[first // 8 + i // 2]
            row = (lane & 3) * 2 + offset
            at = mgpu_utils.c(i % 2, ir.IntegerType.get_signless(32))
            pair = [llvm.extractelement(r, at) for r in both]
            for one in added:
                pair = add_pair(one[i], half_of(dtype), pair)
            rounded = ops.round_pair(*pair)
            place = (feature >> 3) ^ (row & 7)
            lanes.store("b32", base + row * 128 + place * 16, [rounded])

    run(y, words, out_smem)

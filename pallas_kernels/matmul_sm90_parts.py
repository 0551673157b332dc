"""How blocks of the Hopper kernel that share a tile add up what each has of it.

What a block has is float32, and is left in device memory. A warp has the same features
and rows of a tile in every block, so that warps meet warps: a counter for each warp of
a tile says how many came, and is 0 again when all have gone.
"""

# What `inline_mgpu` returns and the transforms are, Pallas does not say in types.
# pyright: reportCallIssue=false, reportAbstractUsage=false
# pyright: reportPrivateImportUsage=false

import jax.experimental.pallas.mosaic_gpu as plgpu
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir.dialects import arith

from pallas_kernels import matmul_sm90_lanes as lanes
from pallas_kernels.matmul_sm90_lanes import LANES


def leave_rows(y, rows, worker, wg, parts):
    """Leaves some rows of a tile for the block that adds them up.

    Args:
        y: a consumer's part of the tile, [features, rows].
        rows: the first one and how many.
        worker: the block.
        wg: the consumer.
        parts: in device memory, a row for each worker.
    """

    @plgpu.inline_mgpu(
        arg_types=(
            plgpu.Layout.WGMMA,
            plgpu.RefType(),
            *(plgpu.Layout.WG_SPLAT,) * 2,
        )
    )
    def run(_, y, parts, worker, wg):
        worker, wg = map(lanes.scalar, (worker, wg))
        where = lanes.part_address(parts, worker, wg, lanes.lane_index())
        vectors = y.registers.reshape(-1, 2)
        for i in _groups(rows):
            group = [x for vector in vectors[i] for x in lanes.elements(vector)]
            lanes.store_global("v4.f32", where, i * LANES * 16, group)

    run(y, parts, worker, wg)


def arrive(place, wg, counters):
    """Says that a part was left, of the tile that is number `place` of those cut."""
    _at_counter(lanes.arrive, place, wg, counters)


def wait(place, count, wg, counters):
    """Waits until `count` came, and sets the counter to 0: for one who did not come."""
    _at_counter(lanes.wait, place, wg, counters, count)


def meet(place, count, wg, counters):
    """Comes, and waits until all `count` blocks of a tile came."""
    arrive(place, wg, counters)
    _at_counter(lanes.meet, place, wg, counters, count)


def _at_counter(do, place, wg, counters, *count):
    splats = (plgpu.Layout.WG_SPLAT,) * (2 + len(count))

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), splats))
    def run(_, counters, numbers):
        place, wg, *count = map(lanes.scalar, numbers)
        lane = lanes.lane_index()
        warp = place * 8 + wg * 4 + (lane >> 5)
        do(lanes.global_address(counters, warp), lane, *count)

    run(counters, (place, wg, *count))


def add_rows(y, rows, workers, wg, parts):
    """Adds to some rows of a tile what other workers left of them, in their order.

    Args:
        y: a consumer's part of the tile, [features, rows].
        rows: the first one and how many.
        workers: the first one of the tile, which of them this one is, and how many.
        wg: the consumer.
        parts: in device memory, a row for each worker.
    """

    @plgpu.inline_mgpu(
        arg_types=(
            plgpu.Layout.WGMMA,
            plgpu.RefType(),
            *(plgpu.Layout.WG_SPLAT,) * 4,
        ),
        return_type=plgpu.ShapeDtypeStruct(y.shape, y.dtype, plgpu.Layout.WGMMA),
    )
    def run(_, y, parts, *numbers):
        first, mine, count, wg = map(lanes.scalar, numbers)
        lane = lanes.lane_index()
        groups = _groups(rows)

        def add(i, sums):
            other = i + lanes.at_least(i, mine)  # all but mine
            where = lanes.part_address(parts, first + other, wg, lane)
            return _add(sums, where, groups.start)

        vectors = y.registers.reshape(-1, 2).copy()
        own = vectors[groups.start : groups.stop]
        sums = [x for vector in own.flat for x in lanes.elements(vector)]
        sums = lanes.loop(count - 1, add, sums)
        for i in range(own.size):
            own.flat[i] = lanes.vector(sums[2 * i : 2 * i + 2])
        return mgpu.FragmentedArray(
            _registers=vectors.reshape(y.registers.shape),
            _layout=y.layout,
            _is_signed=None,
        )

    return run(y, parts, *workers, wg)


def _groups(rows):
    """Which groups of four numbers a lane has of some rows; two of each feature."""
    first, count = rows
    return range(first // 8, (first + count) // 8)


def _add(sums, where, group):
    """Adds numbers that lie at an address, from a group of four on."""
    left = [
        x
        for i in range(len(sums) // 4)
        for x in lanes.load("global.cg.v4.f32", where, (group + i) * LANES * 16)
    ]
    return [arith.addf(a, b) for a, b in zip(sums, left, strict=True)]

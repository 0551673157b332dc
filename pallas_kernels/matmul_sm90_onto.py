"""What the results of the Hopper kernel are added to, asked for early.

A consumer adds it in float32 to what its accumulators hold, and rounds once. It reads
it from device memory into the lanes that have the same results, two features of a row
in a word. The loader asks the second-level cache for a tile's while the last steps of
the tile are multiplied.
"""

# What `inline_mgpu` returns and the transforms are, Pallas does not say in types.
# pyright: reportCallIssue=false, reportAbstractUsage=false

import jax.experimental.pallas.mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from pallas_kernels import matmul_sm90_lanes as lanes
from pallas_kernels.matmul_sm90_lanes import LANES
from pallas_kernels.matmul_sm90_loader import per_lane
from pallas_kernels.words import widen

# Numbers that the cache brings at once, 128 bytes.
_LINE = 64


class Onto:
    """A kernel's reads of an array of the shape of its results.

    Args:
        gmem: in device memory, [m, features].
        tile_m: rows of a tile.
        tile_features: features of a tile.
        covered: whether tiles do not reach beyond the array.
    """

    def __init__(self, gmem, tile_m: int, tile_features: int, covered: bool):
        self.gmem, self.tile_m, self.tile_features = gmem, tile_m, tile_features
        self.covered = covered

    def prefetch(self, m0, f0):
        """Asks the second-level cache for a tile, by all lanes of a warpgroup."""

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), *(plgpu.Layout.WG_SPLAT,) * 2))
        def run(_, ref, m0, f0):
            m0, f0 = map(lanes.scalar, (m0, f0))
            lines = self.tile_features // _LINE  # of a row
            for i in range(-(-self.tile_m * lines // LANES)):
                line = lanes.lane_index() + i * LANES
                row, feature = m0 + line // lines, f0 + (line & (lines - 1)) * _LINE
                lanes.prefetch(self._address(ref, row, feature))

        run(self.gmem, m0, f0)

    def load(self, rows, m0, f0, wg):
        """Starts a consumer's loads of some rows of a tile.

        Args:
            rows: the first one of the tile, and how many: a multiple of eight.
            m0: first row of the tile.
            f0: its first feature.
            wg: the consumer.

        Returns:
            Words of two numbers, one for each of a lane's rows: see `row_offsets`.
        """
        first, count = rows
        out = per_lane(count // 4)

        @plgpu.inline_mgpu(
            arg_types=(plgpu.RefType(), *(plgpu.Layout.WG_SPLAT,) * 3), return_type=out
        )
        def run(_, ref, m0, f0, wg):
            m0, f0, wg = map(lanes.scalar, (m0, f0, wg))
            lane = lanes.lane_index()
            row = m0 + (first + (lane & 3) * 2)
            feature = f0 + wg * 64 + lanes.feature(lane)
            if self.covered:
                place = self._address(ref, row, feature)
                row_bytes = self._shape(ref)[1] * 2
                places = [(place, i * row_bytes) for i in row_offsets(count)]
            else:
                places = [
                    (self._address(ref, row + i, feature), 0)
                    for i in row_offsets(count)
                ]
            words = [w for at in places for w in lanes.load("global.nc.b32", *at)]
            return lanes.from_registers(words, out)

        return run(self.gmem, m0, f0, wg)

    def _shape(self, ref):
        return ir.MemRefType(ref.type).shape

    def _address(self, ref, row, feature):
        """Beyond the last row or pair any numbers will do: the result ends there."""
        m, features = self._shape(ref)
        if not self.covered:
            row, feature = row.minimum(m - 1), feature.minimum(features - 2)
        return lanes.row_address(ref, row, features * 2, feature * 2)


def row_offsets(count: int) -> list[int]:
    """Rows of a lane's words of `count` rows, after its first, 2 q of lane 4 g + q."""
    return [8 * block + e for block in range(count // 8) for e in range(2)]


def add_pair(word, half: str | None, values) -> list:
    """Adds the two numbers of a word to two float32 values."""
    return [
        arith.addf(value, number)
        for value, number in zip(values, widen([word.value], half), strict=True)
    ]

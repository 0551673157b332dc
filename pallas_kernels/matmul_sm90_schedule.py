"""Which block of the Hopper kernels computes what, and when.

A block, or worker, goes through spans of the contraction, counted from 0. Whole tiles
are dealt out in rounds. If they are divided, those that do not fill the last round are
cut into pieces, a piece a worker, which it starts with: fewer multiprocessors are idle,
but a tile is the sum of what several workers accumulate.

    alike       with two workers or more for each tile, all are cut alike. The pieces
                of a tile end at the same time, and each adds up some of its rows.
    end to end  with fewer, the tiles are laid end to end and cut into pieces of equal
                length. A piece is shorter than a tile, so it lies in two at most, and
                who has the first piece of a tile adds up the others.

The arithmetic is on integers of Python or, in a kernel, of jax.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

# A number that is not negative.
Number = Any

# Spans of a piece, where there are enough: adding parts up costs as much as some.
_LEAST_SPANS = 4


def _divide(a: Number, b: int) -> Number:
    return lax.div(a, jnp.int32(b)) if isinstance(a, jax.Array) else a // b


def _where(condition, a: Number, b: Number) -> Number:
    if isinstance(condition, jax.Array):
        return jnp.where(condition, a, b)
    return a if condition else b


@dataclasses.dataclass(frozen=True)
class Segment:
    """Spans of one tile that a worker accumulates without a break.

    Attributes:
        tile: which tile.
        first: the first span, of the tile's.
        start: the worker's count at the first span.
        length: how many spans.
        index: of the worker's segments.
    """

    tile: Number
    first: Number
    start: Number
    length: Number
    index: Number


@dataclasses.dataclass(frozen=True)
class Shares:
    """What a worker does with its piece of tiles that lie end to end.

    Attributes:
        leaves: whether it leaves it to another worker.
        first: the first worker who left a part for this one.
        others: how many did, one after the other; 0 for a whole tile.
        place: of the tile, of those that are cut; 0 for a whole tile.
    """

    leaves: Number
    first: Number
    others: Number
    place: Number


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How tiles are dealt out.

    Attributes:
        tiles: how many there are.
        spans: of the contraction.
        workers: blocks, or clusters of blocks.
        divided: whether the last round is divided.
    """

    tiles: int
    spans: int
    workers: int
    divided: bool

    @property
    def cut(self) -> int:
        """Tiles that are laid end to end and cut; the last ones."""
        return self.tiles % self.workers if self.divided else 0

    @property
    def whole(self) -> int:
        """The other tiles."""
        return self.tiles - self.cut

    @property
    def parts(self) -> int:
        """Pieces of each tile that is cut, where it has two workers or more."""
        if not self.cut:
            return 1
        most = max(1, self.spans // _LEAST_SPANS)
        return min(self.workers // self.cut, most)

    @property
    def pieces(self) -> int:
        """How many workers have a piece; the first ones."""
        if self.parts > 1:
            return self.cut * self.parts
        return min(self.workers, max(self.cut, self.cut * self.spans // _LEAST_SPANS))

    def owner(self, chunk: int, chunks: int) -> int:
        """Which of the parts of a tile adds up a chunk of its rows."""
        return chunk * min(self.parts, chunks) // chunks

    def piece(self, worker: Number) -> Number:
        """The first span, of the tiles that are cut, of a worker's piece."""
        if not self.cut:
            return 0
        worker = _where(worker < self.pieces, worker, self.pieces)
        return _divide(worker * (self.cut * self.spans), self.pieces)

    def total(self, worker: Number) -> Number:
        """How many spans a worker goes through."""
        rounds = _divide(self.whole + (self.workers - 1) - worker, self.workers)
        return self.piece(worker + 1) - self.piece(worker) + rounds * self.spans

    def locate(self, worker: Number, count: Number) -> tuple[Number, Number]:
        """Tile and span of a worker's count."""
        first = self.piece(worker)
        length = self.piece(worker + 1) - first
        in_piece = count < length
        linear = _where(in_piece, first + count, count - length)
        place = _divide(linear, self.spans)
        tile = _where(in_piece, place + self.whole, worker + place * self.workers)
        return tile, linear - place * self.spans

    def segments(self, worker: Number) -> Number:
        """How many segments a worker has."""
        rounds = _divide(self.whole + (self.workers - 1) - worker, self.workers)
        return rounds + self._pieces(worker)

    def _pieces(self, worker: Number) -> Number:
        """In how many tiles a worker's piece lies."""
        if not self.cut:
            return 0
        first, end = self.piece(worker), self.piece(worker + 1)
        tiles = 1 + _divide(end - 1, self.spans) - _divide(first, self.spans)
        return _where(end > first, tiles, 0)

    def segment(self, worker: Number, index: Number) -> Segment:
        """A worker's segment."""
        first, pieces = self.piece(worker), self._pieces(worker)
        length = self.piece(worker + 1) - first
        # of the piece: from its start, or from the second tile on
        second = (_divide(first, self.spans) + 1) * self.spans - first
        start = _where(index == 0, 0, second)
        end = _where((index == 0) & (pieces > 1), second, length)
        in_piece = index < pieces
        start = _where(in_piece, start, length + (index - pieces) * self.spans)
        tile, span = self.locate(worker, start)
        length = _where(in_piece, end - start, self.spans)
        return Segment(tile, span, start, length, index)

    def ends_before(self, worker: Number, index: Number) -> Number:
        """How many segments before a worker's `index` have the last span of a tile."""
        if not self.cut:
            return index
        pieces, end = self._pieces(worker), self.piece(worker + 1)
        # All but the last one of a piece that ends inside a tile.
        inside = (pieces > 0) & (end != _divide(end, self.spans) * self.spans)
        return index - _where((index >= pieces) & inside, 1, 0)

    def sharers(self, tile: Number) -> tuple[Number, Number, Number]:
        """Who accumulates a tile that is cut: first worker, its segment, how many.

        The others are the workers after it, with their first segments, which they are
        done with no later than the first one with its.
        """
        begin = (tile - self.whole) * self.spans
        linear = max(self.cut * self.spans, 1)
        first = _divide((begin + 1) * self.pieces - 1, linear)
        last = _divide((begin + self.spans) * self.pieces - 1, linear)
        index = _where(self.piece(first) < begin, 1, 0)
        return first, index, last - first + 1

    def shares(self, worker: Number, segment: Segment) -> Shares:
        """What becomes of a worker's segment."""
        first, index, count = self.sharers(segment.tile)
        in_part = segment.length < self.spans
        collects = in_part & (worker == first) & (segment.index == index)
        return Shares(
            in_part & ~collects,
            first + 1,
            _where(collects, count - 1, 0),
            _where(in_part, segment.tile - self.whole, 0),
        )

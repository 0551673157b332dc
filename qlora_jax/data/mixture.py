"""Batches of one source or several, ordered by grain.

Everything that decides on a batch is a function of its number: the order of grain's
maps (shuffled anew each pass, mixed by weights), then what rows lie at those places. So
any process computes its share of any batch, and a number is all of an iterator's state.
"""

import bisect
import functools
import hashlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from qlora_jax.data.batching import (
    Batch,
    Rows,
    check_same_data,
    empty_batch,
    widths,
)

if TYPE_CHECKING:
    from jaxtyping import Int

# Batches that a thread makes ahead of the one being trained on.
_AHEAD = 4
# As QLoRA's group_by_length (through transformers): sorted within so many batches.
_GROUPED = 50
# More batches than a run takes.
_ENDLESS = 2**40


class Mixture:
    """Shuffled batches without end, of several sources.

    Without weights a pass uses every row of every source once. With them each source
    is gone through again and again, and of any stretch of rows each has its share.

    Args:
        sources: the rows of each.
        weights: share of the rows of a batch for each source, to any scale; None: every
            row once a pass.
        batch_size: rows of a batch, over all processes.
        seed: of the order.
        group_by_length: rows of like length share a batch, and a batch is as wide as
            one of eight widths that holds its longest. As in QLoRA's code: of every 50
            batches of the shuffled order the rows are sorted from long to short, and
            the very first batch holds the longest row.
        process_index: which process this is.
        process_count: how many share a batch: each has every `process_count`-th row.

    Attributes:
        fingerprint: hash of the data and all of these but the processes.

    Raises:
        ImportError: without grain.
        ValueError: if a number is out of its range, or rows are packed and grouped.
    """

    def __init__(
        self,
        sources: Sequence[Rows],
        weights: Sequence[float] | None = None,
        *,
        batch_size: int,
        seed: int = 0,
        group_by_length: bool = False,
        process_index: int = 0,
        process_count: int = 1,
    ):
        if not 0 <= process_index < process_count:
            raise ValueError(f"{process_index=} must be in 0..{process_count=} - 1.")
        if batch_size < 1 or batch_size % process_count:
            raise ValueError(
                f"{batch_size=} must be a positive multiple of {process_count=}."
            )
        if weights is not None and len(weights) != len(sources):
            raise ValueError(f"{len(weights)} weights for {len(sources)} sources.")
        if group_by_length and sources[0].packing:
            raise ValueError(
                "group_by_length and packing both fill rows that would be padding: "
                "choose one; packing fills more."
            )
        self._sources, self._weights = list(sources), weights
        self.batch_size, self._seed = batch_size, seed
        self._grouped = group_by_length
        self._process_index, self._process_count = process_index, process_count
        self._firsts = np.cumsum([0, *map(len, sources)])
        self._widths = widths(sources[0].seq_len)
        asked = (
            [rows.fingerprint for rows in sources],
            weights,
            batch_size,
            seed,
            group_by_length,
        )
        self.fingerprint = hashlib.sha256(repr(asked).encode()).hexdigest()
        places = self._shuffled()
        if group_by_length:
            size = batch_size * self._batches_of_group()
            self._group = self._by_length(places.batch(size, batch_fn=np.asarray))
        else:
            self._batch_rows = places.batch(batch_size, batch_fn=np.asarray)

    def __len__(self) -> int:
        """Batches of a pass: as many rows as all sources have together."""
        return -(-int(self._firsts[-1]) // self.batch_size)

    def rows_of(self, number: int) -> "Int[np.ndarray, 'batch']":
        """Returns which rows a batch holds over all processes, all sources counted."""
        if not self._grouped:
            return self._batch_rows[number]
        group, place = divmod(number, self._batches_of_group())
        first = place * self.batch_size
        return self._group(group)[first : first + self.batch_size]

    def batch(self, number: int) -> Batch:
        """Returns this process's share of one batch by its number."""
        rows = self.rows_of(number)
        # All processes make the same shape: that of the whole batch.
        width = self._width(self._all_lengths[rows])
        mine = rows[self._process_index :: self._process_count]
        batch = empty_batch(len(mine), width, self._sources[0].packing)
        for place, row in enumerate(mine.tolist()):
            source = bisect.bisect_right(self._firsts, row) - 1
            first = int(self._firsts[source])
            self._sources[source].fill(batch, place, row - first)
        return batch

    def padding(self) -> float:
        """Returns the share of the tokens that is padding.

        Of rows grouped by length, in so many of the first batches as tell it well.
        """
        used, total = int(self._all_lengths.sum()), len(self._all_lengths)
        if not self._grouped:
            return 1 - used / (total * self._widths[-1])
        used = total = 0
        for number in range(min(len(self), 20 * self._batches_of_group())):
            lengths = self._all_lengths[self.rows_of(number)]
            used += int(lengths.sum())
            total += self._width(lengths) * self.batch_size
        return 1 - used / total

    def __iter__(self) -> "MixtureIterator":
        return MixtureIterator(self)

    def stream(self) -> Any:
        """Returns grain's iterator over the batches of this process."""
        grain = load_grain()
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=_AHEAD)
        batches = grain.MapDataset.range(_ENDLESS).map(self.batch)
        return iter(batches.to_iter_dataset(options))

    def _shuffled(self) -> Any:
        """Returns grain's map from a place in the order to a row."""
        grain = load_grain()

        def shuffled(first: int, stop: int, stream: int) -> Any:
            # Neighbouring seeds would give source i + 1 the order of source i one
            # pass earlier: grain adds the number of the pass to the seed.
            seed = np.random.SeedSequence((self._seed, stream)).generate_state(1)
            dataset = grain.MapDataset.source(range(first, stop))
            return dataset.shuffle(seed=int(seed[0])).repeat(None)

        firsts = self._firsts.tolist()
        if self._weights is None:
            return shuffled(0, firsts[-1], 0)
        ends = zip(firsts[:-1], firsts[1:], strict=True)
        streams = [shuffled(*span, i) for i, span in enumerate(ends)]
        return grain.MapDataset.mix(streams, weights=list(self._weights))

    def _batches_of_group(self) -> int:
        # As in transformers: fewer than 50 where the data are small.
        few = int(self._firsts[-1]) // (4 * self.batch_size)
        return max(min(few, _GROUPED), 1)

    def _by_length(self, groups: Any) -> Any:
        """Returns the map from a group to its rows, from the longest to the shortest.

        The longest row changes names with one of its source in the first group: a run
        that does not fit into memory ends at its first step.
        """
        longest = int(self._all_lengths.argmax())
        source = bisect.bisect_right(self._firsts, longest)
        alike = np.searchsorted(self._firsts, groups[0], side="right") == source
        other = int(groups[0][alike.argmax()]) if alike.any() else longest
        names = {longest: other, other: longest}

        @functools.lru_cache(maxsize=2)
        def group(number: int) -> np.ndarray:
            rows = np.array([names.get(row, row) for row in groups[number].tolist()])
            return rows[np.argsort(-self._all_lengths[rows], kind="stable")]

        return group

    @functools.cached_property
    def _all_lengths(self) -> "Int[np.ndarray, ' rows']":
        return np.concatenate([rows.lengths for rows in self._sources])

    def _width(self, lengths: "Int[np.ndarray, ' n']") -> int:
        if not self._grouped:
            return self._widths[-1]
        return self._widths[bisect.bisect_left(self._widths, lengths.max())]


class MixtureIterator(Iterator[Batch]):
    """Batches without end, made ahead by a thread; the state is of those taken."""

    def __init__(self, mixture: Mixture):
        self._stream, self._fingerprint = mixture.stream(), mixture.fingerprint

    def __next__(self) -> Batch:
        return next(self._stream)

    def get_state(self) -> dict[str, int | str]:
        """Returns where the iterator stands, as JSON can hold it."""
        return {**self._stream.get_state(), "data": self._fingerprint}

    def set_state(self, state: dict[str, int | str]) -> None:
        """Goes on from a state.

        Raises:
            ValueError: if it was taken over other data, sizes, weights or seed.
        """
        check_same_data(state, self._fingerprint)
        place = {name: value for name, value in state.items() if name != "data"}
        self._stream.set_state(place)


def load_grain() -> Any:
    """Returns the module; says which extra brings it if it is absent."""
    try:
        import grain
        import grain.experimental
    except ImportError:
        raise ImportError(
            "Ordering batches of files needs grain: pip install 'qlora-jax[train]'. "
            "Without it, `qlora_jax.data.Batches` shuffles examples in memory."
        ) from None
    return grain

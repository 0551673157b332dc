"""Fixed-size batches of examples, in an order that a run can take up again.

A batch is a dict of arrays [batch, seq]: `tokens` (int32) and `loss_mask` (float32);
packed ones have `segment_ids` (int32, 1 for the first document of a row, 0 for padding)
and `positions` (int32, counted from the beginning of each document) too. Rows are
padded on the right, which causal attention never looks back on, so rows of one document
need neither.
"""

import functools
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from qlora_jax.data.documents import Documents
from qlora_jax.data.encoding import Example
from qlora_jax.data.packing import best_fit

if TYPE_CHECKING:
    from jaxtyping import Int, Int64

Batch = dict[str, np.ndarray]

# Rows grouped by length are cut to one of so many widths; each compiles a step.
_WIDTHS = 8


class Rows:
    """Documents laid out in rows of `seq_len` tokens: one to a row, or packed.

    Args:
        examples: the documents; each is cut to `seq_len`, see `Documents.fitted`.
        seq_len: tokens of a row.
        packing: several documents to a row, by `best_fit`.

    Attributes:
        documents: those that are in the rows.
        lengths: tokens of each row that are no padding.
        fingerprint: hash of all of these.

    Raises:
        ValueError: if `seq_len` is below 2.
        DataError: if nothing can be learned within `seq_len`.
    """

    def __init__(
        self, examples: Iterable[Example], seq_len: int, *, packing: bool = False
    ):
        if seq_len < 2:
            raise ValueError(f"{seq_len=} must be at least 2.")
        self.seq_len, self.packing = seq_len, packing
        self.documents = Documents.of(examples).fitted(seq_len)
        lengths = self.documents.lengths
        self._rows: Sequence[Sequence[int]] | None = None
        self.lengths: "Int64[np.ndarray, ' rows']" = lengths
        if packing:
            self._rows = best_fit(lengths, seq_len)
            self.lengths = np.array([lengths[row].sum() for row in self._rows])

    def __len__(self) -> int:
        return len(self.lengths)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of the documents and how they are laid out, in hex."""
        asked = (self.documents.fingerprint, self.seq_len, self.packing)
        return hashlib.sha256(repr(asked).encode()).hexdigest()

    def documents_of(self, row: int) -> Sequence[int]:
        """Returns which documents are in a row, from left to right."""
        return [row] if self._rows is None else self._rows[row]

    def fill(self, batch: Batch, place: int, row: int) -> None:
        """Writes a row into a batch of zeros."""
        at = 0
        for segment, index in enumerate(self.documents_of(row), 1):
            document = self.documents[index]
            span = (place, slice(at, at + len(document)))
            batch["tokens"][span] = document.tokens
            batch["loss_mask"][span] = document.loss_mask
            if self.packing:
                batch["segment_ids"][span] = segment
                batch["positions"][span] = np.arange(len(document))
            at += len(document)

    def batch(self, rows: Iterable[int], size: int, width: int | None = None) -> Batch:
        """Returns at most `size` rows as a batch; the rest of it has mask 0.

        Args:
            rows: by number.
            size: rows of the batch.
            width: tokens of a row of the batch, at least those of every row in it; None
                for `seq_len`.
        """
        batch = empty_batch(size, width or self.seq_len, self.packing)
        for place, row in enumerate(rows):
            self.fill(batch, place, row)
        return batch

    def in_order(self, size: int, index: int = 0, count: int = 1) -> list[Batch]:
        """Returns every row once, in order; of each batch every `count`-th row."""
        numbers = range(len(self))
        return [
            self.batch(numbers[i : i + size][index::count], size // count)
            for i in range(0, len(self), size)
        ]


def empty_batch(size: int, width: int, packing: bool) -> Batch:
    """Returns a batch of zeros."""
    kinds = {"tokens": np.int32, "loss_mask": np.float32}
    if packing:
        kinds |= {"segment_ids": np.int32, "positions": np.int32}
    return {name: np.zeros((size, width), kind) for name, kind in kinds.items()}


def widths(seq_len: int) -> list[int]:
    """Returns the widths that batches grouped by length may have, narrowest first."""
    return sorted({-(-seq_len * i // _WIDTHS) for i in range(1, _WIDTHS + 1)} - {1})


class BatchIterator(Iterator[Batch]):
    """Batches without end; its state says how many were taken."""

    def __init__(self, batches: "Batches"):
        self._batches, self._taken = batches, 0

    def __next__(self) -> Batch:
        self._taken += 1
        return self._batches.batch(self._taken - 1)

    def get_state(self) -> dict[str, int | str]:
        """Returns where the iterator stands, as JSON can hold it."""
        return {"taken": self._taken, "data": self._batches.fingerprint}

    def set_state(self, state: dict[str, int | str]) -> None:
        """Goes on from a state.

        Raises:
            ValueError: if it was taken over other examples, sizes or seed.
        """
        check_same_data(state, self._batches.fingerprint)
        self._taken = int(state["taken"])


def check_same_data(state: dict[str, int | str], fingerprint: str) -> None:
    """Compares the data of a saved state with those at hand.

    Raises:
        ValueError: if they differ.
    """
    if state.get("data") != fingerprint:
        raise ValueError(
            "The data, their order or the batch are not those that the saved run "
            "was using: give the same ones, or start anew in another folder."
        )


class Batches:
    """Shuffled batches without end, a pass over the examples after another.

    The batch number i is a function of the examples, the seed and i alone. A pass uses
    every row once; a batch may span two passes. `prepare` makes batches of files, with
    more ways to order them.

    Args:
        examples: the documents; each is cut to `seq_len`.
        batch_size: rows of a batch.
        seq_len: tokens of a row.
        seed: of the order.
        packing: several documents to a row, see `Rows`.

    Attributes:
        rows: the documents, laid out.
        fingerprint: a hash of all of these.

    Raises:
        ValueError: if a size is not positive, or no answer begins within `seq_len`.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        batch_size: int,
        seq_len: int,
        seed: int = 0,
        packing: bool = False,
    ):
        if batch_size < 1 or seq_len < 2:
            raise ValueError(f"{batch_size=} must be at least 1 and {seq_len=} 2.")
        self.rows = Rows(examples, seq_len, packing=packing)
        self.batch_size, self.seed = batch_size, seed
        self._orders: dict[int, np.ndarray] = {}
        asked = (self.rows.fingerprint, batch_size, seed)
        self.fingerprint = hashlib.sha256(repr(asked).encode()).hexdigest()

    def __iter__(self) -> BatchIterator:
        return BatchIterator(self)

    def batch(self, number: int) -> Batch:
        """Returns one batch by its number."""
        places = range(number * self.batch_size, (number + 1) * self.batch_size)
        return self.rows.batch([self._row(place) for place in places], self.batch_size)

    def _row(self, place: int) -> int:
        number, place = divmod(place, len(self.rows))
        return int(self._order(number)[place])

    def _order(self, number: int) -> "Int[np.ndarray, ' rows']":
        if number not in self._orders:
            # A batch may span two passes, so the one before is kept.
            before = {n: o for n, o in self._orders.items() if n == number - 1}
            rng = np.random.default_rng((self.seed, number))
            self._orders = before | {number: rng.permutation(len(self.rows))}
        return self._orders[number]


def in_order(
    examples: Sequence[Example], *, batch_size: int, seq_len: int, packing: bool = False
) -> list[Batch]:
    """Returns every example once, in order; for evaluation.

    Raises:
        ValueError: if no answer begins within `seq_len`.
    """
    return Rows(examples, seq_len, packing=packing).in_order(batch_size)

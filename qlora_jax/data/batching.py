"""Fixed-size batches of examples, in an order that a run can take up again.

A batch is a dict of arrays [batch, seq]: `tokens` (int32) and `loss_mask` (float32).
Rows are padded on the right, which causal attention never looks back on, so they need
neither segment ids nor positions.
"""

import zlib
from collections.abc import Iterator, Sequence

import numpy as np

from qlora_jax.data.prompts import Example

Batch = dict[str, np.ndarray]


def fitting(examples: Sequence[Example], seq_len: int) -> list[Example]:
    """Returns the examples cut to `seq_len`, without those whose answer is cut off.

    Raises:
        ValueError: if none is left.
    """
    cut = [Example(e.tokens[:seq_len], e.loss_mask[:seq_len]) for e in examples]
    kept = [example for example in cut if example.loss_mask[1:].any()]
    if not kept:
        shortest = min((len(e) for e in examples), default=0)
        raise ValueError(
            f"No answer of {len(examples)} examples begins within {seq_len=}; the "
            f"shortest example has {shortest} tokens."
        )
    return kept


def pad(examples: Sequence[Example], batch_size: int, seq_len: int) -> Batch:
    """Returns at most `batch_size` examples as a batch; the rest of it has mask 0."""
    tokens = np.zeros((batch_size, seq_len), np.int32)
    loss_mask = np.zeros((batch_size, seq_len), np.float32)
    for row, example in enumerate(examples):
        tokens[row, : len(example)] = example.tokens
        loss_mask[row, : len(example)] = example.loss_mask
    return {"tokens": tokens, "loss_mask": loss_mask}


class BatchIterator(Iterator[Batch]):
    """Batches without end; its state says how many were taken."""

    def __init__(self, batches: "Batches"):
        self._batches, self._taken = batches, 0

    def __next__(self) -> Batch:
        self._taken += 1
        return self._batches.batch(self._taken - 1)

    def get_state(self) -> dict[str, int]:
        """Returns where the iterator stands, as JSON can hold it."""
        return {"taken": self._taken, "examples": self._batches.fingerprint}

    def set_state(self, state: dict[str, int]) -> None:
        """Goes on from a state.

        Raises:
            ValueError: if it was taken over other examples, sizes or seed.
        """
        if state["examples"] != self._batches.fingerprint:
            raise ValueError(
                "The data, their order or the batch are not those that the saved run "
                "was using: give the same ones, or start anew in another folder."
            )
        self._taken = state["taken"]


class Batches:
    """Shuffled batches without end, a pass over the examples after another.

    The batch number i is a function of the examples, the seed and i alone. A pass uses
    every example once; a batch may span two passes.

    Args:
        examples: the rows; each is cut to `seq_len`.
        batch_size: rows of a batch.
        seq_len: tokens of a row.
        seed: of the order.

    Attributes:
        fingerprint: a checksum of all of these.

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
    ):
        if batch_size < 1 or seq_len < 2:
            raise ValueError(f"{batch_size=} must be at least 1 and {seq_len=} 2.")
        self.examples = fitting(examples, seq_len)
        self.batch_size, self.seq_len, self.seed = batch_size, seq_len, seed
        checksum = zlib.crc32(repr((batch_size, seq_len, seed)).encode())
        for example in self.examples:
            checksum = zlib.crc32(example.tokens.tobytes(), checksum)
            checksum = zlib.crc32(example.loss_mask.tobytes(), checksum)
        self.fingerprint = checksum

    def __iter__(self) -> BatchIterator:
        return BatchIterator(self)

    def batch(self, number: int) -> Batch:
        """Returns one batch by its number."""
        count = len(self.examples)
        places = range(number * self.batch_size, (number + 1) * self.batch_size)
        orders = {p // count: None for p in places}
        orders = {e: np.random.default_rng((self.seed, e)) for e in orders}
        orders = {e: rng.permutation(count) for e, rng in orders.items()}
        rows = [self.examples[orders[p // count][p % count]] for p in places]
        return pad(rows, self.batch_size, self.seq_len)


def in_order(
    examples: Sequence[Example], *, batch_size: int, seq_len: int
) -> list[Batch]:
    """Returns every example once, in order; for evaluation.

    Raises:
        ValueError: if no answer begins within `seq_len`.
    """
    rows = fitting(examples, seq_len)
    return [
        pad(rows[i : i + batch_size], batch_size, seq_len)
        for i in range(0, len(rows), batch_size)
    ]

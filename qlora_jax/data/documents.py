"""Many documents in a few flat arrays, in memory or mapped from a file."""

import dataclasses
import functools
import hashlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, overload

import numpy as np

from qlora_jax.data.conversations import DataError
from qlora_jax.data.encoding import Example

if TYPE_CHECKING:
    from jaxtyping import Bool, Int, Int32, Int64


@dataclasses.dataclass(frozen=True, eq=False)
class Documents(Sequence[Example]):
    """Examples, each a span of two flat arrays.

    Attributes:
        tokens: of all documents, one after another.
        loss_mask: of each token, True where it is to be predicted.
        starts: where the span of each document begins.
        stops: where it ends.
        divisible: see `Example`.
        truncated: see `Example`.
        name: tells the flat arrays apart from others, as a hash does; "" to hash them.
        left_out: how many had nothing to learn when they were cut.
        answer_mask: of each token, True in an answer; None: where `loss_mask` is.
    """

    tokens: "Int32[np.ndarray, ' total']"
    loss_mask: "Bool[np.ndarray, ' total']"
    starts: "Int64[np.ndarray, ' n']"
    stops: "Int64[np.ndarray, ' n']"
    divisible: "Bool[np.ndarray, ' n']"
    truncated: "Bool[np.ndarray, ' n']"
    name: str = ""
    left_out: int = 0
    answer_mask: "Bool[np.ndarray, ' total'] | None" = None

    @classmethod
    def of(cls, examples: Iterable[Example]) -> "Documents":
        """Returns examples as documents."""
        if isinstance(examples, Documents):
            return examples
        examples = list(examples)
        stops = np.cumsum([len(e) for e in examples], dtype=np.int64)
        tokens = [np.asarray(e.tokens, np.int32) for e in examples]
        masks = [np.asarray(e.loss_mask) != 0 for e in examples]
        return cls(
            np.concatenate([np.zeros(0, np.int32), *tokens]),
            np.concatenate([np.zeros(0, bool), *masks]),
            np.concatenate([np.zeros(1, np.int64), stops])[:-1],
            stops,
            np.array([e.divisible for e in examples], bool),
            np.array([e.truncated for e in examples], bool),
        )

    def __len__(self) -> int:
        return len(self.starts)

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> "Documents": ...

    def __getitem__(self, index: "int | slice") -> "Example | Documents":
        if isinstance(index, slice):
            return self.select(np.arange(len(self))[index])
        span = slice(self.starts[index], self.stops[index])
        return Example(
            np.asarray(self.tokens[span]),
            np.asarray(self.loss_mask[span], np.float32),
            bool(self.divisible[index]),
            bool(self.truncated[index]),
        )

    @property
    def lengths(self) -> "Int64[np.ndarray, ' n']":
        """Tokens of each document."""
        return self.stops - self.starts

    @functools.cached_property
    def target_counts(self) -> "Int64[np.ndarray, ' n']":
        """Tokens of each document that are predicted: never its first."""
        counts = np.zeros(len(self), np.int64)
        for i, (start, stop) in enumerate(zip(self.starts, self.stops, strict=True)):
            counts[i] = np.count_nonzero(self.loss_mask[start + 1 : stop])
        return counts

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of all tokens, masks and spans, in hex."""
        digest = hashlib.sha256(self.name.encode())
        if not self.name:
            digest.update(np.ascontiguousarray(self.tokens))
            digest.update(np.ascontiguousarray(self.loss_mask))
        digest.update(np.ascontiguousarray(self.starts))
        digest.update(np.ascontiguousarray(self.stops))
        return digest.hexdigest()

    def select(self, indices: "Int[np.ndarray, ' m']") -> "Documents":
        """Returns some of the documents, in the order given."""
        return dataclasses.replace(
            self,
            starts=self.starts[indices],
            stops=self.stops[indices],
            divisible=self.divisible[indices],
            truncated=self.truncated[indices],
        )

    def all_learned(self) -> "Documents":
        """Returns the documents with every token to be predicted, questions too."""
        return dataclasses.replace(
            self,
            loss_mask=np.ones(len(self.loss_mask), bool),
            name=self.name and f"{self.name} all learned",
            answer_mask=self.loss_mask,
        )

    def answers(self) -> "Documents":
        """Returns the documents with the answers alone to be predicted."""
        mask = self.loss_mask if self.answer_mask is None else self.answer_mask
        return dataclasses.replace(self, loss_mask=mask, answer_mask=None)

    def learnable(self, seq_len: int) -> "Bool[np.ndarray, ' n']":
        """Returns which documents have something to learn when cut to `seq_len`."""
        ends = np.minimum(self.stops, self.starts + seq_len)
        stops = np.where(self.divisible, self.stops, ends)
        return dataclasses.replace(self, stops=stops).target_counts > 0

    def fitted(self, seq_len: int) -> "Documents":
        """Returns the documents cut to `seq_len`, those with nothing to learn left out.

        Divisible ones become as many pieces as they need.

        Raises:
            DataError: if none is left.
        """
        lengths = self.lengths
        pieces = np.where(self.divisible, -(-lengths // seq_len), 1)
        pieces = np.maximum(pieces, 1)
        which = np.repeat(np.arange(len(self)), pieces)
        first = np.cumsum(pieces) - pieces
        number = np.arange(len(which)) - first[which]
        starts = self.starts[which] + number * seq_len
        stops = np.minimum(starts + seq_len, self.stops[which])
        cut = ~self.divisible & (lengths > seq_len)
        fitted = dataclasses.replace(
            self,
            starts=starts,
            stops=stops,
            divisible=self.divisible[which],
            truncated=(self.truncated | cut)[which],
        )
        kept = np.flatnonzero(fitted.target_counts)
        if not len(kept):
            shortest = min(lengths, default=0)
            raise DataError(
                f"No answer of {len(self)} examples begins within {seq_len=}; the "
                f"shortest example has {shortest} tokens."
            )
        return dataclasses.replace(
            fitted.select(kept), left_out=len(fitted) - len(kept)
        )

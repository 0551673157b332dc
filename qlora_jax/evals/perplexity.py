"""Perplexity of a text: its windows, each token scored once."""

import dataclasses
import math
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from qlora_jax.evals.scoring import log_probs


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """What was found.

    Attributes:
        loss: mean over the tokens that were scored, nats.
        tokens: how many those were.
        windows: mean loss of each window.
    """

    loss: float
    tokens: int
    windows: tuple[float, ...]

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where no float is as large."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


def read_text(path: str | os.PathLike[str]) -> str:
    """Returns a text as its bytes have it, no end of line changed.

    Raises:
        ValueError: if there is no such file, or it is not UTF-8.
    """
    path = pathlib.Path(path)
    try:
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}).") from None


def perplexity(
    model: Any,
    tokens: Sequence[int],
    *,
    window: int = 1024,
    stride: int | None = None,
    limit: int | None = None,
    bos_id: int | None = None,
    batch_size: int = 1,
) -> Perplexity:
    """Measures how well a model predicts a text.

        loss = -mean(log p(token | those before it in its window))

    A window of `window` tokens begins every `stride` tokens. Of each, only tokens that
    no window before has scored are scored; the first token of a window has nothing
    before it and never is. What is left at the end and fills no window is left out,
    unless the text is shorter than one.

    Args:
        model: has `hidden` and `head`, as `Llama`.
        tokens: of the whole text, no special ones.
        window: tokens a window has, `bos_id` included.
        stride: from one window to the next; None for windows that do not overlap. The
            smaller, the more context, the slower.
        limit: take only so many windows, from the first on.
        bos_id: put before each window, which then has one token of text less.
        batch_size: windows computed at a time.

    Raises:
        ValueError: if a number is out of its range, or there are less than two tokens.
    """
    room = window - (bos_id is not None)
    stride = room if stride is None else stride
    if window < 2 or not 1 <= stride <= room or batch_size < 1:
        raise ValueError(
            f"{window=} must be at least 2, {stride=} in [1, {room}], and "
            f"{batch_size=} at least 1."
        )
    ids = np.asarray(tokens, np.int32)
    room = min(room, len(ids))
    if room + (bos_id is not None) < 2:
        raise ValueError(f"The text has {len(ids)} tokens: nothing can be predicted.")
    starts = range(0, len(ids) - room + 1, stride)[:limit]
    rows = np.stack([ids[start : start + room] for start in starts])
    if bos_id is not None:
        rows = np.concatenate([np.full((len(rows), 1), bos_id, np.int32), rows], axis=1)
    found = []
    for first in range(0, len(rows), batch_size):
        batch = rows[first : first + batch_size]
        # The last batch is filled up, so that one program serves all.
        full = np.pad(batch, [(0, batch_size - len(batch)), (0, 0)], mode="edge")
        found.append(np.asarray(log_probs(model, full), np.float64)[: len(batch)])
    scores = np.concatenate(found)
    # Of the windows after the first, what the one before did not have.
    new = [scores[0], *(row[-min(stride, row.size) :] for row in scores[1:])]
    total = -sum(float(part.sum()) for part in new)
    count = sum(part.size for part in new)
    return Perplexity(total / count, count, tuple(float(-p.mean()) for p in new))

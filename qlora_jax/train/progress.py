"""What the host remembers of a run beside its arrays."""

import dataclasses
import math


class NonfiniteError(FloatingPointError):
    """Too many steps in a row had a loss or gradient that is no finite number."""


@dataclasses.dataclass
class Progress:
    """Counts that a resumed run goes on with.

    Attributes:
        skipped: steps that were not taken, their gradient being no finite number.
        in_a_row: how many of them the last steps were.
        best_loss: lowest loss of an evaluation; None before the first.
        best_step: steps done when it was found.
        without: evaluations since then.
        evaluated: steps done at the last evaluation.
    """

    skipped: int = 0
    in_a_row: int = 0
    best_loss: float | None = None
    best_step: int | None = None
    without: int = 0
    evaluated: int = 0

    def took(self, *, finite: bool) -> None:
        """Counts a step."""
        self.in_a_row = 0 if finite else self.in_a_row + 1
        self.skipped += not finite

    def found(self, step: int, loss: float) -> bool:
        """Counts an evaluation; returns whether it is the best so far."""
        self.evaluated = step
        best = math.isfinite(loss) and (self.best_loss is None or loss < self.best_loss)
        if best:
            self.best_loss, self.best_step = loss, step
        self.without = 0 if best else self.without + 1
        return best

"""Ratings of systems from judged pairs of answers, as in QLoRA's paper."""

import dataclasses
import gzip
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

# Orders that are played at a time: they are all in memory.
_BLOCK = 1000


@dataclasses.dataclass(frozen=True)
class Match:
    """Two answers to one question, and which was judged the better.

    Attributes:
        a: the one system.
        b: the other.
        score: of a: 1 if it won, 0 if it lost, 0.5 for a tie.
    """

    a: str
    b: str
    score: float


@dataclasses.dataclass(frozen=True)
class Rating:
    """What a system is worth.

    Attributes:
        mean: over the orders of the matches.
        interval: half the width of the 95 % interval of that mean.
        deviation: of the ratings of single orders.
    """

    mean: float
    interval: float
    deviation: float


def read_matches(path: str | os.PathLike[str]) -> list[Match]:
    """Reads judgements: JSON lines (also .gz) of `a`, `b` and `score`.

    The score is 1 (a won), 2 (b won), 3 (a tie) or -1 (not to be parsed: left out), as
    QLoRA's code writes it, or the points of both.

    Raises:
        ValueError: if the file cannot be read, or a line is not of this form (named).
    """
    path = pathlib.Path(path)
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8", newline="\n") as file:
            lines = file.read().split("\n")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}.") from None
    matches = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            score = _score(row["score"])
            if score is not None:
                matches.append(Match(row["a"], row["b"], score))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path}, line {number} is no judgement ({error}): expected a, b and "
                "score."
            ) from None
    return matches


def _score(judged: Any) -> float | None:
    if isinstance(judged, list):
        a, b = judged
        return None if min(a, b) < 0 else (a > b) + 0.5 * (a == b)
    return {1: 1.0, 2: 0.0, 3: 0.5, -1: None}[judged]


def elo_ratings(
    matches: Sequence[Match],
    *,
    start: float = 1000.0,
    k: float = 32.0,
    orders: int = 10_000,
    seed: int = 0,
) -> dict[str, Rating]:
    """Rates systems by tournaments over the matches, each in another random order.

    After a match of a and b,

        expected = 1 / (1 + 10 ** ((rating_b - rating_a) / 400))
        rating_a += k * (score - expected),    rating_b -= k * (score - expected)

    Args:
        matches: the judgements.
        start: rating before the first match; the mean of all stays there.
        k: how far one match moves a rating.
        orders: tournaments; a rating is its mean over them.
        seed: of the orders.

    Returns:
        The ratings by system, the highest first.

    Raises:
        ValueError: if there is no match, or a number is not positive.

    Source: Dettmers et al. 2023, section 5.2 (https://arxiv.org/abs/2305.14314).
    """
    if not matches or k <= 0 or orders < 1:
        raise ValueError(
            f"{len(matches)} matches, {k=} and {orders=} must be positive."
        )
    names = sorted({m.a for m in matches} | {m.b for m in matches})
    place = {name: i for i, name in enumerate(names)}
    a = np.array([place[m.a] for m in matches])
    b = np.array([place[m.b] for m in matches])
    score = np.array([m.score for m in matches])
    rng = np.random.default_rng(seed)
    ratings = np.full((orders, len(names)), start)
    for block in np.array_split(ratings, -(-orders // _BLOCK)):
        order = np.argsort(rng.random((len(block), len(score)), np.float32), axis=1)
        every = np.arange(len(block))
        # Match i of every order in one operation.
        for chosen in order.T:
            first, second = a[chosen], b[chosen]
            gap = block[every, second] - block[every, first]
            moved = k * (score[chosen] - 1 / (1 + 10 ** (gap / 400)))
            block[every, first] += moved
            block[every, second] -= moved
    means, deviations = ratings.mean(axis=0), ratings.std(axis=0)
    found = {
        name: Rating(
            float(means[i]),
            float(1.96 * deviations[i] / np.sqrt(orders)),
            float(deviations[i]),
        )
        for name, i in place.items()
    }
    return dict(sorted(found.items(), key=lambda item: -item[1].mean))

"""Which documents share a row: best fit decreasing."""

import bisect
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Int


def best_fit(lengths: "Int[np.ndarray, ' n']", capacity: int) -> list[list[int]]:
    """Puts documents into as few rows as the rule finds.

    From the longest to the shortest, each goes into the row with the least room that
    still holds it, or begins a new one; at most 11/9 of the fewest rows plus one
    (Johnson 1973), and in practice a fraction of a percent above.

    Args:
        lengths: tokens of each document.
        capacity: tokens of a row.

    Returns:
        The documents of each row, by their places in `lengths`. It depends on the
        arguments alone.

    Raises:
        ValueError: if a document is longer than a row.
    """
    longest = int(np.max(lengths, initial=0))
    if longest > capacity:
        raise ValueError(f"A document of {longest} tokens exceeds {capacity=}.")
    rows: list[list[int]] = []
    rows_with_room: dict[int, list[int]] = {}
    rooms: list[int] = []  # the keys of rows_with_room, sorted
    for document in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        length = int(lengths[document])
        place = bisect.bisect_left(rooms, length)
        if place < len(rooms):
            room = rooms[place]
            row = rows_with_room[room].pop()
            if not rows_with_room[room]:
                del rows_with_room[room], rooms[place]
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(document)
        left = room - length
        if left:
            if left not in rows_with_room:
                bisect.insort(rooms, left)
                rows_with_room[left] = []
            rows_with_room[left].append(row)
    return rows

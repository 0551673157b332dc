"""A thread's way through arrays that are read once."""

from collections.abc import Callable
from typing import Any

from pallas_kernels import emit


def stream(
    first: emit.Int,
    count: int,
    stride: int,
    unroll: int,
    load: Callable[[emit.Int, Any], Any],
    finish: Callable[[emit.Int, Any, Any], None],
) -> None:
    """Goes through every `stride`-th piece, `unroll` of them in flight.

    Args:
        first: the thread's first piece.
        count: pieces of all threads; those past the end are given as not valid.
        stride: threads.
        unroll: pieces that are loaded before the first of them is finished.
        load: (piece, valid) -> what it is made of; `valid` is a 32-bit integer.
        finish: (piece, valid, what was loaded) computes and writes.
    """

    def body(i, carry):
        loaded = []
        for j in range(unroll):
            piece = first + (i * unroll + j) * stride
            valid = emit.bit(piece < count)
            loaded.append((piece, valid, load(piece, valid)))
        for one in loaded:
            finish(*one)
        return carry

    rounds = -(-count // (stride * unroll))
    emit.loop(emit.const(0), emit.const(rounds), emit.const(1), [], body)

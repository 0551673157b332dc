"""The Hopper kernels' schedule: every span of every tile, once, by whom it says."""

import collections

import jax.numpy as jnp
import pytest

from pallas_kernels.matmul_sm90_schedule import Schedule

CASES = [
    # tiles, spans, workers
    (64, 112, 132),  # fewer tiles than workers: two pieces each
    (32, 112, 132),  # four pieces each
    (80, 108, 132),  # end to end
    (224, 32, 132),  # end to end, then a round of whole tiles
    (448, 32, 132),  # two pieces each, then three rounds
    (896, 32, 132),
    (132, 7, 132),  # no tile is left over
    (3, 2, 132),  # more workers than spans
    (1, 1, 4),
    (133, 5, 132),
]


@pytest.mark.parametrize("divided", [False, True])
@pytest.mark.parametrize("tiles, spans, workers", CASES)
def test_every_span_is_somebodys(tiles, spans, workers, divided):
    schedule = Schedule(tiles, spans, workers, divided)
    seen = collections.Counter()
    parts = collections.defaultdict(list)
    for worker in range(workers):
        total = schedule.total(worker)
        count = ends = 0
        for index in range(schedule.segments(worker)):
            segment = schedule.segment(worker, index)
            assert segment.start == count and segment.length > 0
            assert schedule.ends_before(worker, index) == ends
            ends += segment.first + segment.length == spans
            places = [
                schedule.locate(worker, segment.start + i)
                for i in range(segment.length)
            ]
            assert {tile for tile, _ in places} == {segment.tile}
            spans_of_it = [span for _, span in places]
            assert spans_of_it == list(range(spans_of_it[0], spans_of_it[-1] + 1))
            seen.update(places)
            if segment.length < spans:
                parts[segment.tile].append((worker, index))
            count += segment.length
        assert count == total
    assert seen == collections.Counter(
        (tile, span) for tile in range(tiles) for span in range(spans)
    )
    for tile, shares in parts.items():
        first, index, count = schedule.sharers(tile)
        others = [(first + i, 0) for i in range(1, count)]
        assert sorted(shares) == [(first, index), *others]
        assert index < 2 and schedule.whole <= tile


def test_tiles_end_to_end_take_every_worker_as_long():
    schedule = Schedule(80, 108, 132, True)
    assert schedule.parts == 1
    lengths = {schedule.total(worker) for worker in range(132)}
    assert lengths == {65, 66}


@pytest.mark.parametrize(
    "tiles, spans, parts, length",
    [
        (64, 112, 2, 56),
        (32, 112, 4, 28),
        (2, 112, 28, 4),  # no piece is shorter than four spans
        (448, 32, 2, 3 * 32 + 16),
    ],
)
def test_pieces_of_tiles_that_are_cut_alike_begin_and_end_together(
    tiles, spans, parts, length
):
    schedule = Schedule(tiles, spans, 132, True)
    assert schedule.parts == parts
    busy = range(schedule.cut * parts)
    assert {schedule.total(worker) for worker in busy} == {length}
    for worker in busy:
        segment = schedule.segment(worker, 0)
        tile, part = divmod(worker, parts)
        assert segment.tile == schedule.whole + tile
        assert segment.first == part * spans // parts
        assert segment.length == spans // parts


@pytest.mark.parametrize("tiles, chunks", [(64, 4), (40, 4), (32, 4), (32, 1), (2, 4)])
def test_every_chunk_of_rows_has_one_owner_and_none_has_many(tiles, chunks):
    schedule = Schedule(tiles, 112, 132, True)
    owners = [schedule.owner(i, chunks) for i in range(chunks)]
    assert owners == sorted(owners) and owners[0] == 0
    assert max(owners) < schedule.parts
    most = -(-chunks // min(schedule.parts, chunks))
    assert max(collections.Counter(owners).values()) <= most


def test_numbers_of_a_kernel_give_the_same():
    schedule = Schedule(224, 32, 132, True)
    for worker, count in ((0, 0), (7, 23), (131, 40)):
        found = schedule.locate(jnp.int32(worker), jnp.int32(count))
        assert tuple(map(int, found)) == schedule.locate(worker, count)
        for index in (0, 1, 2):
            ends = schedule.ends_before(jnp.int32(worker), jnp.int32(index))
            assert int(ends) == schedule.ends_before(worker, index)
            found = schedule.segment(jnp.int32(worker), jnp.int32(index))
            expected = schedule.segment(worker, index)
            assert (int(found.tile), int(found.length)) == (
                expected.tile,
                expected.length,
            )
    assert tuple(map(int, schedule.sharers(jnp.int32(150)))) == schedule.sharers(150)

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_jax.data import Example, Rows, best_fit

LENGTHS = st.lists(st.integers(2, 16), min_size=1, max_size=60)


def examples(lengths):
    """Each document's tokens are its own: 100 i + place."""
    return [
        Example(
            np.arange(100 * i, 100 * i + n, dtype=np.int32),
            np.r_[np.zeros(1), np.ones(n - 1)].astype(np.float32),
        )
        for i, n in enumerate(lengths, 1)
    ]


@given(LENGTHS)
def test_every_document_once_and_no_row_too_long(lengths):
    rows = best_fit(np.array(lengths), 16)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= 16 for row in rows)
    # No two rows would fit into one, so all but one are more than half full.
    used = sorted(sum(lengths[i] for i in row) for row in rows)
    assert len(used) < 2 or used[0] + used[1] > 16


@given(LENGTHS)
def test_rows_have_every_token_once_with_its_segment_and_position(lengths):
    rows = Rows(examples(lengths), 16, packing=True)
    batch = rows.batch(range(len(rows)), len(rows))
    segments, positions = batch["segment_ids"], batch["positions"]
    found = []
    for place in range(len(rows)):
        used = int(rows.lengths[place])
        assert not any(batch[name][place, used:].any() for name in batch)
        count = len(rows.documents_of(place))
        assert sorted(set(segments[place, :used].tolist())) == [*range(1, count + 1)]
        for segment in range(1, count + 1):
            at = np.flatnonzero(segments[place] == segment)
            assert (np.diff(at) == 1).all()
            assert positions[place, at].tolist() == list(range(len(at)))
            tokens = batch["tokens"][place, at]
            assert (tokens // 100 == tokens[0] // 100).all()
            assert batch["loss_mask"][place, at].tolist() == [0, *[1] * (len(at) - 1)]
            found += tokens.tolist()
    expected = np.concatenate([e.tokens for e in examples(lengths)])
    assert sorted(found) == expected.tolist()


def test_rows_are_nearly_full():
    """Lengths as instructions have them: 512-token rows are 99.9 % full."""
    rng = np.random.default_rng(0)
    lengths = np.clip(np.exp(rng.normal(4.8, 0.8, 20_000)), 8, 512).astype(int)
    rows = best_fit(lengths, 512)
    assert lengths.sum() / (len(rows) * 512) > 0.999


def test_a_document_longer_than_a_row():
    with pytest.raises(ValueError, match="A document of 17 tokens exceeds capacity=16"):
        best_fit(np.array([3, 17]), 16)
    assert best_fit(np.array([], int), 16) == []

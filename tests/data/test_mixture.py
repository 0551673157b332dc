import json
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_jax.data import Example, Mixture, Rows

pytest.importorskip("grain", reason="needs grain (the train extra)")


def rows(lengths, first=0, seq_len=16, packing=False):
    """Documents whose tokens are all their number, from `first` on."""
    examples = [
        Example(np.full(n, first + i, np.int32), np.ones(n, np.float32))
        for i, n in enumerate(lengths)
    ]
    return Rows(examples, seq_len, packing=packing)


def lengths_of(count, seed=0):
    return np.random.default_rng(seed).integers(2, 17, count)


def taken(mixture, count):
    iterator = iter(mixture)
    return [next(iterator) for _ in range(count)]


def same(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].dtype == second[name].dtype
        np.testing.assert_array_equal(first[name], second[name])


def test_a_pass_uses_every_row_of_every_source_once():
    mixture = Mixture([rows([4] * 7), rows([5] * 5, 7)], batch_size=4)
    assert len(mixture) == 3
    first, second = (
        np.concatenate([b["tokens"][:, 0] for b in part])
        for part in (taken(mixture, 6)[:3], taken(mixture, 6)[3:])
    )
    assert sorted(first) == sorted(second) == list(range(12))
    assert first.tolist() != second.tolist()
    assert first.tolist() != sorted(first)


def test_weights_are_shares_of_the_rows():
    sources = [rows([4] * 3), rows([4] * 50, 3)]
    mixture = Mixture(sources, [0.75, 0.25], batch_size=8)
    drawn = np.concatenate([b["tokens"][:, 0] for b in taken(mixture, 20)])
    assert np.mean(drawn < 3) == 0.75
    # Of any stretch, and each source in passes of its own.
    assert np.mean(drawn[:8] < 3) == 0.75
    small, large = drawn[drawn < 3], drawn[drawn >= 3]
    assert all(sorted(small[i : i + 3]) == [0, 1, 2] for i in range(0, 120, 3))
    assert len(set(large.tolist())) == 40


def test_the_order_is_the_seeds():
    def order(seed):
        mixture = Mixture([rows([4] * 20)], batch_size=20, seed=seed)
        return mixture.batch(0)["tokens"][:, 0].tolist()

    assert order(1) == order(1) != order(2)
    # A pass of one seed is no other pass of the next one.
    first, second = (Mixture([rows([4] * 20)], batch_size=20, seed=s) for s in (1, 2))
    assert first.rows_of(1).tolist() != second.rows_of(0).tolist()


@settings(max_examples=20, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(0, 12),
    st.sampled_from(["plain", "weights", "packing", "grouped"]),
)
def test_an_iterator_goes_on_from_its_state(batch_size, before, kind):
    def mixture():
        sources = [
            rows(lengths_of(9), packing=kind == "packing"),
            rows(lengths_of(5, 1), 9, packing=kind == "packing"),
        ]
        weights = [1, 2.5] if kind == "weights" else None
        grouped = kind == "grouped"
        return Mixture(sources, weights, batch_size=batch_size, group_by_length=grouped)

    unbroken = iter(mixture())
    for _ in range(before):
        next(unbroken)
    state = json.loads(json.dumps(unbroken.get_state()))
    resumed = iter(mixture())
    resumed.set_state(state)
    for _ in range(4):
        same(next(unbroken), next(resumed))
    assert resumed.get_state() == unbroken.get_state()


@pytest.mark.parametrize(
    "changed",
    [
        {"sources": [rows([5] * 8)]},
        {"batch_size": 2},
        {"seed": 1},
        {"weights": [1.0]},
        {"group_by_length": True},
    ],
)
def test_a_state_over_other_data_is_refused(changed):
    given = {"sources": [rows([4] * 8)], "batch_size": 4, "seed": 0}
    state = iter(Mixture(**given)).get_state()
    with pytest.raises(ValueError, match="are not those that the saved run"):
        iter(Mixture(**(given | changed))).set_state(state)


@pytest.mark.parametrize("grouped", [False, True])
def test_processes_share_each_batch(grouped):
    given = {"batch_size": 6, "group_by_length": grouped}
    sources = [rows(lengths_of(40))]
    whole = Mixture(sources, **given)
    parts = [
        Mixture(sources, **given, process_index=i, process_count=3) for i in range(3)
    ]
    for number in range(9):
        batch = whole.batch(number)
        for i, part in enumerate(parts):
            same({k: v[i::3] for k, v in batch.items()}, part.batch(number))
    # A run may go on with another number of processes.
    assert {part.fingerprint for part in parts} == {whole.fingerprint}


def test_grouped_by_length_as_in_the_papers_code():
    """Sorted within groups of batches; the longest row first; each row once a pass."""
    lengths = lengths_of(160)
    mixture = Mixture([rows(lengths)], batch_size=4, group_by_length=True)
    numbers = [mixture.rows_of(i) for i in range(len(mixture))]
    assert sorted(np.concatenate(numbers).tolist()) == list(range(160))
    assert lengths[numbers[0][0]] == lengths.max()
    for group in range(4):  # of 10 batches: 160 // (4 * 4)
        found = lengths[np.concatenate(numbers[group * 10 : group * 10 + 10])]
        assert (np.diff(found) <= 0).all()
    again = np.concatenate([mixture.rows_of(40 + i) for i in range(40)])
    assert sorted(again.tolist()) == list(range(160))
    assert again.tolist() != np.concatenate(numbers).tolist()


def test_grouped_batches_are_as_wide_as_they_need():
    lengths = lengths_of(160)
    mixture = Mixture([rows(lengths)], batch_size=4, group_by_length=True)
    plain = Mixture([rows(lengths)], batch_size=4)
    shapes = set()
    for number in range(len(mixture)):
        width = mixture.batch(number)["tokens"].shape[1]
        longest = lengths[mixture.rows_of(number)].max()
        assert longest <= width < longest + 2
        shapes.add(width)
    assert len(shapes) <= 8
    padding = 1 - lengths.sum() / (160 * 16)
    np.testing.assert_allclose(plain.padding(), padding)
    assert mixture.padding() < 0.15 < plain.padding()


def test_packed_rows_share_a_batch():
    sources = [rows([5] * 9, packing=True), rows([4] * 8, 9, packing=True)]
    mixture = Mixture(sources, batch_size=2)
    assert len(mixture) == 3  # 3 rows of three, 2 of four
    batches = [mixture.batch(i) for i in range(3)]
    assert batches[0].keys() == {"tokens", "loss_mask", "segment_ids", "positions"}
    np.testing.assert_allclose(mixture.padding(), 1 - 77 / 80)


def test_one_row_is_enough():
    (batch,) = taken(Mixture([rows([4])], batch_size=2), 1)
    assert batch["tokens"][:, :4].tolist() == [[0] * 4] * 2
    assert len(Mixture([rows([4])], batch_size=2, group_by_length=True)) == 1


@pytest.mark.parametrize(
    "changed, words",
    [
        (
            {"process_index": 2, "process_count": 2},
            "process_index=2 must be in 0..proc",
        ),
        (
            {"process_count": 3},
            "batch_size=4 must be a positive multiple of process_co",
        ),
        ({"batch_size": 0}, "batch_size=0 must be a positive multiple"),
        ({"weights": [1, 2]}, "2 weights for 1 sources"),
        (
            {"sources": [rows([4], packing=True)], "group_by_length": True},
            "group_by_length and packing both fill rows .*: choose one",
        ),
    ],
)
def test_wrong_calls(changed, words):
    with pytest.raises(ValueError, match=words):
        Mixture(**({"sources": [rows([4])], "batch_size": 4} | changed))


def test_without_grain_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "grain", None)
    with pytest.raises(
        ImportError, match=r"needs grain: pip install 'qlora-jax\[train"
    ):
        Mixture([rows([4])], batch_size=1)

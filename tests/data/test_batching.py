import json

import numpy as np
import pytest

from qlora_jax.data import Batches, Example, in_order


def examples(count=10, length=5):
    return [
        Example(
            np.full(length + i % 3, i + 1, np.int32),
            np.concatenate([[0, 0], np.ones(length + i % 3 - 2)]).astype(np.float32),
        )
        for i in range(count)
    ]


def test_rows_are_padded_on_the_right_with_mask_0():
    (first, *_) = in_order(examples(3), batch_size=2, seq_len=8)
    assert first["tokens"].tolist() == [[1] * 5 + [0] * 3, [2] * 6 + [0] * 2]
    assert first["loss_mask"].tolist() == [
        [0, 0, 1, 1, 1, 0, 0, 0],
        [0, 0, 1, 1, 1, 1, 0, 0],
    ]


def test_in_order_every_example_once():
    batches = in_order(examples(10), batch_size=4, seq_len=8)
    assert [b["tokens"].shape for b in batches] == [(4, 8)] * 3
    first = np.concatenate([b["tokens"][:, 0] for b in batches])
    assert first.tolist() == [*range(1, 11), 0, 0]
    assert batches[-1]["loss_mask"][2:].sum() == 0


def test_a_pass_uses_every_example_once():
    iterator = iter(Batches(examples(10), batch_size=4, seq_len=8))
    rows = np.concatenate([next(iterator)["tokens"][:, 0] for _ in range(5)])
    assert sorted(rows[:10]) == sorted(rows[10:]) == list(range(1, 11))
    assert rows[:10].tolist() != rows[10:].tolist()  # each pass in its own order


def test_the_order_is_the_seeds():
    def rows(seed):
        batch = next(iter(Batches(examples(), batch_size=8, seq_len=8, seed=seed)))
        return batch["tokens"][:, 0].tolist()

    assert rows(1) == rows(1) != rows(2)


def test_an_iterator_goes_on_from_its_state():
    batches = Batches(examples(), batch_size=3, seq_len=8)
    iterator = iter(batches)
    for _ in range(4):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    other = iter(Batches(examples(), batch_size=3, seq_len=8))
    other.set_state(state)
    for _ in range(4):
        np.testing.assert_array_equal(next(iterator)["tokens"], next(other)["tokens"])


@pytest.mark.parametrize(
    "changed",
    [
        {"examples": examples(9)},
        {"batch_size": 4},
        {"seq_len": 7},
        {"seed": 1},
    ],
)
def test_a_state_over_other_data_is_refused(changed):
    arguments = {"examples": examples(), "batch_size": 3, "seq_len": 8, "seed": 0}

    def iterator(arguments):
        return iter(Batches(arguments.pop("examples"), **arguments))

    state = iterator(dict(arguments)).get_state()
    with pytest.raises(ValueError, match="are not those that the saved run"):
        iterator(arguments | changed).set_state(state)


def test_answers_that_are_cut_off_are_left_out():
    long = Example(np.ones(20, np.int32), np.r_[np.zeros(15), np.ones(5)])
    (batch,) = in_order([long, *examples(1)], batch_size=2, seq_len=8)
    assert batch["loss_mask"].sum(axis=1).tolist() == [3, 0]
    with pytest.raises(
        ValueError, match="No answer of 1 examples begins within seq_le"
    ):
        in_order([long], batch_size=2, seq_len=8)
    with pytest.raises(ValueError, match="batch_size=0 must be at least 1"):
        Batches([long], batch_size=0, seq_len=8)

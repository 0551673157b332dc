import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from qlora_jax.data import Batches, Example, Rows, in_order
from qlora_jax.data.batching import widths
from qlora_jax.models import Llama, LlamaConfig
from qlora_jax.train import next_token_loss
from tests.tolerances import LOGITS_RELATIVE


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
    assert first.keys() == {"tokens", "loss_mask"}
    assert [first[name].dtype for name in first] == [np.int32, np.float32]


def test_in_order_every_example_once():
    batches = in_order(examples(10), batch_size=4, seq_len=8)
    assert [b["tokens"].shape for b in batches] == [(4, 8)] * 3
    first = np.concatenate([b["tokens"][:, 0] for b in batches])
    assert first.tolist() == [*range(1, 11), 0, 0]
    assert batches[-1]["loss_mask"][2:].sum() == 0


def test_processes_share_the_batches_in_order():
    rows = Rows(examples(10), 8)
    whole = rows.in_order(4)
    parts = [rows.in_order(4, index, 2) for index in (0, 1)]
    for batch, first, second in zip(whole, *parts, strict=True):
        np.testing.assert_array_equal(batch["tokens"][0::2], first["tokens"])
        np.testing.assert_array_equal(batch["tokens"][1::2], second["tokens"])


@pytest.mark.parametrize("packing", [False, True])
def test_a_pass_uses_every_example_once(packing):
    batches = Batches(examples(10), batch_size=4, seq_len=8, packing=packing)
    count = len(batches.rows)  # of 5 to 7 tokens: none shares a row of 8
    iterator = iter(batches)
    rows = np.concatenate([next(iterator)["tokens"][:, 0] for _ in range(5)])
    assert sorted(rows[:10]) == sorted(rows[10:]) == list(range(1, 11))
    assert rows[:10].tolist() != rows[10:].tolist()  # each pass in its own order
    assert count == 10


def test_the_order_is_the_seeds():
    def rows(seed):
        batch = next(iter(Batches(examples(), batch_size=8, seq_len=8, seed=seed)))
        return batch["tokens"][:, 0].tolist()

    assert rows(1) == rows(1) != rows(2)


@given(st.integers(1, 7), st.integers(0, 30), st.booleans())
def test_an_iterator_goes_on_from_its_state(batch_size, taken, packing):
    def batches():
        sizes = {"batch_size": batch_size, "seq_len": 16}
        return iter(Batches(examples(), **sizes, packing=packing))

    iterator = batches()
    for _ in range(taken):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    other = batches()
    other.set_state(state)
    for _ in range(4):
        expected, found = next(iterator), next(other)
        assert expected.keys() == found.keys()
        for name in expected:
            np.testing.assert_array_equal(expected[name], found[name])


@pytest.mark.parametrize(
    "changed",
    [
        {"examples": examples(9)},
        {"batch_size": 4},
        {"seq_len": 7},
        {"seed": 1},
        {"packing": True},
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
    with pytest.raises(ValueError, match="seq_len=1 must be at least 2"):
        Rows([long], 1)


def test_eight_widths():
    assert widths(512) == [64, 128, 192, 256, 320, 384, 448, 512]
    assert widths(100)[-1] == 100
    assert widths(2) == [2]


@pytest.fixture(scope="module")
def model():
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        tie_embeddings=True,
    )
    return Llama(config, rngs=nnx.Rngs(0))


def documents(count=9):
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 20, count)
    return [
        Example(
            rng.integers(0, 96, n).astype(np.int32),
            rng.integers(0, 2, n).astype(np.float32),
        )
        for n in lengths
    ]


@pytest.fixture(scope="module")
def padded_and_packed():
    rows = [Rows(documents(), 32, packing=packing) for packing in (False, True)]
    assert [len(r) for r in rows] == [9, 3]
    return [(r, r.batch(range(len(r)), len(r))) for r in rows]


def test_packed_documents_see_nothing_of_one_another(model, padded_and_packed):
    """The logits of each are those of the document in a row of its own."""
    (_, padded), (rows, packed) = padded_and_packed
    run = nnx.jit(lambda m, *batch: m(*batch))
    alone = run(model, padded["tokens"])
    together = run(model, packed["tokens"], packed["segment_ids"], packed["positions"])
    for row in range(len(rows)):
        at = 0
        for index in rows.documents_of(row):
            count = len(rows.documents[index])
            found, expected = together[row, at : at + count], alone[index, :count]
            error = jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected)
            assert error < LOGITS_RELATIVE["float32"]
            at += count


def test_packed_rows_have_the_loss_of_padded_ones(model, padded_and_packed):
    loss = nnx.jit(next_token_loss)
    losses = [loss(model, batch) for _, batch in padded_and_packed]
    np.testing.assert_allclose(*losses, rtol=1e-6)

import numpy as np
import pytest

from qlora_jax.data import DataError, Documents, Example


def example(length, prompt=1, **flags):
    mask = np.r_[np.zeros(prompt), np.ones(length - prompt)].astype(np.float32)
    return Example(np.arange(length, dtype=np.int32), mask, **flags)


def test_documents_are_the_examples():
    examples = [example(3), example(5, 2, truncated=True), example(2, divisible=True)]
    documents = Documents.of(examples)
    assert len(documents) == 3
    assert documents.lengths.tolist() == [3, 5, 2]
    assert documents.target_counts.tolist() == [2, 3, 1]
    for found, given in zip(documents, examples, strict=True):
        np.testing.assert_array_equal(found.tokens, given.tokens)
        np.testing.assert_array_equal(found.loss_mask, given.loss_mask)
        assert (found.divisible, found.truncated) == (given.divisible, given.truncated)
    assert [len(e) for e in documents[1:]] == [5, 2]
    assert Documents.of(documents) is documents
    assert len(Documents.of([])) == 0


def test_the_first_token_is_never_a_target():
    assert Documents.of([example(3, prompt=0)]).target_counts.tolist() == [2]


def test_answers_that_are_cut_off_are_left_out():
    fitted = Documents.of([example(9, 6), example(3), example(9, 2)]).fitted(6)
    assert fitted.lengths.tolist() == [3, 6]
    assert fitted.truncated.tolist() == [False, True]
    assert fitted.left_out == 1
    with pytest.raises(DataError, match="No answer of 1 examples begins within seq_le"):
        Documents.of([example(9, 6)]).fitted(6)
    with pytest.raises(DataError, match="No answer of 0 examples"):
        Documents.of([]).fitted(6)


def test_texts_are_cut_into_pieces():
    fitted = Documents.of([example(3), example(10, 0, divisible=True)]).fitted(4)
    assert [e.tokens.tolist() for e in fitted] == [
        [0, 1, 2],
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9],
    ]
    assert not fitted.truncated.any()


def test_the_fingerprint_is_of_tokens_masks_and_spans():
    examples = [example(3), example(5)]
    first = Documents.of(examples)
    assert first.fingerprint == Documents.of(examples).fingerprint
    others = [
        Documents.of([example(3), example(5, 2)]),
        Documents.of([example(5), example(3)]),
        first.select(np.array([1, 0])),
        first.fitted(4),
    ]
    assert len({first.fingerprint, *(o.fingerprint for o in others)}) == 5

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax.models.positions import document_lengths, rotate, segment_positions


def test_rotation_turns_pairs_and_scores_depend_on_distance_alone():
    angles = jnp.arange(7.0)[None, :, None] * jnp.array([1.0, 0.1, 0.01, 0.001])
    rotation = jnp.cos(angles), jnp.sin(angles)
    q, k = jax.random.normal(jax.random.key(0), (2, 8))
    turned_q, turned_k = (
        rotate(jnp.broadcast_to(x, (1, 7, 1, 8)), rotation)[0, :, 0] for x in (q, k)
    )
    np.testing.assert_allclose(turned_q[0], q, rtol=1e-6)
    # A pair is the numbers i and i + 4; at position 2 the first is turned by 2.
    first = (q[0] + 1j * q[4]) * np.exp(2j)
    np.testing.assert_allclose(turned_q[2, 0] + 1j * turned_q[2, 4], first, rtol=1e-5)
    scores = np.asarray(turned_q @ turned_k.T)
    for distance in range(-6, 7):
        same = np.diagonal(scores, distance)
        np.testing.assert_allclose(same, same[0], atol=1e-5)


def test_the_type_of_the_heads_stays():
    one = jnp.ones((1, 1, 2))
    turned = rotate(jnp.ones((1, 1, 1, 4), jnp.bfloat16), (one, one))
    assert turned.dtype == jnp.bfloat16


def test_positions_and_lengths_of_packed_documents():
    ids = jnp.array([[3, 3, 3, 5, 5, 1, 0, 0], [2, 2, 2, 2, 2, 2, 2, 2]])
    positions = segment_positions(ids)
    assert positions.tolist() == [[0, 1, 2, 0, 1, 0, 0, 1], list(range(8))]
    lengths = document_lengths(positions)
    assert lengths.tolist() == [[3, 3, 3, 2, 2, 1, 2, 2], [8] * 8]


def test_a_row_that_goes_on_counts_what_was_before():
    assert document_lengths(jnp.array([[7, 8, 9, 0, 1]])).tolist() == [
        [10, 10, 10, 2, 2]
    ]

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from qlora_jax.train.cross_entropy import chunked_cross_entropy

TOKENS, WIDTH, VOCAB = 22, 16, 50


@pytest.fixture(scope="module")
def problem():
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (TOKENS, WIDTH))
    weight = jax.random.normal(keys[1], (WIDTH, VOCAB))
    targets = jax.random.randint(keys[2], (TOKENS,), 0, VOCAB)
    counts = jnp.where(jax.random.uniform(keys[3], (TOKENS,)) < 0.4, 0.0, 1.5)
    return hidden, weight, targets, counts


def dense(hidden, weight, targets, counts):
    """The definition, with all logits at once."""
    picked = jax.nn.log_softmax(hidden @ weight)[jnp.arange(targets.size), targets]
    return -jnp.sum(picked * counts)


def chunked(hidden, weight, targets, counts, chunk_size, parts=1):
    return chunked_cross_entropy(
        lambda x: x @ weight, hidden, targets, counts, chunk_size, parts=parts
    )


def close(found, expected):
    scale = float(jnp.abs(expected).max())
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6 * scale)


@pytest.mark.parametrize("parts", [1, 2, 11])
@pytest.mark.parametrize("chunk_size", [1, 5, 11, 22, 64])
def test_value_and_gradients_are_those_of_the_definition(problem, chunk_size, parts):
    of_both = jax.value_and_grad(dense, (0, 1))
    expected, (dx, dw) = of_both(*problem)
    for transform in (lambda f: f, jax.jit):
        loss = lambda *a: chunked(*a, chunk_size, parts)
        f = transform(jax.value_and_grad(loss, (0, 1)))
        found, (dx_found, dw_found) = f(*problem)
        close(found, expected)
        close(dx_found, dx)
        close(dw_found, dw)


@pytest.mark.parametrize("parts", [1, 2])
def test_without_a_gradient_it_is_the_same_sum(problem, parts):
    close(chunked(*problem, 5, parts), dense(*problem))


def test_tokens_of_weight_0_get_no_gradient(problem):
    hidden, weight, targets, counts = problem
    dx = jax.grad(lambda x: chunked(x, weight, targets, counts, 4))(hidden)
    rows = np.abs(dx).max(axis=1)
    assert (rows[np.asarray(counts) == 0] == 0).all()
    assert (rows[np.asarray(counts) != 0] > 1e-3).all()


def products(jaxpr):
    """Every product of a program, those of inner programs counted once."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            found.append([tuple(v.aval.shape) for v in equation.invars])
        for inner in jaxprs_in_params(equation.params):
            found += products(inner)
    return found


def test_a_frozen_head_is_multiplied_by_twice(problem):
    """Once forward and once backward: its own gradient is not computed."""
    hidden, weight, targets, counts = problem
    f = jax.grad(lambda x: chunked(x, weight, targets, counts, 4))
    assert len(products(jax.make_jaxpr(f)(hidden).jaxpr)) == 2
    f = jax.grad(lambda x, w: chunked(x, w, targets, counts, 4), (0, 1))
    assert len(products(jax.make_jaxpr(f)(hidden, weight).jaxpr)) == 3


def test_chunks_without_a_token_are_skipped(problem):
    hidden, weight, targets, _ = problem
    counts = jnp.zeros(TOKENS).at[jnp.array([3, 17])].set(1.0)

    def head(x):
        calls = []
        jax.debug.callback(lambda: called.append(1))
        return x @ weight + 0 * len(calls)

    called = []
    total = chunked_cross_entropy(head, hidden, targets, counts, 2)
    jax.effects_barrier()
    close(total, dense(hidden, weight, targets, counts))
    assert len(called) == 1  # of eleven chunks


def test_the_gradient_is_scaled_by_what_comes_after(problem):
    hidden, weight, targets, counts = problem
    f = lambda scale: jax.grad(
        lambda x: scale * chunked(x, weight, targets, counts, 4)
    )(hidden)
    close(f(0.25), 0.25 * f(1.0))


def test_a_chunk_has_tokens(problem):
    with pytest.raises(ValueError, match="chunk_size=0 must be at least 1"):
        chunked(*problem, 0)

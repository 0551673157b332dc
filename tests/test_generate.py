import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qlora_jax.generate import _generate, generate, sample, stream
from qlora_jax.interop.hub import load_model
from qlora_jax.models import Llama, LlamaConfig
from qlora_jax.sharding import committed

pytestmark = pytest.mark.unoptimized


@pytest.fixture(scope="module")
def model():
    config = LlamaConfig(64, 32, 48, num_layers=2, num_heads=4, num_kv_heads=2)
    return Llama(config, rngs=nnx.Rngs(3))


PROMPTS = [[1, 2, 3], [5], list(range(40))]


def test_greedy_ids_are_those_of_transformers(data_dir):
    golden = json.loads(data_dir("reference/stories260K_float32.json").read_text())
    model = load_model(data_dir("models/stories260K"), dtype=jnp.float32)
    prompts = [prompt["ids"] for prompt in golden["prompts"]]
    new = generate(model, prompts, max_new_tokens=24)
    assert new == [prompt["greedy_ids"] for prompt in golden["prompts"]]


def test_rows_of_a_batch_are_as_alone(model):
    """And as without a cache."""
    together = generate(model, PROMPTS, max_new_tokens=6)
    assert together == [generate(model, [p], max_new_tokens=6)[0] for p in PROMPTS]
    for prompt, new in zip(PROMPTS, together, strict=True):
        best = model(jnp.array([[*prompt, *new]])).argmax(-1)[0]
        assert best[len(prompt) - 1 : -1].tolist() == new


def test_a_row_ends_before_its_end_token(model):
    (free,) = generate(model, [[1, 2, 3]], max_new_tokens=8)
    end = free[4]
    (ended,) = generate(model, [[1, 2, 3]], max_new_tokens=8, eos_ids=[end])
    assert ended == free[: free.index(end)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_stream_gives_the_same_tokens_one_by_one(model, temperature):
    options = {"temperature": temperature, "key": jax.random.key(5)}
    prompt = PROMPTS[2]
    (expected,) = generate(model, [prompt], max_new_tokens=8, **options)
    given = stream(model, prompt, max_new_tokens=8, **options)
    assert next(given) == expected[0]
    assert [expected[0], *given] == expected
    ends = [expected[4]]
    ended = list(stream(model, prompt, max_new_tokens=8, eos_ids=ends, **options))
    assert ended == expected[: expected.index(ends[0])]
    with pytest.raises(ValueError, match="at least one token"):
        next(stream(model, []))


def test_drawing_is_by_key(model):
    def draw(seed, **options):
        key = jax.random.key(seed)
        options = {"temperature": 1.0, "key": key} | options
        return generate(model, PROMPTS, max_new_tokens=8, **options)

    assert draw(0) == draw(0) != draw(1)
    greedy = generate(model, PROMPTS, max_new_tokens=8)
    assert draw(0, temperature=1e-4) == greedy
    assert draw(0, top_p=1e-6) == greedy


def test_tokens_are_drawn_by_their_probability():
    logits = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05]))
    rows = jnp.broadcast_to(logits, (20_000, 4))

    def shares(**options):
        tokens = sample(rows, jax.random.key(0), **{"temperature": 1.0, **options})
        return np.bincount(tokens, minlength=4) / len(tokens)

    # The standard deviation of a share is at most 0.0036.
    np.testing.assert_allclose(shares(), [0.5, 0.3, 0.15, 0.05], atol=0.015)
    np.testing.assert_allclose(shares(top_p=0.7), [0.625, 0.375, 0, 0], atol=0.015)
    squared = np.array([0.25, 0.09, 0.0225, 0.0025])
    expected = squared / squared.sum()
    np.testing.assert_allclose(shares(temperature=0.5), expected, atol=0.015)


@pytest.mark.parametrize(
    "prompts, options, words",
    [
        ([], {}, "at least one token"),
        ([[1], []], {}, "at least one token"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ([[1]], {"top_p": 0.0}, r"top_p=0.0 in \(0, 1\]"),
        ([[1]], {"temperature": 0.7}, "temperature=0.7 draws tokens: give a key"),
    ],
)
def test_wrong_calls(model, prompts, options, words):
    with pytest.raises(ValueError, match=words):
        generate(model, prompts, **options)


def test_arrays_bound_to_their_device_take_the_same_program(model):
    graph, state = nnx.split(model)
    bound = nnx.merge(graph, committed(state))
    first = generate(model, [[1, 2, 3]], max_new_tokens=3)
    compiled = _generate._cache_size()
    assert generate(bound, [[1, 2, 3]], max_new_tokens=3) == first
    assert _generate._cache_size() == compiled

"""Text from a model: prefill, then a token at a time with a cache, in one program."""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from qlora_jax.sharding import committed

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int, Key

# Prompts are padded to a multiple of this, so that few lengths mean few compilations.
_BUCKET = 32
# And so is the room for a conversation that goes on.
_CAPACITY = 256


def sample(
    logits: "Float[Array, 'b v']",
    key: "Key[Array, '']",
    *,
    temperature: "Float[Array, ''] | float",
    top_p: "Float[Array, ''] | float" = 1.0,
) -> "Int[Array, ' b']":
    """Draws a token from softmax(logits / temperature), the nucleus of it alone.

    Args:
        logits: float32.
        key: a typed key.
        temperature: positive; towards 0 it becomes the most likely token.
        top_p: the most likely tokens whose probabilities first reach it are kept.
    """
    logits = logits / temperature
    descending = jnp.sort(logits, axis=-1)[:, ::-1]
    probabilities = jax.nn.softmax(descending, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    # The least likely token that is kept; the first one always is.
    last = jnp.maximum(jnp.sum(before < top_p, axis=-1, keepdims=True), 1) - 1
    threshold = jnp.take_along_axis(descending, last, axis=-1)
    return jax.random.categorical(key, jnp.where(logits < threshold, -jnp.inf, logits))


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 128,
    eos_ids: Iterable[int] | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    key: "Key[Array, ''] | None" = None,
) -> list[list[int]]:
    """Continues each prompt.

    Args:
        model: a `Llama`, with adapters or without.
        prompts: token ids; rows may differ in length.
        max_new_tokens: at most so many are added.
        eos_ids: tokens that end a row; None for those of `model.config`. The one that
            ended a row is not part of the answer.
        temperature: 0 takes the most likely token; above, tokens are drawn.
        top_p: see `sample`.
        key: a typed key; needed to draw.

    Returns:
        The new tokens of each row.

    Raises:
        ValueError: if there is no prompt, one is empty, or a number is out of range.
    """
    tokens, lengths = _padded(prompts)
    _check(max_new_tokens, temperature, top_p, key)
    ends = model.config.eos_token_id if eos_ids is None else tuple(eos_ids)
    graph, state = committed(nnx.split(model))
    new = _generate(
        graph,
        state,
        tokens,
        lengths,
        jax.random.key(0) if key is None else key,
        temperature,
        top_p,
        max_new_tokens=max_new_tokens,
        ends=ends,
        greedy=not temperature,
    )
    rows = np.asarray(new).tolist()
    return [_until(row, ends) for row in rows]


def stream(
    model: Any,
    prompt: Sequence[int],
    *,
    max_new_tokens: int = 128,
    eos_ids: Iterable[int] | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    key: "Key[Array, ''] | None" = None,
) -> Iterator[int]:
    """Continues one prompt, and gives each token as soon as it is there.

    The tokens are those of `generate`, whose arguments these are. Each is a call of its
    own, which a small model notices.

    Yields:
        The new tokens, without the one that ends them.

    Raises:
        ValueError: as `generate`, when the first token is asked for.
    """
    tokens, lengths = _padded([prompt])
    _check(max_new_tokens, temperature, top_p, key)
    ends = model.config.eos_token_id if eos_ids is None else tuple(eos_ids)
    how = (jax.random.key(0) if key is None else key, temperature, top_p)
    graph, state = committed(nnx.split(model))
    # In large steps, so that the turns of a conversation share programs.
    capacity = -(-(tokens.shape[1] + max_new_tokens) // _CAPACITY) * _CAPACITY
    greedy = not temperature
    token, cache = _begin(
        graph, state, tokens, lengths, *how, capacity=capacity, greedy=greedy
    )
    for number in range(1, max_new_tokens + 1):
        if (found := int(token[0])) in ends:
            return
        yield found
        if number < max_new_tokens:
            token, cache = _go_on(
                graph, state, token, cache, number, *how, greedy=greedy
            )


def _padded(prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the prompts as an array, and their lengths.

    Raises:
        ValueError: if there is none, or one is empty.
    """
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise ValueError("Every prompt must have at least one token.")
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    width = -(-int(lengths.max()) // _BUCKET) * _BUCKET
    tokens = np.zeros((len(prompts), width), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    return tokens, lengths


def _check(max_new_tokens: int, temperature: float, top_p: float, key: Any) -> None:
    if max_new_tokens < 1 or temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(
            f"{max_new_tokens=} must be at least 1, {temperature=} at least 0, and "
            f"{top_p=} in (0, 1]."
        )
    if temperature and key is None:
        raise ValueError(f"{temperature=} draws tokens: give a key, or temperature=0.")


def _until(row: list[int], ends: Sequence[int]) -> list[int]:
    stops = [i for i, token in enumerate(row) if token in ends]
    return row[: stops[0]] if stops else row


@functools.partial(jax.jit, static_argnames=("max_new_tokens", "ends", "greedy"))
def _generate(
    graph,
    state,
    tokens,
    lengths,
    key,
    temperature,
    top_p,
    *,
    max_new_tokens: int,
    ends: tuple[int, ...],
    greedy: bool,
) -> "Int[Array, 'b n']":
    model = nnx.merge(graph, state)
    batch, width = tokens.shape
    choose = _chooser(model, key, temperature, top_p, greedy)

    def ended(token):
        return jnp.isin(token, jnp.array(ends, jnp.int32))

    first, cache = _first(model, tokens, lengths, width + max_new_tokens, choose)
    new = jnp.zeros((batch, max_new_tokens), jnp.int32).at[:, 0].set(first)

    def more(carry):
        number, _, _, done, _ = carry
        return (number < max_new_tokens) & ~jnp.all(done)

    def step(carry):
        number, token, new, done, cache = carry
        hidden, cache = model.decode(token[:, None], cache)
        token = choose(hidden[:, 0], number)
        new = new.at[:, number].set(token)
        return number + 1, token, new, done | ended(token), cache

    carry = (jnp.int32(1), first, new, ended(first), cache)
    return lax.while_loop(more, step, carry)[2]


def _chooser(model, key, temperature, top_p, greedy: bool) -> Callable[..., Any]:
    """Returns the function from hidden states and the token's number to the token."""

    def choose(hidden, number):
        logits = model.head(hidden)
        if greedy:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        own = jax.random.fold_in(key, number)
        drawn = sample(logits, own, temperature=temperature, top_p=top_p)
        return drawn.astype(jnp.int32)

    return choose


def _first(model, tokens, lengths, capacity, choose):
    cache = model.init_cache(tokens.shape[0], capacity)
    hidden, cache = model.decode(tokens, cache)
    # What was padding is overwritten by the tokens to come.
    cache = cache.with_lengths(lengths)
    last = jnp.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)[:, 0]
    return choose(last, 0), cache


@functools.partial(jax.jit, static_argnames=("capacity", "greedy"))
def _begin(graph, state, tokens, lengths, key, temperature, top_p, *, capacity, greedy):
    model = nnx.merge(graph, state)
    choose = _chooser(model, key, temperature, top_p, greedy)
    return _first(model, tokens, lengths, capacity, choose)


@functools.partial(jax.jit, static_argnames=("greedy",), donate_argnums=(3,))
def _go_on(graph, state, token, cache, number, key, temperature, top_p, *, greedy):
    model = nnx.merge(graph, state)
    hidden, cache = model.decode(token[:, None], cache)
    choose = _chooser(model, key, temperature, top_p, greedy)
    return choose(hidden[:, 0], number), cache

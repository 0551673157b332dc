"""Nearest codes of the dynamic 8-bit maps, by arithmetic instead of a search."""

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax.quant.formats import dynamic_map

if TYPE_CHECKING:
    from jaxtyping import Array, Float32, UInt8


def nearest_dynamic_code(
    x: "Float32[Array, '*shape']",
    *,
    signed: bool,
    noise: "Float32[Array, '*shape'] | None",
) -> "UInt8[Array, '*shape']":
    """Rounds numbers to codes of a dynamic map.

    In decade e = 0 ... 6 the positive numbers of the map are 10**(e - 6) times the
    midpoints of equal parts of [0.1, 1], twice as many parts a decade up: the decade
    and the part of a number give its code but for one step, which two comparisons with
    the midpoints between neighbours of the map correct.

    Args:
        x: in [-1, 1], or [0, 1] for the unsigned map.
        signed: which map.
        noise: None rounds to the nearest code, ties down. Uniform numbers in [0, 1)
            round up with the probability that makes the expected value `x`.

    Returns:
        The codes; `dynamic_map(signed)[code]` is near `x`.
    """
    table = np.array(dynamic_map(signed), np.float32)
    # parts of decade e: 2**e, or 2**(e + 1) without a sign; ordinal of its first number
    parts = 2.0 ** np.arange(7) * (1 if signed else 2)
    first = np.cumsum([1.0, *parts[:-1]])
    magnitude = jnp.abs(x)
    edges = np.array([10.0 ** (e - 7) for e in range(1, 7)], np.float32)
    decade = jnp.sum(magnitude[..., None] >= edges, axis=-1)
    unit = magnitude * _take(10.0 ** (6 - np.arange(7.0)), decade)  # in [0.1, 1)
    part = jnp.floor((unit - np.float32(0.1)) * _take(parts / 0.9, decade))
    part = jnp.clip(part, 0.0, _take(parts, decade))
    ordinal = (_take(first, decade) + part).astype(jnp.int32)
    zero = 127 if signed else 0
    code = jnp.where(x < 0, zero - ordinal, zero + ordinal)
    code = jnp.clip(code, 0, 255)
    if noise is None:
        # thresholds[c] is between code c - 1 and code c
        thresholds = np.array(
            [-np.inf, *((table[1:] + table[:-1]) / np.float32(2)), np.inf], np.float32
        )
        code = code - (x <= _take(thresholds, code)).astype(jnp.int32)
        code = code + (x > _take(thresholds, code + 1)).astype(jnp.int32)
    else:
        below = code - (x < _take(table, code)).astype(jnp.int32)
        below = jnp.clip(below + (x >= _take(table, below + 1)), 0, 254)
        low, high = _take(table, below), _take(table, below + 1)
        code = below + (noise * (high - low) < x - low).astype(jnp.int32)
    return code.astype(jnp.uint8)


def keep_sign(
    codes: "UInt8[Array, '*shape']", x: "Float32[Array, '*shape']"
) -> "UInt8[Array, '*shape']":
    """Moves codes of the signed map off zero and beyond, to the side of `x`.

    bitsandbytes compares sign bits: a small negative number that rounds to zero becomes
    the smallest negative one, a small positive one stays zero.
    """
    negative = codes < 127
    step = jnp.where((x < 0) & ~negative, -1, jnp.where((x > 0) & negative, 1, 0))
    return (codes.astype(jnp.int32) + step).astype(jnp.uint8)


def _take(table: Any, index: jax.Array) -> jax.Array:
    return jnp.asarray(table, jnp.float32).at[index].get(mode="clip")

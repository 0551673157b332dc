"""How an adapter begins: drawn at random, or taken from the weight it adapts."""

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from qlora_jax.lora.lora import LoraTensor, kaiming_uniform
from qlora_jax.lora.places import is_weight
from qlora_jax.quant import QuantizedTensor, dequantize, quantize

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Key, Shaped


@runtime_checkable
class FromWeight(Protocol):
    """An initialisation that looks at the weight, one [in, out] matrix at a time.

    Returns the new base (an array, or quantized in the format given), `a` and `b`.
    """

    def __call__(
        self, w: jax.Array, *, rank: int, scale: float, format: str | None
    ) -> tuple[Any, jax.Array, jax.Array]:
        """Returns base, a [in, rank] and b [rank, out] for w [in, out]."""
        ...


Init = Literal["kaiming", "gaussian", "orthogonal", "pissa", "loftq"] | FromWeight


def gaussian(key: "Key[Array, '']", shape: tuple[int, ...]) -> "Float[Array, '...']":
    """The initial `a` of PEFT's "gaussian": normal, of deviation 1 / rank."""
    return jax.random.normal(key, shape) / shape[-1]


def orthogonal(
    key: "Key[Array, '']", shape: tuple[int, ...]
) -> "tuple[Float[Array, '*stack in rank'], Float[Array, '*stack rank out']]":
    """Draws `a` and `b` so that neither is zero and their product is.

    The rows of a random orthogonal [rank, rank] matrix are dealt in turn to `a` and to
    `b`, which are normal in their halves:

        a = normal[in, rank / 2] @ q[0::2] / 10
        b = q[1::2].T @ normal[rank / 2, out] / 10

    Args:
        key: a typed key.
        shape: [*stack, in, rank, out]; the rank must be even.

    Returns:
        `a` and `b`, whose product is zero up to rounding.

    Raises:
        ValueError: if the rank is odd.

    Source: https://datta0.github.io/posts/rethink-lora-init, as in PEFT.
    """
    *stack, n_in, rank, n_out = shape
    if rank % 2:
        raise ValueError(f"init='orthogonal' deals the rank in halves: {rank=} is odd.")
    key_q, key_a, key_b = jax.random.split(key, 3)
    q, _ = jnp.linalg.qr(jax.random.normal(key_q, (*stack, rank, rank)))
    half_a = jax.random.normal(key_a, (*stack, n_in, rank // 2))
    half_b = jax.random.normal(key_b, (*stack, rank // 2, n_out))
    a = exact_product(half_a, q[..., 0::2, :]) / 10
    b = exact_product(jnp.swapaxes(q[..., 1::2, :], -1, -2), half_b) / 10
    return a, b


def _with_zeros(draw: Callable[..., jax.Array]) -> Callable[..., Any]:
    """Of a way to draw `a` makes one that also gives `b`, zero."""

    def begin(key: jax.Array, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
        *stack, n_in, rank, n_out = shape
        return draw(key, (*stack, n_in, rank)), jnp.zeros((*stack, rank, n_out))

    return begin


# From a key and [*stack, in, rank, out].
_DRAWN: dict[str, Callable[..., Any]] = {
    "kaiming": _with_zeros(kaiming_uniform),
    "gaussian": _with_zeros(gaussian),
    "orthogonal": orthogonal,
}


def pissa(
    w: "Float[Array, 'in out']", *, rank: int, scale: float, format: str | None = None
) -> "tuple[Any, Float[Array, 'in rank'], Float[Array, 'rank out']]":
    """Takes the principal part of the weight as the adapter, the rest as the base.

        w = u @ diag(s) @ v
        a = u[:, :rank] * sqrt(s / scale),   b = sqrt(s / scale) * v[:rank]
        base = w - scale * a @ b

    Args:
        w: the weight, not quantized.
        rank: how many singular vectors.
        scale: of the adapter.
        format: to quantize what is left in, or None.

    Returns:
        The base, `a` and `b`.

    Source: https://arxiv.org/abs/2404.02948.
    """
    a, b = _principal(w.astype(jnp.float32), rank, scale)
    rest = (w - scale * exact_product(a, b)).astype(w.dtype)
    return (rest if format is None else quantize(rest, format)), a, b


def loftq(
    w: "Float[Array, 'in out']",
    *,
    rank: int,
    scale: float,
    format: str | None,
    steps: int = 1,
) -> "tuple[QuantizedTensor, Float[Array, 'in rank'], Float[Array, 'rank out']]":
    """Fits the adapter to the error of quantization, alternating.

    Beginning with a @ b = 0, `steps` times

        base = quantize(w - scale * a @ b)
        scale * a @ b = the best approximation of w - base of that rank

    PEFT leaves `scale` out, so that its fit holds for alpha = rank only; here the sum
    is right for any. The base is double-quantized, as it is everywhere.

    Args:
        w: the weight, not quantized.
        rank: of the approximation.
        scale: of the adapter.
        format: to quantize in.
        steps: how often; 1 as in PEFT. For more, `init=functools.partial(loftq,
            steps=5)`.

    Returns:
        The quantized base, `a` and `b`.

    Raises:
        ValueError: without a format.

    Source: https://arxiv.org/abs/2310.08659, algorithm 1.
    """
    if format is None:
        raise ValueError("init='loftq' fits the error of quantization: give quantize=.")
    whole = w.astype(jnp.float32)
    rest = whole
    for _ in range(steps):
        base = quantize(rest.astype(w.dtype), format)
        a, b = _principal(whole - dequantize(base, jnp.float32), rank, scale)
        rest = whole - scale * exact_product(a, b)
    return base, a, b


def _principal(w: jax.Array, rank: int, scale: float) -> tuple[jax.Array, jax.Array]:
    u, s, v = jnp.linalg.svd(w, full_matrices=False)
    root = jnp.sqrt(s[:rank] / scale)
    return u[:, :rank] * root, root[:, None] * v[:rank]


_FROM_WEIGHT: dict[str, FromWeight] = {"pissa": pissa, "loftq": loftq}


def initialised(
    w: Any,
    *,
    rank: int,
    scale: float,
    key: "Key[Array, '']",
    init: Init,
    quantize: str | None,
    path: str,
    dtype: Any = jnp.float32,
) -> "tuple[Any, Shaped[Array, '*stack in rank'], Shaped[Array, '*stack rank out']]":
    """Returns the base, `a` and `b` with which a weight's adapter begins.

    Args:
        w: [*stack, in, out], an array or a weight.
        rank: of the adapter.
        scale: of the adapter.
        key: for what is drawn.
        init: see `add_lora`.
        quantize: the format to hold the base in, or None for as it is.
        path: what the weight is called in errors.
        dtype: of `a` and `b`, which are computed in float32.

    Returns:
        The three; the base is `w` itself where nothing is to be done to it.

    Raises:
        ValueError: if the initialisation is unknown, or `w` is quantized already where
            the weight itself is needed.
    """
    *stack, n_in, n_out = w.shape
    looks_at_weight = callable(init) or init in _FROM_WEIGHT
    if (quantize is not None or looks_at_weight) and is_weight(w):
        raise ValueError(
            f"{path!r} is quantized already: load the model unquantized for {init=}, "
            f"{quantize=}."
        )
    if looks_at_weight:
        begin = init if callable(init) else _FROM_WEIGHT[init]
        options = {"rank": rank, "scale": scale, "format": quantize}
        base, a, b = by_matrix(begin, w, depth=len(stack), **options)
        return base, a.astype(dtype), b.astype(dtype)
    if init not in _DRAWN:
        known = ", ".join([*_DRAWN, *_FROM_WEIGHT])
        raise ValueError(f"{init=} must be one of {known}, or a function.")
    a, b = _drawn(key, init, (*stack, n_in, rank, n_out), jnp.dtype(dtype))
    return _quantized(w, quantize), a, b


# One program: beside a model that fills the device there is no room for the float32
# values, nor for what their going would leave in pieces.
@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _drawn(
    key: "Key[Array, '']", init: str, shape: tuple[int, ...], dtype: Any
) -> tuple[jax.Array, jax.Array]:
    return tuple(x.astype(dtype) for x in _DRAWN[init](key, shape))


def with_magnitude(lt: LoraTensor, dtype: Any = jnp.float32) -> LoraTensor:
    """Returns the adapter as a DoRA adapter whose columns keep their present norm.

    Args:
        lt: of arrays, without a magnitude.
        dtype: of the magnitude, which is trained.

    Returns:
        The same with `magnitude` = |w + scale * a @ b| and `square_norm` = |w|², by
        column.
    """
    square, magnitude = by_matrix(_column_norms, lt, depth=lt.ndim - 2)
    return dataclasses.replace(
        lt, square_norm=square, magnitude=magnitude.astype(dtype)
    )


def _column_norms(lt: LoraTensor) -> tuple[jax.Array, jax.Array]:
    base = dense(lt.w)
    whole = base + lt.scale * exact_product(lt.a, lt.b)
    return jnp.square(base).sum(0), jnp.sqrt(jnp.square(whole).sum(0))


def exact_product(a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns a @ b in float32, on GPUs too, whose default is TF32."""
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def dense(w: Any, dtype: Any = jnp.float32) -> "Float[Array, '*stack in out']":
    """Returns the array that a base weight stands for."""
    return dequantize(w, dtype) if isinstance(w, QuantizedTensor) else w.astype(dtype)


def by_matrix(
    function: Callable[..., Any], weight: Any, *, depth: int, **options: Any
) -> Any:
    """Applies a function of one matrix to each of a stack, one at a time, jitted.

    Args:
        function: from a weight [in, out], and the options, to a pytree.
        weight: a pytree whose leaves have `depth` stack axes in front.
        depth: how many.
        **options: further arguments of the function, hashable.

    Returns:
        What the function gives, with the stack axes in front of each leaf.
    """
    return _by_matrix(function, weight, depth, tuple(options.items()))


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def _by_matrix(
    function: Callable[..., Any], weight: Any, depth: int, options: tuple[Any, ...]
) -> Any:
    function = functools.partial(function, **dict(options))
    for _ in range(depth):
        # One matrix at a time: the temporaries are those of one.
        function = functools.partial(jax.lax.map, function)
    return function(weight)


def _quantized(w: Any, format: str | None) -> Any:
    return w if format is None else quantize(w, format)

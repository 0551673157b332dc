"""Adam and Lion with moments in 8 bits, block by block, as bitsandbytes keeps them."""

import dataclasses
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from pallas_kernels import tuning
from qlora_jax.optim.dynamic_codes import keep_sign, nearest_dynamic_code
from qlora_jax.quant.blockwise import dequantize_blockwise
from qlora_jax.quant.formats import get_format

if TYPE_CHECKING:
    from jaxtyping import Array, Float32, UInt8

_SMALLEST_ABSMAX = 1e-38  # what is smaller is flushed to zero on some backends


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Moment8bit:
    """A moment of one parameter: number `i` stands for `map[codes[i]] * absmax[b]`.

    The blocks run over the flattened parameter, the last one possibly short.
    """

    codes: "UInt8[Array, '*shape']"
    absmax: "Float32[Array, ' blocks']"


Moment = Moment8bit | jax.Array  # float32 in the shape of the parameter, if an array


@dataclasses.dataclass(frozen=True)
class MomentFormat:
    """How a moment is kept.

    Attributes:
        signed: which dynamic map; the second moment has no sign.
        block_size: numbers that share an absmax.
        min_8bit_size: numbers of a parameter below which it is kept in float32.
    """

    signed: bool
    block_size: int
    min_8bit_size: int

    @property
    def codebook(self) -> tuple[float, ...]:
        """The numbers of the map."""
        return get_format(self._format).codebook

    @property
    def _format(self) -> str:
        return "dynamic8" if self.signed else "dynamic8-unsigned"

    def zeros(self, param: jax.Array) -> Moment:
        """The moment before the first step."""
        if param.size < self.min_8bit_size:
            return jnp.zeros_like(param, dtype=jnp.float32)
        zero = 127 if self.signed else 0
        return Moment8bit(
            codes=jnp.full_like(param, zero, dtype=jnp.uint8),
            absmax=jnp.zeros([-(-param.size // self.block_size)], jnp.float32),
        )

    def encode(self, x: "Float32[Array, '*shape']", key: jax.Array | None) -> Moment:
        """Rounds to the nearest codes, or with a key stochastically."""
        if x.size < self.min_8bit_size:
            return x
        flat = x.reshape(-1)
        padding = -x.size % self.block_size
        blocks = jnp.pad(flat, (0, padding)).reshape(-1, self.block_size)
        absmax = jnp.max(jnp.abs(blocks), axis=1)
        empty = (absmax < _SMALLEST_ABSMAX)[:, None]
        unit = jnp.where(empty, 0.0, blocks / jnp.where(empty, 1.0, absmax[:, None]))
        noise = None if key is None else jax.random.uniform(key, unit.shape)
        codes = nearest_dynamic_code(unit, signed=self.signed, noise=noise)
        if self.signed:
            codes = keep_sign(codes, unit)
        return Moment8bit(codes.reshape(-1)[: x.size].reshape(x.shape), absmax)

    def decode(self, moment: Moment) -> "Float32[Array, '*shape']":
        """Undoes `encode`."""
        if not isinstance(moment, Moment8bit):
            return moment
        return dequantize_blockwise(
            moment.codes,
            moment.absmax,
            self._format,
            block_size=self.block_size,
        )


class ScaleByAdam8bitState(NamedTuple):
    """State of `scale_by_adam8bit`."""

    count: jax.typing.ArrayLike  # shape=(), dtype=jnp.int32.
    mu: Any  # Moment of each parameter
    nu: Any  # Moment of each parameter


class ScaleByLion8bitState(NamedTuple):
    """State of `scale_by_lion8bit`."""

    count: jax.typing.ArrayLike  # shape=(), dtype=jnp.int32.
    mu: Any  # Moment of each parameter


def scale_by_adam8bit(
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    *,
    block_size: int = 256,
    min_8bit_size: int = 4096,
    stochastic_rounding: bool = False,
    seed: int = 0,
) -> optax.GradientTransformation:
    """Rescales gradients by Adam's rule, with both moments in 8 bits.

    See `adam8bit` for the rule and the arguments.
    """
    first, second = _formats(block_size, min_8bit_size)

    def init_fn(params):
        return ScaleByAdam8bitState(
            count=jnp.zeros([], jnp.int32),
            mu=jax.tree.map(first.zeros, params),
            nu=jax.tree.map(second.zeros, params),
        )

    def update_fn(updates, state, params=None):
        del params
        count = optax.safe_increment(state.count)
        keys = _keys(updates, seed, count, 2) if stochastic_rounding else None
        correction1 = 1 - jnp.float32(b1) ** count
        correction2 = 1 - jnp.float32(b2) ** count
        kernel = None if stochastic_rounding else _kernel(block_size)
        if kernel:
            weights = b1, 1 - b1, b2, 1 - b2, 1 / correction1, 1 / correction2, eps
            factors = _stack(weights)

        def step(g, mu, nu, keys):
            if kernel and isinstance(mu, Moment8bit):
                fused = _fused(kernel.adam, g, factors, [mu, nu], [first, second])
                if fused is not None:
                    return fused
            g, finite = _finite(g)
            m = jnp.where(finite, b1 * first.decode(mu) + (1 - b1) * g, 0.0)
            v = jnp.where(finite, b2 * second.decode(nu) + (1 - b2) * g * g, 0.0)
            update = (m / correction1) / (jnp.sqrt(v / correction2) + eps)
            return update, first.encode(m, keys[0]), second.encode(v, keys[1])

        new_updates, mu, nu = _map(step, 3, updates, state.mu, state.nu, keys)
        return new_updates, ScaleByAdam8bitState(count, mu, nu)

    return optax.GradientTransformation(init_fn, update_fn)


def scale_by_lion8bit(
    b1: float = 0.9,
    b2: float = 0.99,
    *,
    block_size: int = 256,
    min_8bit_size: int = 4096,
    stochastic_rounding: bool = False,
    seed: int = 0,
) -> optax.GradientTransformation:
    """Rescales gradients by Lion's rule, with the momentum in 8 bits.

    See `lion8bit` for the rule and the arguments.
    """
    first, _ = _formats(block_size, min_8bit_size)

    def init_fn(params):
        return ScaleByLion8bitState(
            count=jnp.zeros([], jnp.int32), mu=jax.tree.map(first.zeros, params)
        )

    def update_fn(updates, state, params=None):
        del params
        count = optax.safe_increment(state.count)
        keys = _keys(updates, seed, count, 1) if stochastic_rounding else None
        kernel = None if stochastic_rounding else _kernel(block_size)
        if kernel:
            factors = _stack((b1, 1 - b1, b2, 1 - b2))

        def step(g, mu, keys):
            if kernel and isinstance(mu, Moment8bit):
                fused = _fused(kernel.lion, g, factors, [mu], [first])
                if fused is not None:
                    return fused
            g, finite = _finite(g)
            m = first.decode(mu)
            update = jnp.where(finite, jnp.sign(b1 * m + (1 - b1) * g), 0.0)
            m = jnp.where(finite, b2 * m + (1 - b2) * g, 0.0)
            return update, first.encode(m, keys[0])

        new_updates, mu = _map(step, 2, updates, state.mu, keys)
        return new_updates, ScaleByLion8bitState(count, mu)

    return optax.GradientTransformation(init_fn, update_fn)


def adam8bit(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    *,
    block_size: int = 256,
    min_8bit_size: int = 4096,
    stochastic_rounding: bool = False,
    seed: int = 0,
) -> optax.GradientTransformation:
    """Adam with both moments in 8 bits: 2.03 bytes of state a parameter.

    Each step decodes the moments, does Adam's step in float32 and encodes them again;
    the update uses the new moments as they were before rounding:

        m = b1 * decode(mu) + (1 - b1) * g
        v = b2 * decode(nu) + (1 - b2) * g**2
        update = -learning_rate * (m / (1 - b1**t)) / (sqrt(v / (1 - b2**t)) + eps)
        mu, nu = encode(m), encode(v)

    Moments are encoded in blocks of `block_size` numbers over the flattened parameter,
    as the nearest number of the dynamic map (signed for m, unsigned for v) times the
    largest magnitude of the block. A negative m that would round to zero becomes the
    smallest negative number. Where a gradient is not finite, both moments become zero
    and the parameter stays, so that one bad number does not spoil its block.

    On one Hopper GPU a step of a parameter with a multiple of 4 numbers is one kernel,
    for blocks of 256 and rounding to the nearest; elsewhere it is XLA's, with the same
    state.

    Args:
        learning_rate: a number or a schedule.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root of the second moment.
        block_size: numbers that share an absmax (float32).
        min_8bit_size: parameters with fewer numbers have float32 moments.
        stochastic_rounding: round up with the probability that keeps the expected
            value; the noise depends on `seed`, the step and the place of the parameter.
        seed: of the noise.

    Returns:
        The transformation; gradients and parameters may have any floating type.

    Raises:
        ValueError: if `block_size` is not positive or `min_8bit_size` is negative.

    Source: Dettmers et al. 2022 (https://arxiv.org/abs/2110.02861); bitsandbytes'
    `Adam8bit`.
    """
    return optax.chain(
        scale_by_adam8bit(
            b1,
            b2,
            eps,
            block_size=block_size,
            min_8bit_size=min_8bit_size,
            stochastic_rounding=stochastic_rounding,
            seed=seed,
        ),
        optax.scale_by_learning_rate(learning_rate),
    )


def adamw8bit(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    *,
    mask: Any = None,
    block_size: int = 256,
    min_8bit_size: int = 4096,
    stochastic_rounding: bool = False,
    seed: int = 0,
) -> optax.GradientTransformation:
    """AdamW with both moments in 8 bits: 2.03 bytes of state a parameter.

    The rule of `adam8bit`, and the parameter decays by `learning_rate * weight_decay`.
    The decay takes the parameter before the step, as optax and torch have it;
    bitsandbytes decays it after the step, which differs by the square of the rate.

    Args:
        learning_rate: a number or a schedule.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root of the second moment.
        weight_decay: bitsandbytes' default, 1e-2 (optax has 1e-4).
        mask: which parameters decay, as in `optax.adamw`.
        block_size: numbers that share an absmax (float32).
        min_8bit_size: parameters with fewer numbers have float32 moments.
        stochastic_rounding: see `adam8bit`.
        seed: of the noise.

    Returns:
        The transformation; its `update` needs the parameters.

    Raises:
        ValueError: if `block_size` is not positive or `min_8bit_size` is negative.
    """
    return optax.chain(
        scale_by_adam8bit(
            b1,
            b2,
            eps,
            block_size=block_size,
            min_8bit_size=min_8bit_size,
            stochastic_rounding=stochastic_rounding,
            seed=seed,
        ),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def lion8bit(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.99,
    weight_decay: float = 0.0,
    *,
    mask: Any = None,
    block_size: int = 256,
    min_8bit_size: int = 4096,
    stochastic_rounding: bool = False,
    seed: int = 0,
) -> optax.GradientTransformation:
    """Lion with its momentum in 8 bits: 1.02 bytes of state a parameter.

        update = -learning_rate * (sign(b1 * m + (1 - b1) * g) + weight_decay * p)
        m = b2 * m + (1 - b2) * g

    Args:
        learning_rate: a number or a schedule; about a tenth of Adam's.
        b1: weight of the momentum in the update.
        b2: decay of the momentum.
        weight_decay: bitsandbytes' default, 0 (optax has 1e-3).
        mask: which parameters decay, as in `optax.lion`.
        block_size: numbers that share an absmax (float32).
        min_8bit_size: parameters with fewer numbers have a float32 momentum.
        stochastic_rounding: see `adam8bit`.
        seed: of the noise.

    Returns:
        The transformation; its `update` needs the parameters.

    Raises:
        ValueError: if `block_size` is not positive or `min_8bit_size` is negative.

    Source: Chen et al. 2023 (https://arxiv.org/abs/2302.06675); bitsandbytes'
    `Lion8bit`.
    """
    return optax.chain(
        scale_by_lion8bit(
            b1,
            b2,
            block_size=block_size,
            min_8bit_size=min_8bit_size,
            stochastic_rounding=stochastic_rounding,
            seed=seed,
        ),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def _formats(block_size: int, min_8bit_size: int) -> tuple[MomentFormat, MomentFormat]:
    """The formats of a moment with a sign, and of one without."""
    if block_size < 1:
        raise ValueError(f"{block_size=} numbers must be positive; 256 is usual.")
    if min_8bit_size < 0:
        raise ValueError(f"{min_8bit_size=} numbers must not be negative.")
    return (
        MomentFormat(True, block_size, min_8bit_size),
        MomentFormat(False, block_size, min_8bit_size),
    )


def _kernel(block_size: int) -> Any:
    """The module of the fused step, or None where the device or blocks are others.

    A kernel is not partitioned, so with several devices the compiler's form is used.
    """
    if not tuning.has_one_hopper():
        return None
    from pallas_kernels import eightbit_kernel  # the GPU part of Pallas

    return eightbit_kernel if block_size == eightbit_kernel.BLOCK_SIZE else None


def _stack(factors: Any) -> jax.Array:
    return jnp.stack([jnp.asarray(factor, jnp.float32) for factor in factors])


def _fused(
    kernel: Any,
    g: jax.Array,
    factors: jax.Array,
    moments: list[Moment8bit],
    formats: list[MomentFormat],
) -> tuple | None:
    """The update and the moments by a kernel, or None if it cannot do these."""
    pairs = [(moment.codes, moment.absmax) for moment in moments]
    codebooks = tuple(format.codebook for format in formats)
    try:
        update, pairs = kernel(g, factors, pairs, codebooks)
    except NotImplementedError:
        return None
    return update, *(Moment8bit(*pair) for pair in pairs)


def _finite(g: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The gradient in float32, zero where it is not finite, and where it is."""
    g = g.astype(jnp.float32)
    finite = jnp.isfinite(g)
    return jnp.where(finite, g, 0.0), finite


def _keys(tree: Any, seed: int, count: Any, moments: int) -> list:
    """Keys for each leaf and moment, other ones each step and none in the state."""
    leaves = len(jax.tree.leaves(tree))
    key = jax.random.fold_in(jax.random.key(seed), count)
    return list(jax.random.split(key, (leaves, moments)))


def _map(fn, results: int, updates: Any, *moments: Any) -> list[Any]:
    """Maps a step over leaves; its first result gets the type of the gradient."""
    *trees, keys = moments
    leaves, treedef = jax.tree.flatten(updates)
    columns = [treedef.flatten_up_to(tree) for tree in trees]
    keys = keys if keys is not None else [[None] * results] * len(leaves)
    rows = [fn(*row) for row in zip(leaves, *columns, keys, strict=True)]
    new_updates = [row[0].astype(g.dtype) for row, g in zip(rows, leaves, strict=True)]
    outputs = [new_updates, *([row[i] for row in rows] for i in range(1, results))]
    return [treedef.unflatten(output) for output in outputs]

"""Float32 master weights in the optimizer's state, low-precision parameters outside."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class MasterState(NamedTuple):
    """State of `with_master`."""

    count: jax.typing.ArrayLike  # shape=(), dtype=jnp.int32.
    master: Any  # float32 copies; None where the parameter is its own master
    inner: optax.OptState


def with_master(
    inner: optax.GradientTransformation,
    *,
    stochastic_rounding: bool = False,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Keeps float32 masters of bfloat16 parameters in the optimizer's state.

    Each step is the inner optimizer's step on the masters, with the gradients in
    float32; the parameters become the masters rounded to their own type:

        master = master + inner(float32(g), master)
        update = round(master) - param

    A step too small for bfloat16 is not lost: it adds up in the master. With
    `paged(with_master(inner))` the masters leave the device too, and a parameter costs
    it 2 bytes, its gradient 2.

    The update is float32, so that `optax.apply_updates` lands on the rounded master,
    to the last bit unless a parameter changes by more than 2**16 times its new value;
    the next step makes up for what was missed.

    Args:
        inner: the optimizer of the masters.
        stochastic_rounding: round a master up with the probability that makes its
            expected value the master (bfloat16 only); the noise depends on `seed`, the
            step and the place of the parameter.
        seed: of the noise.

    Returns:
        The transformation. Parameters of 32 bits and more, and integers, have no master
        and go to `inner` as they are.

    Raises:
        ValueError: in `update`, if the parameters are not given.
        NotImplementedError: if stochastic rounding meets a type other than bfloat16.
    """
    inner = optax.with_extra_args_support(inner)

    def init_fn(params):
        master = jax.tree.map(
            lambda p: jnp.array(p, jnp.float32, copy=True) if _is_low(p) else None,
            params,
        )
        return MasterState(
            count=jnp.zeros([], jnp.int32),
            master=master,
            inner=inner.init(_resolve(master, params)),
        )

    def update_fn(updates, state, params=None, **extra_args):
        if params is None:
            raise ValueError(
                "with_master rounds the masters to the parameters' types: call "
                "update(grads, state, params)."
            )
        count = optax.safe_increment(state.count)
        master = _resolve(state.master, params)
        grads = jax.tree.map(
            lambda g, p: g.astype(jnp.float32) if _is_low(p) else g, updates, params
        )
        steps, inner_state = inner.update(grads, state.inner, master, **extra_args)
        leaves, treedef = jax.tree.flatten(params)
        keys = [None] * len(leaves)
        if stochastic_rounding:
            key = jax.random.fold_in(jax.random.key(seed), count)
            keys = list(jax.random.split(key, len(leaves)))
        new_masters, new_updates = [], []
        for p, old, step, key in zip(
            leaves,
            treedef.flatten_up_to(master),
            treedef.flatten_up_to(steps),
            keys,
            strict=True,
        ):
            if not _is_low(p):
                new_masters.append(None)
                new_updates.append(step)
                continue
            new = old + step.astype(jnp.float32)
            rounded = new.astype(p.dtype) if key is None else _round(new, p.dtype, key)
            new_masters.append(new)
            new_updates.append(rounded.astype(jnp.float32) - p.astype(jnp.float32))
        state = MasterState(count, treedef.unflatten(new_masters), inner_state)
        return treedef.unflatten(new_updates), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _is_low(p: jax.Array) -> bool:
    """Whether a parameter is floating point of fewer than 32 bits."""
    return jnp.issubdtype(p.dtype, jnp.floating) and p.dtype.itemsize < 4


def _resolve(master: Any, params: Any) -> Any:
    """The masters, and the parameters where there is none."""
    leaves, treedef = jax.tree.flatten(params)
    masters = treedef.flatten_up_to(master)
    return treedef.unflatten(
        [p if m is None else m for p, m in zip(leaves, masters, strict=True)]
    )


def _round(x: jax.Array, dtype, key: jax.Array) -> jax.Array:
    """Rounds float32 to bfloat16, up with the probability of the part cut off."""
    if dtype != jnp.bfloat16:
        raise NotImplementedError(
            f"Stochastic rounding is to bfloat16, and a parameter is {dtype}; pass "
            "stochastic_rounding=False."
        )
    # bfloat16 is the upper half of float32: noise below it carries into it.
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    carried = (bits + noise) & jnp.uint32(0xFFFF0000)
    rounded = jax.lax.bitcast_convert_type(carried, jnp.float32)
    return jnp.where(jnp.isfinite(x), rounded, x).astype(jnp.bfloat16)

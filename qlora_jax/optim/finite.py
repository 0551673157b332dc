"""A step whose gradient is no number is not taken."""

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

if TYPE_CHECKING:
    from jaxtyping import Array, Int


class SkipNonfiniteState(NamedTuple):
    """State of `skip_nonfinite`."""

    skipped: "Int[Array, '']"
    inner: optax.OptState


def skip_nonfinite(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Leaves out the updates of gradients that hold an infinity or NaN.

        update, state = inner(gradient)   if the gradient's norm is finite
                        0, state before   otherwise

    optax's `apply_if_finite` lets such a gradient through after a number of them, and
    chooses by a branch, which makes one page of all of a paged state; here each leaf is
    chosen by itself, so that `paged(skip_nonfinite(inner))` pages as `inner` does.

    Args:
        inner: any optax transformation.

    Returns:
        The transformation; its state counts what was left out in `skipped`.
    """
    inner = optax.with_extra_args_support(inner)

    def init_fn(params):
        return SkipNonfiniteState(jnp.zeros([], jnp.int32), inner.init(params))

    def update_fn(updates, state, params=None, **extra_args):
        finite = jnp.isfinite(optax.tree.norm(updates))
        new_updates, new_inner = inner.update(
            updates, state.inner, params, **extra_args
        )

        def chosen(new: Any, old: Any) -> jax.Array:
            return jnp.where(finite, new, old)

        zeros = jax.tree.map(jnp.zeros_like, new_updates)
        skipped = state.skipped + (1 - finite.astype(jnp.int32))
        return jax.tree.map(chosen, new_updates, zeros), SkipNonfiniteState(
            skipped, jax.tree.map(chosen, new_inner, state.inner)
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)

"""What the backward pass recomputes, and how layers follow each other."""

from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from qlora_jax.models.offload import KeepingLayer, run_offloaded

# What is kept of a layer for the backward pass; the rest is recomputed.
#   none       what products and attention give, so that nothing that takes long is
#              computed twice: norms, rotations and the gate's nonlinearity are
#   full       its input; compiled one by one, of the last layer what `none` keeps
#   attention  its input and what attention gives; the last layer likewise
#   offload    its input, q, k, v and the residual stream in the middle, in the host's
#              memory; the MLP and attention itself are recomputed
Remat = Literal["none", "full", "attention", "offload"]

# Names that a layer gives by `checkpoint_name`. "low_rank" is what an adapter's first
# product gives, "factor" the rounded matrices of adapters: both are thin.
_ATTENTION = ("attention",)
_EXPENSIVE = (
    "qkv",
    "attention",
    "residual",
    "gate_up",
    "low_rank",
    "factor",
)

Layer = Callable[[Any, Any], Any]


def run_layers(
    layer: KeepingLayer, x: Any, stack: Any, *, remat: Remat, unroll: bool
) -> Any:
    """Applies stacked layers one after another.

    Args:
        layer: (x, slice of the stack, keep) -> x, which calls keep(value, name) with
            what may be kept, and goes on with what that returns.
        x: the input of the first one.
        stack: a tree of arrays [layers, ...].
        remat: what is kept for the backward.
        unroll: whether each layer is compiled by itself; else they are one loop, and
            those of "offload" always are.

    Raises:
        ValueError: if `remat` is unknown.
    """
    if remat == "offload":
        return run_offloaded(layer, x, stack)

    def named(x, slices):
        return layer(x, slices, checkpoint_name)

    # In a loop the backward is another loop, where nothing can be merged with the
    # forward: no need to prevent common subexpressions.
    body = _rematerialised(named, remat, prevent_cse=unroll)
    if not unroll:
        return lax.scan(lambda x, slices: (body(x, slices), None), x, stack)[0]
    leaves, treedef = jax.tree.flatten(stack)
    *others, last = zip(*map(_unstacked, leaves), strict=True)
    for slices in others:
        x = body(x, treedef.unflatten(slices))
    # The backward begins with the last layer, when what it would compute again has
    # only just been computed: to keep it takes no memory that is not needed anyway.
    return _rematerialised(named, "none", prevent_cse=True)(x, treedef.unflatten(last))


def _unstacked(x: jax.Array) -> list[jax.Array]:
    """Slices of the first axis, whose gradients are put together by one copy."""
    return [part[0] for part in lax.split(x, [1] * x.shape[0])]


def _rematerialised(layer: Layer, remat: Remat, *, prevent_cse: bool) -> Layer:
    match remat:
        case "none":
            policy = _keep(_EXPENSIVE)
        case "full":
            policy = None
        case "attention":
            policy = _keep(_ATTENTION)
        case _:
            raise ValueError(f"{remat=} must be one of {', '.join(get_args(Remat))}.")
    return jax.checkpoint(layer, prevent_cse=prevent_cse, policy=policy)


def _keep(names: tuple[str, ...]) -> Callable[..., bool]:
    """A policy that keeps values of these names, and all that cuDNN's attention gives.

    Beside its output that is a sum for each query, without which the backward would
    compute the attention again.
    """
    by_name = jax.checkpoint_policies.save_only_these_names(*names)

    def policy(primitive, *args, **params) -> bool:
        attention = primitive.name.startswith("dot_product_attention_fwd")
        return attention or bool(by_name(primitive, *args, **params))

    return policy

"""LoRA+: a greater learning rate for the second factor."""

from typing import Any

import jax
import optax

from qlora_jax.quant.rules import leaf_path


def lora_plus(ratio: float = 16.0) -> optax.GradientTransformation:
    """Multiplies the updates of `b`, and of magnitudes, by a ratio.

    Chained after an optimizer it multiplies their learning rate, weight decay included:

        tx = optax.chain(optax.adamw(2e-4), lora_plus(16))

    Args:
        ratio: learning rate of `b` over that of `a`; the source takes 2^4.

    Returns:
        A stateless transformation of the trainable part of `split_trainable`.

    Raises:
        ValueError: if the ratio is not positive.

    Source: https://arxiv.org/abs/2402.12354; that magnitudes go with `b` is PEFT's way.
    """
    if ratio <= 0:
        raise ValueError(f"{ratio=} must be positive; 1 leaves the updates alone.")

    def faster(path: tuple[Any, ...], update: jax.Array) -> jax.Array:
        # A slice of a matrix, which `paged` may have cut, has a number as its name.
        names = reversed(leaf_path(path).split("/"))
        name = next((n for n in names if not n.isdigit()), "")
        return update * ratio if name in ("b", "magnitude") else update

    return optax.stateless(
        lambda updates, _: jax.tree_util.tree_map_with_path(faster, updates)
    )

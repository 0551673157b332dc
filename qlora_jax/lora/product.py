"""The adapted product of quantized weights, with a backward pass of its own.

    y_i = onto + x @ w_i + (x @ a_i) @ b_i · scale_i

A training step spends most of what its matmuls leave on passes over memory, so this is
written by what is read and written:

* The thin products of all adapters of one x are one, forward and backward.
* The adapter's part, and `onto`, is added by the base's product: the Hopper kernel has
  the one as further columns and the other on the way out, a library both on the way
  out. So are the parts of the gradient of x, one after another.
* Gradients of a and b leave their products in float32.
* Of x only its parts are kept, if it is computed: see `models.inputs`.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from qlora_jax.lora.transposed import transposed
from qlora_jax.over_rows import over_rows
from qlora_jax.quant import QuantizedTensor, quantized_matmul, transposed_product

# Any: a leaf is an array or a tracer.
Leaf = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Whole:
    """An array as the input of a product; models have others, that are computed."""

    x: Leaf

    early: ClassVar[bool] = True
    keeps_low_rank: ClassVar[bool] = True

    def whole(self) -> Leaf:
        """The array."""
        return self.x

    def project_transposed(self, dh: Leaf) -> Leaf:
        """Its transpose times dh, over all rows, in float32."""
        return over_rows(self.x, dh)

    def pull(self, d: Leaf) -> "Whole":
        """The gradient of the array."""
        return Whole(d)


def adapted_products(
    x: Any,
    bases: Sequence[QuantizedTensor],
    a: Sequence[Leaf],
    b: Sequence[Leaf],
    *,
    scales: Sequence[float],
    onto: Leaf = None,
    name: str | None = None,
) -> list[Leaf]:
    """Returns onto + x @ w_i + (x @ a_i) @ b_i · scale_i for each weight.

    Args:
        x: [*batch, k], or a value of a model that has `whole`, `early`,
            `keeps_low_rank` and either `project_transposed` and `pull` or, not early,
            `pull_with_whole`; see `models.inputs`.
        bases: the weights w_i [k, n_i], frozen.
        a: [k, r_i], of any float type; rounded to that of x.
        b: [r_i, n_i].
        scales: what each product a @ b is multiplied by.
        onto: [*batch, n], what the one product is added to, or None.
        name: of `checkpoint_name`, for what is multiplied out; None for no name.

    Returns:
        Arrays [*batch, n_i] of the type of x.
    """
    if onto is not None and len(bases) > 1:
        raise ValueError(f"{len(bases)} products cannot be added to one array.")
    given = x if hasattr(x, "whole") else Whole(x)
    static = (tuple(scales), name, tuple(one.dtype for one in (*a, *b)))
    return _products(static, given, onto, list(bases), list(a), list(b))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _products(static, x, onto, bases, a, b):
    return _products_fwd(static, x, onto, bases, a, b)[0]


def _products_fwd(static, x, onto, bases, a, b):
    scales, name, _ = static
    named = lambda y: y if name is None else checkpoint_name(y, name)
    whole = x.whole()
    dtype, batch = whole.dtype, whole.shape[:-1]
    # The scale goes onto b in float32. Rounded factors and thin products are little,
    # and what a policy of rematerialisation had better keep.
    a = checkpoint_name(jnp.concatenate([one.astype(dtype) for one in a], -1), "factor")
    b = [(one * s).astype(dtype) for one, s in zip(b, scales, strict=True)]
    b = [checkpoint_name(one, "factor") for one in b]
    # Rows from here on: XLA makes one product of a product and what is added to it
    # where both are matrices.
    whole, onto = _rows(whole), None if onto is None else _rows(onto)
    h = checkpoint_name(whole @ a, "low_rank")
    ys = []
    for w, part, one in zip(bases, _split(h, b), b, strict=True):
        y = quantized_matmul(
            whole, _after(whole, w), addend=(part, transposed(one)), onto=onto
        )
        ys.append(named(y).reshape(*batch, -1))
    return ys, (x, bases, a, b, h if x.keeps_low_rank else None, onto is None)


def _products_bwd(static, residuals, dys):
    scales, _, dtypes = static
    x, bases, a, b, h, alone = residuals
    batch, rows = dys[0].shape[:-1], [_rows(dy) for dy in dys]
    dh = jnp.concatenate([dy @ one.T for dy, one in zip(rows, b, strict=True)], axis=-1)
    (dy, w), *others = zip(rows, bases, strict=True)
    dx = transposed_product(dy, _after(dy, w), addend=(dh, a))
    for dy, w in others:
        dx = transposed_product(dy, _after(dy, w), onto=dx)
    dx, dh = (one.reshape(*batch, -1) for one in (dx, dh))
    if x.early:
        da = x.project_transposed(dh)
    else:
        dx, whole = x.pull_with_whole(dx)
        da = over_rows(whole, dh)
        h = _rows(whole) @ a if h is None else h
    da = _split(da, b)
    pairs = zip(_split(h, b), rows, strict=True)
    db = [over_rows(part, dy) for part, dy in pairs]
    db = [one * scale for one, scale in zip(db, scales, strict=True)]
    da, db = (
        [one.astype(dtype) for one, dtype in zip(ones, types, strict=True)]
        for ones, types in ((da, dtypes[: len(da)]), (db, dtypes[len(da) :]))
    )
    # Nothing waits for the gradients of a and b, so a compiler may leave them to the
    # end, and keep in memory until then what they are computed from: the activations
    # of every layer. So the gradient of x waits for them.
    dx, da, db = lax.optimization_barrier((dx, da, db))
    return x.pull(dx) if x.early else dx, None if alone else dys[0], None, da, db


_products.defvjp(_products_fwd, _products_bwd)


def _after(x: Leaf, w: QuantizedTensor) -> QuantizedTensor:
    """The weight, which nothing may look at before x is there.

    A weight that is decoded to memory first had better not be long before it is needed.
    """
    if w.layer is None:
        return w
    return dataclasses.replace(w, layer=lax.optimization_barrier((w.layer, x))[0])


def _split(x: Leaf, b: list[Leaf]) -> list[Leaf]:
    """The columns of each adapter."""
    return jnp.split(x, np.cumsum([len(one) for one in b])[:-1], axis=-1)


def _rows(x: Leaf) -> Leaf:
    return x.reshape(-1, x.shape[-1])

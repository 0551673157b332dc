"""The adapted product of quantized weights, with a backward pass of its own.

    y_i = onto + x @ w_i + (x @ a_i) @ b_i · scale_i

A training step spends most of what its matmuls leave on passes over memory, so this is
written by what is read and written:

* The thin products of all adapters of one x are one, forward and backward.
* Where weights are decoded first, those of one x are decoded under each other and
  multiplied by in one product. If y is wide, [x h] is multiplied by [w b], since h is
  thin: the adapter's part then costs neither a write nor a read of y.
* Elsewhere the adapter's part (and `onto`) is what the base's product adds to: the
  library does that on the way out.
* Gradients of a and b leave their products in float32.
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

from qlora_jax.quant import (
    QuantizedTensor,
    are_decoded_first,
    stacked,
    transposed_product,
)

# Any: a leaf is an array or a tracer.
Leaf = Any

# Operations of a product in the time of a byte of memory's (an H200's: 750e12 a second
# and 4.2e12).
_OPERATIONS_A_BYTE = 180


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Whole:
    """An array as the input of a product; models have others, that are computed."""

    x: Leaf

    early: ClassVar[bool] = True

    def whole(self) -> Leaf:
        """The array."""
        return self.x

    def project(self, a: Leaf) -> Leaf:
        """The product with a thin a."""
        return self.x @ a

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
        x: [*batch, k], or a value of a model that has `whole`, `project`,
            `project_transposed` and `pull`.
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
    h = checkpoint_name(x.project(a), "low_rank")
    residuals = (x, bases, a, b, h, onto is None)
    if not are_decoded_first(bases, whole):
        parts = _split(h, [len(one) for one in b])
        ys = [
            named(whole @ w + _added(onto, part @ one))
            for w, part, one in zip(bases, parts, b, strict=True)
        ]
        return ys, residuals
    # Rows from here on: XLA makes one product of a product and what is added to it
    # where both are matrices, and the first operand of the sum is the product.
    whole, h = _rows(whole), _rows(h)
    spread = _spread(b)
    if onto is None and _extends(spread.shape[1], whole.shape[1], h.shape[1]):
        weight = stacked(bases, dtype, beside=spread.T)
        y = _dot(jnp.concatenate([whole, h], axis=-1), weight, 1)
    else:
        added = _added(None if onto is None else _rows(onto), h @ spread)
        y = _dot(whole, stacked(bases, dtype), 1) + added
    y = named(y)
    ys = _split(y, [one.shape[1] for one in b])
    return [one.reshape(*batch, -1) for one in ys], residuals


def _products_bwd(static, residuals, dys):
    scales, _, dtypes = static
    x, bases, a, b, h, alone = residuals
    shape = (*h.shape[:-1], len(a))
    k, ranks, widths = len(a), [len(one) for one in b], [w.shape[1] for w in bases]
    decoded_first = are_decoded_first(bases, dys[0])
    h, rows = _rows(h), [_rows(dy) for dy in dys]
    if decoded_first and sum(widths) < (len(widths) - 1) * k:
        # Narrow: to put them together is less than to add up what each would give.
        dy, spread = jnp.concatenate(rows, axis=-1), _spread(b)
        dh = dy @ spread.T
        blocks = _split(over_rows(h, dy), ranks, axis=0)
        db = [_split(block, widths)[i] for i, block in enumerate(blocks)]
        dx = [_dx(dy, dh, bases, a)]
    else:
        dh = jnp.concatenate(
            [dy @ one.T for dy, one in zip(rows, b, strict=True)], axis=-1
        )
        pairs = zip(_split(h, ranks), rows, strict=True)
        db = [over_rows(part, dy) for part, dy in pairs]
        if decoded_first and len(rows) == 1:
            dx = [_dx(rows[0], dh, bases, a)]
        else:
            dx = [dh @ a.T]
            dx += [transposed_product(dy, w) for dy, w in zip(rows, bases, strict=True)]
    if decoded_first:
        dx = [_sum(dx)]
    db = [one * scale for one, scale in zip(db, scales, strict=True)]
    dh = dh.reshape(*shape[:-1], -1)
    if not x.early:
        dx = x.pull(_sum(dx).reshape(shape))
    da = _split(x.project_transposed(dh), ranks)
    da, db = (
        [one.astype(dtype) for one, dtype in zip(ones, types, strict=True)]
        for ones, types in ((da, dtypes[: len(da)]), (db, dtypes[len(da) :]))
    )
    # Nothing waits for the gradients of a and b, so a compiler may leave them to the
    # end, and keep in memory until then what they are computed from: the activations
    # of every layer. So the gradient of x waits for them.
    dx, da, db = lax.optimization_barrier((dx, da, db))
    if x.early:
        dx = x.pull(_sum(dx).reshape(shape))
    return dx, None if alone else dys[0], None, da, db


_products.defvjp(_products_fwd, _products_bwd)


def _dx(dy: Leaf, dh: Leaf, bases: list[QuantizedTensor], a: Leaf) -> Leaf:
    """Returns dy @ [w_0 w_1 ...]ᵀ + dh @ aᵀ, the weights decoded."""
    if _extends(len(a), dy.shape[-1], dh.shape[-1]):
        weight = stacked(bases, dy.dtype, below=a.T)
        return _dot(jnp.concatenate([dy, dh], axis=-1), weight, 0)
    return _dot(dy, stacked(bases, dy.dtype), 0) + dh @ a.T


def _extends(n: int, k: int, r: int) -> bool:
    """Whether a product [m, k] to [m, n] had better be of [m, k + r].

    The other way is to write m · n results of the thin product and read them again;
    this one copies m · k numbers and computes m · n · r more products. Rows have to
    begin at 16 bytes.
    """
    return r % 8 == 0 and 4 * n > 4 * k + 2 * n * r / _OPERATIONS_A_BYTE


def _spread(b: list[Leaf]) -> Leaf:
    """[sum of r, sum of n], each b in its block of rows and columns."""
    if len(b) == 1:
        return b[0]
    return jax.scipy.linalg.block_diag(*b)


def _added(onto: Leaf, y: Leaf) -> Leaf:
    return y if onto is None else onto + y


def _split(x: Leaf, sizes: Sequence[int], axis: int = -1) -> list[Leaf]:
    return jnp.split(x, np.cumsum(sizes)[:-1], axis=axis) if len(sizes) > 1 else [x]


def _rows(x: Leaf) -> Leaf:
    return x.reshape(-1, x.shape[-1])


def _sum(terms: list[Leaf]) -> Leaf:
    """Their sum from the first one on, each as the first operand."""
    return functools.reduce(lambda total, term: term + total, terms)


def _dot(x: Leaf, w: Leaf, contract: int) -> Leaf:
    """X times w, of which axis `contract` is the one that is summed over."""
    return lax.dot_general(x, w, (((1,), (contract,)), ((), ())))


def over_rows(x: Leaf, y: Leaf) -> Leaf:
    """xᵀ @ y, summed over all leading axes, in float32."""
    rows = tuple(range(x.ndim - 1))
    contract = ((rows, rows), ((), ()))
    return lax.dot_general(x, y, contract, preferred_element_type=jnp.float32)

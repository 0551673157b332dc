"""The adapted weight: a frozen weight, a low-rank product, and `x @ w` over both."""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from qlora_jax.lora.forms import KernelForm
from qlora_jax.lora.low_rank import (
    Product,
    low_rank,
    low_rank_onto,
    low_rank_together,
)
from qlora_jax.lora.product import adapted_products
from qlora_jax.quant import QuantizedTensor

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Key, Shaped

# Any: a leaf is an array, a tracer, a ShapeDtypeStruct, another weight, an
# nnx.Variable that holds one of them or, inside a tree map, anything.
Leaf = Any

# The adapters' Variable type is Flax's own, so that filters written for it still hold.
LoRAParam = nnx.LoRAParam


class Frozen(nnx.Variable):
    """A Variable that is not trained: the base weight under an adapter."""


def unwrapped(leaf: Leaf) -> Leaf:
    """Returns what an nnx.Variable holds; anything else as it is."""
    return leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class LoraTensor:
    """A weight of shape [*stack, in, out] with a low-rank adapter beside it.

        x @ lt = x @ w + (dropout(x) @ a @ b) * scale
        scale  = alpha / rank,  or alpha / sqrt(rank) if rslora

    With a `magnitude` (DoRA) the columns of the adapted weight are rescaled,

        x @ lt = (magnitude / |w + scale * a @ b|) * (the sum above)

    where |.| is the norm of each column, a constant to differentiation. Unlike the
    form of PEFT, dropout then falls on the adapter alone, not on x @ w.

    The adapter's leaves are float32 masters, rounded to the dtype of `x` where they
    are used. While `b` is zero the result equals `x @ w` bit for bit.

    Leaves, each an array or, inside an NNX module, a Variable that holds it:

    * `w`: the frozen base, anything that supports `x @ w` and has a shape [*stack, in,
      out]. Gradients with respect to it are whatever its own matmul gives; it is meant
      to be held apart by `split_trainable`.
    * `a`: [*stack, in, rank]; `b`: [*stack, rank, out]. Several adapters on one base:
      [*stack, adapters, in, rank] and [*stack, adapters, rank, out].
    * `key`: typed PRNG keys [*stack], or None: no dropout. The mask is a function of
      the key and the shape of `x` alone; the backward pass computes it again instead
      of storing it, with or without rematerialisation.
    * `ids`: int32 [*stack, rows] or [*stack]: which adapter each row (index of the
      first axis of `x`), or the whole of `x`, uses; -1 is the base alone. An id that
      does not exist gives NaN. Needed exactly if there are several adapters.
    * `magnitude`: [*stack, out] or None; `square_norm`: [*stack, out], the squared
      norm of each column of `w`, given with it.
    * `merged`: None, or the adapted weight made whole (`merge_lora(keep_base=True)`),
      of which `x @ merged` is then the result.

    Static: `alpha`; `dropout`, the rate, in [0, 1), which is rounded to a multiple of
    1/256; `rslora`; `form`, how the kernel of a layer was laid out as this matrix, or
    None if it was one. They never depend on the stack axes, so that a slice of a scan
    describes itself truly.
    """

    w: Leaf
    a: Leaf
    b: Leaf
    key: Leaf = None
    ids: Leaf = None
    magnitude: Leaf = None
    square_norm: Leaf = None
    merged: Leaf = None
    alpha: float = dataclasses.field(default=16.0, metadata={"static": True})
    dropout: float = dataclasses.field(default=0.0, metadata={"static": True})
    rslora: bool = dataclasses.field(default=False, metadata={"static": True})
    form: KernelForm | None = dataclasses.field(default=None, metadata={"static": True})

    # Makes `numpy_array @ lt` reach __rmatmul__ below.
    __array_ufunc__ = None

    @property
    def shape(self) -> tuple[int, ...]:
        """[*stack, in, out], the shape of the base."""
        return tuple(unwrapped(self.w).shape)

    @property
    def ndim(self) -> int:
        """The number of axes of the base."""
        return len(self.shape)

    @property
    def dtype(self) -> Any:
        """The dtype of the base."""
        return unwrapped(self.w).dtype

    @property
    def rank(self) -> int:
        """The inner dimension of the adapter."""
        return unwrapped(self.a).shape[-1]

    @property
    def scale(self) -> float:
        """What the product a @ b is multiplied by."""
        return scale_of(self.rank, self.alpha, self.rslora)

    @property
    def rowwise(self) -> bool:
        """Whether `x @ self` treats a row of x alike wherever it stands."""
        by_row = self.ids is not None and unwrapped(self.ids).ndim > 0
        return not by_row and (self.key is None or not self.dropout)

    @property
    def num_adapters(self) -> int | None:
        """How many adapters are stacked, or None if there is the one."""
        a = unwrapped(self.a)
        return a.shape[-3] if len(a.shape) == self.ndim + 1 else None

    def at_layer(self, layer: "Array | int") -> "LoraTensor":
        """Returns a view of one layer of the stack; a quantized base is not sliced.

        Args:
            layer: the index, a number or an int32 scalar (which may be traced).

        Raises:
            ValueError: unless there is exactly one stack axis.
        """
        if self.ndim != 3:
            raise ValueError(f"at_layer takes a weight with one stack axis: {self!r}.")
        whole = {"w": unwrapped(self.w), "merged": unwrapped(self.merged)}
        held = {
            name: w.at_layer(layer)
            for name, w in whole.items()
            if hasattr(w, "at_layer")
        }
        rest = dataclasses.replace(self, **dict.fromkeys(held))
        return dataclasses.replace(jax.tree.map(lambda x: x[layer], rest), **held)

    def __getitem__(self, index) -> "LoraTensor":
        """Slices the stack axes; `...`, as Flax reads variables, is all of it."""
        if index is Ellipsis:
            return self
        if self.ndim == 2:
            raise IndexError(f"Only stack axes can be indexed; this is {self!r}.")
        return jax.tree.map(lambda x: x[index], self)

    def __repr__(self) -> str:
        # Inside a tree map the leaves may be anything.
        if not hasattr(unwrapped(self.a), "shape") or not hasattr(self.w, "shape"):
            names = [field.name for field in dataclasses.fields(self)]
            return f"LoraTensor({', '.join(f'{n}={getattr(self, n)}' for n in names)})"
        options = [f"rank={self.rank}", f"alpha={self.alpha:g}"]
        if self.dropout:
            options.append(f"dropout={self.dropout:g}")
        if self.rslora:
            options.append("rslora=True")
        if self.magnitude is not None:
            options.append("dora=True")
        if self.num_adapters is not None:
            options.append(f"adapters={self.num_adapters}")
        if self.merged is not None:
            options.append("merged=True")
        base = unwrapped(self.w)
        kind = f"{type(base).__name__} {base.dtype}"
        return f"LoraTensor({list(self.shape)}, {', '.join(options)}, w={kind})"

    def __rmatmul__(
        self, x: "Float[Array, '*batch in']"
    ) -> "Float[Array, '*batch out']":
        return self.multiply(jnp.asarray(x))

    def multiply(
        self,
        x: "Float[Array, '*batch in']",
        product: Product = operator.matmul,
        project: Product | None = None,
        expand: Product = operator.matmul,
    ) -> "Float[Array, '*batch out']":
        """Returns `x @ self`, with the multiplications as a layer does them.

        Args:
            x: activations, beginning with the stack axes if there are any.
            product: instead of `x @ w` with the base (or with what was merged).
            project: instead of `x @ a`; the last axis of x may then be another.
            expand: instead of the product of that with b.

        Raises:
            ValueError: if x, adapters and ids do not fit together.
        """
        if stack := self.shape[:-2]:
            if x.shape[: len(stack)] != stack or x.ndim == len(stack):
                raise ValueError(
                    f"x of shape {list(x.shape)} must begin with the stack axes "
                    f"{list(stack)} of {self!r}; for one x through all layers, scan "
                    "over the stack."
                )
            one = lambda x, lt: lt.multiply(x, product, project, expand)
            return jax.vmap(one)(x, self)
        self._check(x, projected=project is not None)
        if self.merged is not None:
            return product(x, unwrapped(self.merged))
        w, a, b = unwrapped(self.w), unwrapped(self.a), unwrapped(self.b)
        key = self.key if self.dropout else None
        options = dict(scale=self.scale, rate=self.dropout)
        own = project is None and product is operator.matmul and expand is product
        if own and self.ids is None and isinstance(w, QuantizedTensor):
            y = _saving_products(low_rank_onto, **options)(x, w, a, b, key)
        else:
            project = operator.matmul if project is None else project
            products = dict(project=project, expand=expand)
            adapter = _saving_products(low_rank, **products, **options)
            y = product(x, w)
            y = y + adapter(x, a, b, key, self.ids).astype(y.dtype)
        if self.magnitude is not None:
            y = y * self._column_ratio(w, a, b * self.scale, x.dtype).astype(y.dtype)
        return y

    @staticmethod
    def multiply_together(
        x: Any,
        weights: "Sequence[LoraTensor]",
        onto: Leaf = None,
        name: str | None = None,
    ) -> list[Leaf]:
        """Returns `onto + x @ w` for each weight, computed together as far as it pays.

            [h1 h2 ...] = x @ [a1 a2 ...];    y_i = onto + x @ w_i + h_i @ b_i * scale_i

        q, k and v, or gate and up, have one input. So have their gradients: with
        respect to x, all adapters add one product. See `adapted_products`.

        Args:
            x: activations [*batch, in], or a value with `whole` that computes them.
            weights: without stack axes.
            onto: what the product is added to, or None; with one weight alone.
            name: of `checkpoint_name`, for the products; None for no name.
        """
        plain = all(w._is_plain() for w in weights)
        quantized = [isinstance(unwrapped(w.w), QuantizedTensor) for w in weights]
        if plain and all(quantized):
            # Its shape and type are checked; nothing is computed where this is traced.
            shape = jax.eval_shape(lambda x: x.whole(), x) if hasattr(x, "whole") else x
            for w in weights:
                w._check(shape, projected=False)
            bases, a, b = (
                [unwrapped(getattr(w, leaf)) for w in weights] for leaf in "wab"
            )
            scales = [w.scale for w in weights]
            return adapted_products(x, bases, a, b, scales=scales, onto=onto, name=name)
        x = x.whole() if hasattr(x, "whole") else x
        ys = _together(x, weights) if plain else [x @ w for w in weights]
        ys = [y if onto is None else onto + y for y in ys]
        return [y if name is None else checkpoint_name(y, name) for y in ys]

    def _is_plain(self) -> bool:
        """Whether there is nothing but `x @ w + x @ a @ b * scale` to be computed."""
        random = self.key is not None and self.dropout
        special = (self.ids, self.magnitude, self.merged)
        return not random and all(leaf is None for leaf in special) and self.ndim == 2

    def _check(self, x: Leaf, projected: bool) -> None:
        if not projected and (x.ndim == 0 or x.shape[-1] != self.shape[0]):
            raise ValueError(
                f"The last axis of x, of shape {list(x.shape)}, must be the first of "
                f"the weight, {list(self.shape)}."
            )
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(
                f"x is {x.dtype} and the adapter computes in the dtype of x: cast x "
                "to a floating type."
            )
        several, ids = self.num_adapters, self.ids
        if several is not None and ids is None:
            raise ValueError(
                f"The weight holds {several} adapters and no ids: give "
                "join_trainable(..., adapter_ids=...)."
            )
        if several is None and ids is not None:
            raise ValueError(
                "adapter_ids were given and the weight holds one adapter: stack "
                "several with stack_adapters, or leave the ids out."
            )
        if ids is not None and ids.ndim and (x.ndim < 2 or x.shape[0] != len(ids)):
            raise ValueError(
                f"There are {len(ids)} adapter ids and x has shape {list(x.shape)}: "
                "the first axis of x must be the rows that the ids are for."
            )
        if several is not None and self.magnitude is not None:
            raise NotImplementedError(
                "Several DoRA adapters in one call: each has its own column norms. "
                "Merge them, or join them one at a time."
            )

    def _column_ratio(self, w: Leaf, a: Leaf, b: Leaf, dtype: Any) -> Leaf:
        """Magnitude / |w + a @ b| by column, without forming the sum.

        |w + a b|² = |w|² + 2 Σ_r b ∘ (aᵀ w) + Σ_r b ∘ (aᵀ a b), so that the base is
        only ever used as `x @ w`, here with the rank rows of aᵀ for x.
        """
        a, b = jax.lax.stop_gradient((a, b))
        cross = (a.T.astype(dtype) @ w).astype(b.dtype)
        exact = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
        square = (b * (2 * cross + exact(exact(a.T, a), b))).sum(0)
        norm = jnp.sqrt(unwrapped(self.square_norm) + square)
        # Without the barrier m / sqrt(s) becomes m * rsqrt(s), which is not 1 for a
        # zero adapter.
        return unwrapped(self.magnitude) / jax.lax.optimization_barrier(norm)


def _together(x: Leaf, weights: "Sequence[LoraTensor]") -> list[Leaf]:
    """`x @ w` for each weight, with one first product for all adapters."""
    for w in weights:
        w._check(x, projected=False)
    ys = [x @ unwrapped(w.w) for w in weights]
    adapters = _saving_products(low_rank_together, scales=[w.scale for w in weights])
    a, b = ([unwrapped(getattr(w, name)) for w in weights] for name in "ab")
    added = adapters(x, a, b)
    return [y + z.astype(y.dtype) for y, z in zip(ys, added, strict=True)]


def _saving_products(function: Callable, **options: Any) -> Callable:
    """A function of an adapter of which the backward pass keeps leaves and products.

    Not the mask, the dropped x, the masters rounded or the rows' copies of them. q, k
    and v then share the one x that they were given.
    """
    function = functools.partial(function, **options)
    return jax.checkpoint(function, policy=jax.checkpoint_policies.dots_saveable)


def scale_of(rank: int, alpha: float, rslora: bool) -> float:
    """Alpha / rank, or alpha / sqrt(rank) (rsLoRA, https://arxiv.org/abs/2312.03732)."""
    return alpha / math.sqrt(rank) if rslora else alpha / rank


def kaiming_uniform(
    key: "Key[Array, '']", shape: tuple[int, ...], dtype: Any = jnp.float32
) -> "Shaped[Array, '...']":
    """The initial `a` of LoRA, U(-1/sqrt(in), 1/sqrt(in)).

    Kaiming-uniform with slope sqrt(5), as PEFT draws it: the bound is
    sqrt(6 / ((1 + 5) in)).

    Args:
        key: a typed key.
        shape: [*stack, in, rank].
        dtype: of the result.

    Returns:
        An array of that shape.
    """
    bound = 1 / math.sqrt(shape[-2])
    return jax.random.uniform(key, shape, dtype, -bound, bound)

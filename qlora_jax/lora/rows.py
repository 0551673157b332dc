"""A table of tokens some rows of which are trained: embeddings and heads."""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from qlora_jax.lora.lora import Leaf, unwrapped

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class TrainedRows:
    """A table with an axis of tokens, frozen but for the rows of a few of them.

    It stands for `w` in which the rows `at` are `rows`, and is used as an embedding,
    `table[tokens]`, or as a head, `x @ table`. The table is never copied, nor is there
    a gradient of the whole of it.

    Leaves, each an array or, inside an NNX module, a Variable that holds it:

    * `w`: the frozen table, [tokens, features] or [features, tokens].
    * `rows`: what is trained, a float32 master: [n, features] or [features, n].
    * `at`: int32 [n], the tokens they are of, ascending.

    Static: `axis`, that of the tokens, 0 or 1.
    """

    w: Leaf
    rows: Leaf
    at: Leaf
    axis: int = dataclasses.field(default=0, metadata={"static": True})

    # Makes `numpy_array @ table` reach __rmatmul__ below.
    __array_ufunc__ = None

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the table."""
        return tuple(unwrapped(self.w).shape)

    @property
    def ndim(self) -> int:
        """The number of axes, 2."""
        return len(self.shape)

    @property
    def dtype(self) -> Any:
        """The dtype of the table, to which the rows are rounded where they are used."""
        return unwrapped(self.w).dtype

    @property
    def T(self) -> "TrainedRows":
        """The table with its axes swapped: what a tied head multiplies by."""
        leaves = unwrapped(self.w).T, unwrapped(self.rows).T, self.at
        return TrainedRows(*leaves, axis=1 - self.axis)

    def array(self) -> "Float[Array, 'm n']":
        """Returns the table with the rows in it: a copy."""
        w, rows, at = map(unwrapped, (self.w, self.rows, self.at))
        index = at if self.axis == 0 else (slice(None), at)
        return w.at[index].set(rows.astype(w.dtype), unique_indices=True)

    def __getitem__(self, index: Any) -> Any:
        """Returns the rows of these tokens; `...`, as Flax reads variables, is all."""
        if index is Ellipsis:
            return self
        is_lookup = hasattr(index, "dtype") and jnp.issubdtype(index.dtype, jnp.integer)
        return (
            self._lookup(index) if is_lookup and not self.axis else self.array()[index]
        )

    def _lookup(self, tokens: "Int[Array, '*b']") -> "Float[Array, '*b d']":
        w, rows, at = map(unwrapped, (self.w, self.rows, self.at))
        # Negative tokens count from the end, as in an array.
        tokens = jnp.where(tokens < 0, tokens + len(w), tokens)
        place = jnp.clip(jnp.searchsorted(at, tokens), 0, len(at) - 1)
        own = (at[place] == tokens)[..., None]
        return jnp.where(own, rows[place].astype(w.dtype), w[tokens])

    def __rmatmul__(
        self, x: "Float[Array, '*batch in']"
    ) -> "Float[Array, '*batch out']":
        x = jnp.asarray(x)
        return self.each(lambda w: x @ w.astype(x.dtype))

    def each(self, product: Callable[[Any], Any]) -> Any:
        """Returns `product(array())`, whose last axis is that of the tokens.

        Args:
            product: of the table with something, for each token by itself: it is called
                with the table, and with the rows.
        """
        w, rows, at = map(unwrapped, (self.w, self.rows, self.at))
        return product(w).at[..., at].set(product(rows.astype(w.dtype)))

    def __repr__(self) -> str:
        if not hasattr(unwrapped(self.w), "shape"):  # inside a tree map
            return f"TrainedRows(w={self.w}, rows={self.rows}, at={self.at})"
        return f"TrainedRows({list(self.shape)}, {len(unwrapped(self.at))} trained)"

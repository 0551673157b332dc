"""Many adapters of one base: named, swapped without recompiling, combined."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp

from qlora_jax.lora.initial import exact_product
from qlora_jax.lora.lora import LoraTensor
from qlora_jax.lora.places import map_lora, opened
from qlora_jax.lora.trainable import join_trainable, split_trainable, stack_adapters

if TYPE_CHECKING:
    from jaxtyping import Array, Int32

Method = Literal["cat", "svd", "linear"]


@dataclasses.dataclass(frozen=True)
class AdapterBank:
    """Named adapters of one base in a fixed number of slots.

        bank = AdapterBank.empty(trainable, slots=8)
        bank = bank.put("french", french).put("law", law)
        model = join_trainable(bank.stacked, frozen,
                               adapter_ids=bank.ids(["law", None, "french"]))

    `stacked` has the same shapes whatever is in the slots: adapters are added, replaced
    and removed, and chosen by row, without a function of it being compiled again. An
    empty slot holds a zero adapter.

    Attributes:
        stacked: for `join_trainable`: the trainable parts, stacked.
        names: of what is in the slots, None for an empty one. They are no part of what
            is jitted.
    """

    stacked: Any
    names: tuple[str | None, ...]

    @classmethod
    def empty(cls, like: Any, *, slots: int) -> "AdapterBank":
        """Returns a bank of empty slots.

        Args:
            like: the trainable part of any adapter of the base, for its shapes.
            slots: how many.

        Raises:
            ValueError: if there is no slot, or arrays are trained whole.
        """
        zero = jax.tree.map(jnp.zeros_like, like)
        return cls(stack_adapters([zero] * slots), (None,) * slots)

    def put(self, name: str, trainable: Any) -> "AdapterBank":
        """Returns the bank with an adapter in the slot of its name, or a free one.

        Args:
            name: of the adapter.
            trainable: its part of `split_trainable`; of a smaller rank, see
                `with_rank`.

        Raises:
            ValueError: if the adapter does not fit, or no slot is free.
        """
        if name not in self.names and None not in self.names:
            raise ValueError(
                f"No slot is free for {name!r}: remove one of {list(self.names)}."
            )
        slot = self.names.index(name if name in self.names else None)
        one = stack_adapters([trainable])
        if jax.tree.structure(one) != jax.tree.structure(self.stacked):
            raise ValueError(
                f"{name!r} differs from the adapters of the bank in targets, alpha or "
                "dropout."
            )

        def write(stack: Any, leaf: Any) -> Any:
            axis = _slot_axis(stack, leaf)
            if axis is None:
                raise ValueError(
                    f"{name!r} has a leaf {list(leaf.shape)} and the slots hold "
                    f"{list(stack.shape)}: give it the bank's rank by with_rank."
                )
            return jax.lax.dynamic_update_slice_in_dim(
                stack, leaf.astype(stack.dtype), slot, axis
            )

        stacked = jax.tree.map(write, self.stacked, one)
        names = (*self.names[:slot], name, *self.names[slot + 1 :])
        return AdapterBank(stacked, names)

    def remove(self, name: str) -> "AdapterBank":
        """Returns the bank without an adapter; its numbers stay until overwritten.

        Raises:
            ValueError: if there is none of that name.
        """
        slot = self._slot(name)
        return AdapterBank(
            self.stacked, (*self.names[:slot], None, *self.names[slot + 1 :])
        )

    def ids(self, names: Sequence[str | None]) -> "Int32[Array, ' rows']":
        """Returns the ids of the adapters for `join_trainable`; None is the base.

        Raises:
            ValueError: if there is none of a name.
        """
        slots = [-1 if name is None else self._slot(name) for name in names]
        return jnp.asarray(slots, jnp.int32)

    def _slot(self, name: str) -> int:
        if name not in self.names:
            known = [known for known in self.names if known is not None]
            raise ValueError(f"There is no adapter {name!r}; there are {known}.")
        return self.names.index(name)


def _slot_axis(stack: Any, leaf: Any) -> int | None:
    """The axis along which a leaf with one slot goes into a leaf with several."""
    for axis in (stack.ndim - 3, stack.ndim - 2):
        if axis >= 0 and leaf.ndim == stack.ndim and leaf.shape[axis] == 1:
            one = (*stack.shape[:axis], 1, *stack.shape[axis + 1 :])
            if leaf.shape == one:
                return axis
    return None


def combine_adapters(
    trainables: Sequence[Any],
    weights: Sequence[float],
    frozen: Any,
    *,
    method: Method = "svd",
) -> Any:
    """Returns one adapter that is a weighted sum of several of the same base.

        "cat":     a = [a_0 a_1 ...], b = [w_0 b_0; w_1 b_1; ...]: exactly
                   sum_i w_i a_i @ b_i, of the ranks' sum
        "svd":     the nearest to that sum of the first adapter's rank
        "linear":  a = sum_i sqrt(w_i) a_i, b = sum_i sqrt(w_i) b_i, as PEFT has it,
                   with products of different adapters in it; weights not negative

    Args:
        trainables: the parts of `split_trainable`.
        weights: one for each.
        frozen: the other part, for the scales.
        method: see above. Only "svd" and "linear" fit an AdapterBank.

    Returns:
        A trainable part for the same `frozen`.

    Raises:
        ValueError: if the numbers of adapters and weights differ, `method` is unknown,
            a weight of "linear" is negative, or an adapter is DoRA's, whose magnitudes
            do not add.
    """
    if len(trainables) != len(weights) or not trainables:
        raise ValueError(f"{len(trainables)} adapters and {len(weights)} weights.")
    if method not in ("cat", "svd", "linear"):
        raise ValueError(f"{method=} must be cat, svd or linear.")
    if method == "linear" and min(weights) < 0:
        raise ValueError(f"method='linear' takes roots of the weights: {weights}.")
    models = [join_trainable(trainable, frozen) for trainable in trainables]
    parts: list[Mapping[str, LoraTensor]] = [_adapters(model) for model in models]

    def combined(path: str, _: LoraTensor) -> LoraTensor:
        return _combined([part[path] for part in parts], weights, method, path)

    return split_trainable(map_lora(models[0], combined))[0]


def _adapters(model: Any) -> dict[str, LoraTensor]:
    found: dict[str, LoraTensor] = {}
    map_lora(model, lambda path, lt: found.setdefault(path, lt))
    return found


def _combined(
    lts: Sequence[LoraTensor], weights: Sequence[float], method: Method, path: str
) -> LoraTensor:
    lts = [opened(lt) for lt in lts]
    if any(lt.magnitude is not None for lt in lts):
        raise ValueError(
            f"The adapter of {path!r} is DoRA's: its magnitudes do not add."
        )
    first, dtype = lts[0], lts[0].a.dtype
    if method == "linear":
        roots = [weight**0.5 for weight in weights]
        a = sum(root * lt.a for root, lt in zip(roots, lts, strict=True))
        b = sum(root * lt.b for root, lt in zip(roots, lts, strict=True))
        return dataclasses.replace(first, a=a, b=b)
    a = jnp.concatenate([lt.a for lt in lts], -1)
    scaled = [w * lt.scale * lt.b for w, lt in zip(weights, lts, strict=True)]
    b = jnp.concatenate(scaled, -2)
    if method == "svd":
        a, b = _truncated(a, b, first.rank)
    new = dataclasses.replace(first, a=a.astype(dtype), b=b.astype(dtype))
    return dataclasses.replace(new, b=(b / new.scale).astype(dtype))


def _truncated(a: jax.Array, b: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    """The best a @ b of that rank, without the product being formed."""
    q_a, r_a = jnp.linalg.qr(a.astype(jnp.float32))
    q_b, r_b = jnp.linalg.qr(jnp.swapaxes(b, -1, -2).astype(jnp.float32))
    u, s, v = jnp.linalg.svd(
        exact_product(r_a, jnp.swapaxes(r_b, -1, -2)), full_matrices=False
    )
    root = jnp.sqrt(s[..., None, :rank])
    new_a = exact_product(q_a, u[..., :rank] * root)
    new_b = exact_product(
        jnp.swapaxes(root, -1, -2) * v[..., :rank, :], jnp.swapaxes(q_b, -1, -2)
    )
    return new_a, new_b


def with_rank(trainable: Any, frozen: Any, *, rank: int) -> Any:
    """Returns the same adapter with a larger rank, filled up with zeros.

    The sum a @ b stays as it was, and so does what the model computes: the scale, which
    depends on the rank, goes into `b`.

    Args:
        trainable: a part of `split_trainable`.
        frozen: the other one.
        rank: at least that of every adapter in it.

    Raises:
        ValueError: if an adapter has a larger rank.
    """

    def padded(path: str, lt: LoraTensor) -> LoraTensor:
        lt = opened(lt)
        more = rank - lt.rank
        if more < 0:
            raise ValueError(f"The adapter of {path!r} has rank {lt.rank} > {rank=}.")
        stack = [(0, 0)] * (lt.ndim - 2)
        a = jnp.pad(lt.a, [*stack, (0, 0), (0, more)])
        new = dataclasses.replace(lt, a=a)
        b = jnp.pad(lt.b * (lt.scale / new.scale), [*stack, (0, more), (0, 0)])
        return dataclasses.replace(new, b=b)

    model = join_trainable(trainable, frozen)
    return split_trainable(map_lora(model, padded))[0]

"""Adapters made part of the weights they adapt, and taken out again."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from qlora_jax.lora.initial import by_matrix, dense, exact_product
from qlora_jax.lora.lora import LoraTensor
from qlora_jax.lora.places import map_lora, named_weights, opened
from qlora_jax.lora.tokens import fold_rows
from qlora_jax.quant import QuantizedTensor, quantize


@dataclasses.dataclass(frozen=True)
class Drift:
    """What rounding did to a merged weight, in Frobenius norms.

    Attributes:
        error: |stored - (w + scale a b)| / |w + scale a b|: how far the weight as
            stored is from the one that was meant.
        adapter: |scale a b| / |w + scale a b|, the size of what was merged.
    """

    error: float
    adapter: float


@dataclasses.dataclass(frozen=True)
class MergeReport:
    """The drift of every weight of a merge, by path; its str is one line.

    Attributes:
        drift: by path.
        loss: of the model with its adapters, and of the merged one, if a loss was
            given.
    """

    drift: dict[str, Drift]
    loss: tuple[float, float] | None = None

    def __str__(self) -> str:
        errors = {path: drift.error for path, drift in self.drift.items()}
        worst = max(errors, key=errors.__getitem__)
        mean = sum(errors.values()) / len(errors)
        adapter = sum(drift.adapter for drift in self.drift.values()) / len(errors)
        text = (
            f"Merged {len(errors)} weights: relative error of rounding {mean:.3g} in "
            f"the mean, at most {errors[worst]:.3g} ({worst}); the adapters are "
            f"{adapter:.3g} of the weights."
        )
        if self.loss is not None:
            before, after = self.loss
            text += f" Loss {before:.4f} -> {after:.4f} ({after - before:+.4f})."
        return text


def merge_lora(
    model: Any,
    *,
    dtype: Any = None,
    adapter: int | None = None,
    keep_base: bool = False,
    loss: Callable[[Any], Any] | None = None,
    report: Callable[[MergeReport], Any] | None = print,
) -> Any:
    """Returns the model with each adapter added into its weight.

        w + scale * a @ b     (each column scaled by magnitude / |.| with DoRA)

    is formed in float32, matrix by matrix, and rounded once: to the dtype of the base,
    or, if the base is quantized, to its own format. Quantizing again moves the weights
    by about as much as the first time, and this can be more than the adapter did: the
    report says how much. Merging into bfloat16 (`dtype=jnp.bfloat16`) is the better
    choice where there is memory for it.

    Args:
        model: a model with adapters, see `add_lora`. It stays as it was.
        dtype: merge into arrays of this type; None: into what the base is.
        adapter: which one, if several are stacked.
        keep_base: keep base and adapter beside the merged weight, so that
            `unmerge_lora` gives them back exactly. Costs the memory of both.
        loss: a function of a model, as its loss on a text that matters to you, for the
            report: run on the model with its adapter, and on the merged one.
        report: called once with the MergeReport; prints it by default.

    Returns:
        The model, its LoraTensors replaced by arrays or QuantizedTensors (or, with
        keep_base, by LoraTensors that multiply by the merged weight), and rows of
        `train_rows` written into their tables (not with keep_base).

    Raises:
        ValueError: if the model holds no adapter, or `adapter` does not fit.
    """
    _check_any(model, merged=False)
    drift = {}

    def merged(path: str, lt: LoraTensor) -> Any:
        one = one_adapter(path, opened(lt), adapter)
        depth = lt.ndim - 2
        weight, sums = by_matrix(_merge, one, depth=depth, dtype=dtype)
        error, size, change = (float(jnp.sum(s)) for s in sums)
        drift[path] = Drift((error / size) ** 0.5, (change / size) ** 0.5)
        if lt.form is not None and not keep_base and isinstance(weight, jax.Array):
            weight = lt.form.kernel(weight)
        return dataclasses.replace(lt, merged=weight) if keep_base else weight

    result = map_lora(model, merged)
    if not keep_base:
        result = fold_rows(result)
    if report is not None:
        losses = None
        if loss is not None:
            losses = (float(loss(_one_model(model, adapter))), float(loss(result)))
        report(MergeReport(drift, losses))
    return result


def _one_model(model: Any, adapter: int | None) -> Any:
    """The model with the adapter that is merged, without key and ids."""
    one = lambda path, lt: one_adapter(path, opened(lt), adapter)
    return map_lora(model, one)


def unmerge_lora(model: Any) -> Any:
    """Returns the model as it was before `merge_lora(model, keep_base=True)`.

    Exact: base and adapters were kept, and are the same arrays.

    Args:
        model: what that merge returned.

    Returns:
        The model with its adapters beside their weights.

    Raises:
        ValueError: if the model holds no merged adapter with its base.
    """
    _check_any(model, merged=True)
    return map_lora(model, lambda _, lt: dataclasses.replace(lt, merged=None))


def delta(lt: LoraTensor) -> jax.Array:
    """Returns scale * a @ b in float32, [*stack, in, out], of an adapter of arrays."""
    return lt.scale * exact_product(lt.a, lt.b)


def merged_array(lt: LoraTensor) -> jax.Array:
    """Returns the adapted weight as a float32 array, [*stack, in, out].

    Args:
        lt: one adapter; arrays or Variables.
    """
    lt = opened(lt)
    if lt.merged is not None:
        return dense(lt.merged)
    whole = dense(lt.w) + delta(lt)
    if lt.magnitude is not None:
        norm = jnp.linalg.norm(whole, axis=-2, keepdims=True)
        whole = whole * (lt.magnitude[..., None, :] / norm)
    return whole


def _merge(lt: LoraTensor, dtype: Any):
    """The merged weight of one matrix, and the squares that make its drift."""
    whole = merged_array(lt)
    if isinstance(lt.w, QuantizedTensor) and dtype is None:
        weight = quantize(
            whole.astype(lt.w.dtype),
            lt.w.format,
            block_size=lt.w.block_size,
            double_quant=lt.w.nested_absmax is not None,
        )
    else:
        weight = whole.astype(lt.w.dtype if dtype is None else dtype)
    error = jnp.square(dense(weight) - whole).sum()
    change = jnp.square(whole - dense(lt.w)).sum()
    return weight, (error, jnp.square(whole).sum(), change)


def one_adapter(path: str, lt: LoraTensor, adapter: int | None) -> LoraTensor:
    """Returns the base with one of the adapters stacked on it, or the one there is.

    Args:
        path: what the weight is called in errors.
        lt: of arrays.
        adapter: which one; None if there is one.

    Returns:
        A LoraTensor without key, ids and merged weight.

    Raises:
        ValueError: if `adapter` does not fit.
    """
    several = lt.num_adapters
    # Key and ids belong to a call, and an earlier merge is not part of the sum.
    lt = dataclasses.replace(lt, key=None, ids=None, merged=None)
    if several is None:
        if adapter is not None:
            raise ValueError(
                f"{adapter=} was given and {path!r} holds one adapter: leave it out."
            )
        return lt
    if adapter is None or not 0 <= adapter < several:
        raise ValueError(
            f"{path!r} holds {several} adapters and {adapter=}: give one from 0 to "
            f"{several - 1}."
        )
    magnitude = None if lt.magnitude is None else lt.magnitude[..., adapter, :]
    a, b = lt.a[..., adapter, :, :], lt.b[..., adapter, :, :]
    return dataclasses.replace(lt, a=a, b=b, magnitude=magnitude)


def _check_any(model: Any, *, merged: bool) -> None:
    adapters = [w for w in named_weights(model).values() if isinstance(w, LoraTensor)]
    if merged and all(lt.merged is None for lt in adapters):
        raise ValueError(
            "The model holds no merged adapter with its base: only "
            "merge_lora(..., keep_base=True) can be undone."
        )
    if not adapters:
        raise ValueError("The model holds no adapter to merge: call add_lora first.")

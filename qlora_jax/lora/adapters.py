"""Adapters put on a model."""

import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from qlora_jax.lora import initial
from qlora_jax.lora.forms import KernelForm
from qlora_jax.lora.lora import LoraTensor, scale_of
from qlora_jax.lora.on_mesh import on_mesh_of_base
from qlora_jax.lora.places import (
    Targets,
    is_weight,
    kernel_forms,
    listed,
    named_weights,
    pattern_of,
    replace_weights,
)
from qlora_jax.lora.rows import TrainedRows

if TYPE_CHECKING:
    from jaxtyping import Array, Key

FormOf = Callable[[str], KernelForm | None]

# Heads and embeddings stay as they are unless named, as in QLoRA and PEFT.
_NOT_LINEAR = re.compile(r"(^|/)(embed\w*|head|lm_head)(/kernel)?$")
# With a stack axis these have two axes as well, and no pattern means them.
_VECTOR = re.compile(r"(bias|scale|norm)$")


def add_lora(
    model: Any,
    *,
    rank: int,
    alpha: float = 16.0,
    dropout: float = 0.0,
    targets: Targets | None = None,
    key: "Key[Array, '']",
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    rslora: bool = False,
    dora: bool = False,
    init: initial.Init = "kaiming",
    quantize: str | None = None,
    forms: Mapping[str, KernelForm] | None = None,
    dtype: Any = jnp.float32,
) -> Any:
    """Puts a low-rank adapter beside the linear weights of a model.

    Each chosen weight w becomes a LoraTensor, used as before:

        x @ w + (dropout(x) @ a @ b) * scale,    scale = alpha / rank

    No base weight is copied, and the model given stays as it was.

    Layers of Flax NNX (Linear, LinearGeneral and with it attention, Einsum, Conv,
    Embed) are replaced by ones that take such a weight for a kernel; see docs/lora.md.

    Args:
        model: an NNX module with such layers, or whose weights are Params used as
            `x @ self.w`; or a plain pytree of weights. Leading stack axes (scanned
            layers) are kept: one adapter for each layer.
        rank: inner dimension of the adapters, at most the smaller side of the weight.
            The paper takes 64.
        alpha: see the equation.
        dropout: rate of dropout on the adapters' input, in [0, 1). It acts only when
            `join_trainable` is given a key.
        targets: which weights. A regular expression or several, found (`re.search`)
            in the path, the keys joined by "/" as in `quantize_tree`: `q_proj`,
            `layers/[qv]_proj$`; biases, scales and norms are never meant. Or a
            predicate of path and weight. None: every quantized weight, every weight
            called `*_proj` and the kernels of Flax's linear layers, except embeddings
            and heads.
        key: a typed key for the initial values. Those of a weight depend on the key
            and its path only, not on what else is targeted.
        rank_pattern: ranks that differ, by pattern as in `targets`.
        alpha_pattern: alphas that differ, by pattern.
        rslora: scale by alpha / sqrt(rank) instead (https://arxiv.org/abs/2312.03732).
        dora: also train the magnitude of each column
            (https://arxiv.org/abs/2402.09353).
        init: `kaiming`: a uniform, b zero, as PEFT; `gaussian`: a normal of deviation
            1 / rank, b zero; `orthogonal`: a and b of orthogonal subspaces; `pissa`:
            the principal singular vectors of w, the base becoming what they leave;
            `loftq`: the best low-rank match of the error of quantization. The last two
            need weights that are not quantized yet.
        quantize: a format, as `nf4`, in which to hold the base under the adapters,
            double-quantized. Needed by `loftq`, advised with `pissa`.
        forms: for the params of a Flax Linen model, `lora.linen.forms(...)`: which
            kernels of more than two axes are which matrices.
        dtype: of the trained leaves.

    Returns:
        The model with LoraTensors in it, of the type given.

    Raises:
        ValueError: if a pattern matches nothing or two match one weight, a chosen
            weight has fewer than two axes or an adapter already, a rank is over the
            dimension, or a rate is out of range.
        NotImplementedError: if a chosen weight belongs to a layer of Flax's own that
            cannot be adapted: a convolution with a mask, an einsum that is no
            contraction.
    """
    # The byte that draws a mask rounds rates above 511/512 up to 1.
    if not 0 <= dropout < 511 / 512:
        raise ValueError(f"{dropout=} must be in [0, 1).")
    weights = named_weights(model)
    form_of = kernel_forms(model) if forms is None else forms.get
    chosen = _chosen(weights, targets, form_of)
    ranks = _by_pattern(chosen, rank, rank_pattern, "rank_pattern")
    alphas = _by_pattern(chosen, alpha, alpha_pattern, "alpha_pattern")
    new = {}
    for path in chosen:
        form = form_of(path)
        w = _as_matrix(path, weights[path], form)
        _check_rank(path, w, ranks[path])
        w, a, b = initial.initialised(
            w,
            rank=ranks[path],
            scale=scale_of(ranks[path], alphas[path], rslora),
            key=jax.random.fold_in(key, zlib.crc32(path.encode())),
            init=init,
            quantize=quantize,
            path=path,
            dtype=dtype,
        )
        lt = LoraTensor(
            w,
            a,
            b,
            alpha=float(alphas[path]),
            dropout=float(dropout),
            rslora=rslora,
            form=None if form is None or form.is_plain else form,
        )
        new[path] = on_mesh_of_base(initial.with_magnitude(lt, dtype) if dora else lt)
    return replace_weights(model, new)


def _chosen(
    weights: Mapping[str, Any], targets: Targets | None, form_of: FormOf
) -> list[str]:
    """The paths of the weights that get an adapter."""
    fit = [
        path
        for path, w in weights.items()
        if len(w.shape) >= 2 and not _VECTOR.search(path)
    ]
    if callable(targets):
        paths = [path for path in weights if targets(path, weights[path])]
        if not paths:
            raise ValueError(
                f"The predicate targets={targets} chose no weight of: {listed(fit)}."
            )
    elif targets is None:
        paths = [
            path
            for path in fit
            if not _NOT_LINEAR.search(path)
            and (is_weight(weights[path]) or _is_linear(path, form_of))
        ]
        if not paths:
            raise ValueError(
                "targets=None takes the quantized weights, those called *_proj and the "
                f"linear layers of Flax, and the model has none. Name some of: "
                f"{listed(fit)}."
            )
    else:
        patterns = [targets] if isinstance(targets, str) else targets
        paths = list(pattern_of(patterns, fit, what="targets"))
    for path in paths:
        if isinstance(weights[path], LoraTensor):
            raise ValueError(
                f"{path!r} has an adapter already: merge_lora it, or stack_adapters."
            )
        if isinstance(weights[path], TrainedRows):
            raise ValueError(
                f"{path!r} has trained rows: leave it out of the targets, or fold_rows."
            )
        if len(weights[path].shape) < 2:
            raise ValueError(
                f"{path!r} has shape {list(weights[path].shape)} and an adapter needs "
                f"[*stack, in, out]. Weights that would do: {listed(fit)}."
            )
    return paths


def _is_linear(path: str, form_of: FormOf) -> bool:
    if path.endswith("_proj"):
        return True
    try:
        form = form_of(path)
    except NotImplementedError:  # left alone unless it is named
        return False
    return form is not None and form.kind == "linear"


def _as_matrix(path: str, w: Any, form: KernelForm | None) -> Any:
    """The weight laid out as matrices [*stack, in, out]."""
    if form is None:
        return w
    if is_weight(w):
        if tuple(w.shape[-len(form.matrix_shape) :]) != form.matrix_shape:
            raise ValueError(
                f"{path!r} is quantized as matrices {list(w.shape[-2:])} and its layer "
                f"multiplies by {list(form.matrix_shape)}: load the model unquantized, "
                "and give add_lora(..., quantize=...)."
            )
        return w
    form.stack_of(w.shape, path)
    return form.matrix(w)


def _by_pattern(
    paths: Sequence[str], default: Any, patterns: Mapping[str, Any] | None, what: str
) -> dict[str, Any]:
    """A value for each path: its pattern's, or the default."""
    named = pattern_of(patterns, paths, what=what) if patterns else {}
    return {
        path: patterns[named[path]] if patterns and path in named else default
        for path in paths
    }


def _check_rank(path: str, w: Any, rank: int) -> None:
    *_, n_in, n_out = w.shape
    if not 1 <= rank <= min(n_in, n_out):
        raise ValueError(
            f"{rank=} of {path!r} must be from 1 to {min(n_in, n_out)}, the smaller "
            f"side of its shape {list(w.shape)}."
        )

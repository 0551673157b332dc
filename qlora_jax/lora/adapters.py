"""Adapters put on a model, taken apart for training, put together again, stacked."""

import dataclasses
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer

from qlora_jax.lora import initial
from qlora_jax.lora.lora import LoRAParam, LoraTensor, scale_of
from qlora_jax.lora.places import (
    BASE,
    TRAINED,
    Targets,
    in_flax_layer,
    is_module,
    is_weight,
    listed,
    map_lora,
    named_weights,
    pattern_of,
    replace_weights,
)
from qlora_jax.quant.rules import leaf_path

if TYPE_CHECKING:
    from jaxtyping import Array, Int32, Key

# Heads and embeddings stay as they are unless named, as in QLoRA and PEFT.
_NOT_LINEAR = re.compile(r"(^|/)(embed\w*|head|lm_head)$")
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
    dtype: Any = jnp.float32,
) -> Any:
    """Puts a low-rank adapter beside the linear weights of a model.

    Each chosen weight w becomes a LoraTensor, used as before:

        x @ w + (dropout(x) @ a @ b) * scale,    scale = alpha / rank

    No base weight is copied, and the model given stays as it was.

    Args:
        model: an NNX module whose weights are Params used as `x @ self.w`, or a plain
            pytree of weights. Leading stack axes (scanned layers) are kept: one
            adapter for each layer.
        rank: inner dimension of the adapters, at most the smaller side of the weight.
            The paper takes 64.
        alpha: see the equation.
        dropout: rate of dropout on the adapters' input, in [0, 1). It acts only when
            `join_trainable` is given a key.
        targets: which weights. A regular expression or several, found (`re.search`)
            in the path, the keys joined by "/" as in `quantize_tree`: `q_proj`,
            `layers/[qv]_proj$`; biases, scales and norms are never meant. Or a
            predicate of path and weight. None: every quantized weight and every
            weight called `*_proj`, except embeddings and heads.
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
        dtype: of the trained leaves.

    Returns:
        The model with LoraTensors in it, of the type given.

    Raises:
        ValueError: if a pattern matches nothing or two match one weight, a chosen
            weight has fewer than two axes or an adapter already, a rank is over the
            dimension, or a rate is out of range.
        NotImplementedError: if a chosen weight belongs to a layer of Flax's own, which
            multiplies by other means than `x @ w`.
    """
    # The byte that draws a mask rounds rates above 511/512 up to 1.
    if not 0 <= dropout < 511 / 512:
        raise ValueError(f"{dropout=} must be in [0, 1).")
    weights = named_weights(model)
    chosen = _chosen(model, weights, targets)
    ranks = _by_pattern(chosen, rank, rank_pattern, "rank_pattern")
    alphas = _by_pattern(chosen, alpha, alpha_pattern, "alpha_pattern")
    new = {}
    for path in chosen:
        w = weights[path]
        _check_rank(path, w, ranks[path])
        w, a, b = initial.initialised(
            w,
            rank=ranks[path],
            scale=scale_of(ranks[path], alphas[path], rslora),
            key=jax.random.fold_in(key, zlib.crc32(path.encode())),
            init=init,
            quantize=quantize,
            path=path,
        )
        lt = LoraTensor(
            w,
            a.astype(dtype),
            b.astype(dtype),
            alpha=float(alphas[path]),
            dropout=float(dropout),
            rslora=rslora,
        )
        new[path] = initial.with_magnitude(lt, dtype) if dora else lt
    return replace_weights(model, new)


def split_trainable(model: Any) -> tuple[Any, Any]:
    """Takes a model apart into what is trained and what is frozen.

    Both are pytrees, fit to be arguments of jit; gradients and optimizers take the
    first. Of an NNX module the parts are `State` and `(graphdef, State)`, as
    `nnx.split(model, LoRAParam, ...)` gives them. Of a plain tree both have its
    structure, None standing for what is in the other part.

    Args:
        model: a model with adapters in it, see `add_lora`.

    Returns:
        `(trainable, frozen)`, for `join_trainable`.

    Raises:
        ValueError: if the model holds no adapter, or merged ones.
    """
    lora = {p: w for p, w in named_weights(model).items() if isinstance(w, LoraTensor)}
    if not lora:
        raise ValueError("The model holds no adapter: call add_lora first.")
    for path, lt in lora.items():
        if lt.merged is not None:
            raise ValueError(
                f"The adapter of {path!r} is merged and would get no gradient: call "
                "unmerge_lora first."
            )
    if is_module(model):
        graphdef, trainable, rest = nnx.split(model, LoRAParam, ...)
        return trainable, (graphdef, rest)

    def part(emptied: Sequence[str], rest: bool):
        def take(leaf):
            if isinstance(leaf, LoraTensor):
                return dataclasses.replace(leaf, **dict.fromkeys(emptied))
            return leaf if rest else None

        return jax.tree.map(take, model, is_leaf=is_weight)

    held = (*BASE, "key", "ids")
    return part(held, rest=False), part(TRAINED, rest=True)


def join_trainable(
    trainable: Any,
    frozen: Any,
    *,
    key: "Key[Array, ''] | None" = None,
    adapter_ids: "Int32[Array, ' rows'] | Int32[Array, ''] | None" = None,
) -> Any:
    """Puts together what `split_trainable` took apart: a model to be called.

    Args:
        trainable: the first part, or, stacked, several (see `stack_adapters`).
        frozen: the second part.
        key: a PRNG key for the adapters' dropout, split over weights and layers. The
            same key gives the same masks. None: no dropout.
        adapter_ids: which of several stacked adapters to use: one for each row of the
            batch, or one for all; -1 is the base alone. They are not checked under
            jit, where an id that does not exist gives NaN.

    Returns:
        The model.

    Raises:
        ValueError: if the parts are not of one model, or an id is out of range.
    """
    if isinstance(frozen, tuple) and frozen and isinstance(frozen[0], nnx.GraphDef):
        model = nnx.merge(frozen[0], trainable, frozen[1])
    else:
        model = _join_tree(trainable, frozen)
    if key is None and adapter_ids is None:
        return model
    if key is not None and not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    if adapter_ids is not None:
        adapter_ids = jnp.asarray(adapter_ids, jnp.int32)

    def chosen(path: str, lt: LoraTensor) -> LoraTensor:
        stack = lt.shape[:-2]
        changes: dict[str, Any] = {}
        if key is not None and lt.dropout:
            own = jax.random.fold_in(key, zlib.crc32(path.encode()))
            changes["key"] = jax.random.split(own, stack) if stack else own
        if adapter_ids is not None:
            _check_ids(path, lt, adapter_ids)
            changes["ids"] = jnp.broadcast_to(adapter_ids, stack + adapter_ids.shape)
        return dataclasses.replace(lt, **changes)

    return map_lora(model, chosen)


def stack_adapters(trainables: Sequence[Any]) -> Any:
    """Stacks several adapters of one base, to be chosen by row of a batch.

        model = join_trainable(stack_adapters([t0, t1]), frozen, adapter_ids=ids)

    Args:
        trainables: first parts of `split_trainable`, of adapters with the same targets
            and ranks. The alphas that hold are those of the frozen part.

    Returns:
        One such part, whose leaves have an axis for the adapters before their last
        two: `a` [*stack, adapters, in, rank].

    Raises:
        ValueError: if there are none, or they differ in structure or shape.
    """
    if not trainables:
        raise ValueError("stack_adapters needs at least one adapter.")
    first, *others = trainables
    shapes = list(map(jnp.shape, jax.tree.leaves(first)))
    for i, other in enumerate(others, 1):
        if jax.tree.structure(other) != jax.tree.structure(first):
            raise ValueError(
                f"Adapters 0 and {i} differ in targets, alpha or dropout: give all "
                "the same."
            )
        if list(map(jnp.shape, jax.tree.leaves(other))) != shapes:
            raise ValueError(
                f"Adapters 0 and {i} differ in the shape of a leaf: give all the same "
                "rank."
            )

    def stack(path, *leaves):
        # A magnitude has one axis behind the stack, [*stack, out]; a and b have two.
        is_magnitude = leaf_path(path).rsplit("/", 1)[-1] == "magnitude"
        return jnp.stack(leaves, -2 if is_magnitude else -3)

    return jax.tree_util.tree_map_with_path(stack, *trainables)


def _chosen(model: Any, weights: Mapping[str, Any], targets: Targets | None):
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
            if (is_weight(weights[path]) or path.endswith("_proj"))
            and not _NOT_LINEAR.search(path)
        ]
        if not paths:
            raise ValueError(
                "targets=None takes the quantized weights and those called *_proj, and "
                f"the model has none. Name some of: {listed(fit)}."
            )
    else:
        patterns = [targets] if isinstance(targets, str) else targets
        paths = list(pattern_of(patterns, fit, what="targets"))
    for path in paths:
        if isinstance(weights[path], LoraTensor):
            raise ValueError(
                f"{path!r} has an adapter already: merge_lora it, or stack_adapters."
            )
        if len(weights[path].shape) < 2:
            raise ValueError(
                f"{path!r} has shape {list(weights[path].shape)} and an adapter needs "
                f"[*stack, in, out]. Weights that would do: {listed(fit)}."
            )
        if in_flax_layer(model, path):
            raise NotImplementedError(
                f"{path!r} belongs to a layer of flax.nnx, which multiplies by "
                "lax.dot_general and takes arrays only. Write the layer as x @ self.w."
            )
    return paths


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


def _check_ids(path: str, lt: LoraTensor, ids: Any) -> None:
    if ids.ndim > 1:
        raise ValueError(f"adapter_ids has shape {list(ids.shape)}: give one axis.")
    several = lt.num_adapters
    if several is None:
        raise ValueError(
            f"adapter_ids were given and {path!r} holds one adapter: stack several "
            "with stack_adapters."
        )
    if not isinstance(ids, Tracer):
        known = np.asarray(ids)
        if known.size and (known.min() < -1 or known.max() >= several):
            raise ValueError(
                f"adapter_ids from {known.min()} to {known.max()} must lie in -1 to "
                f"{several - 1}: {path!r} holds {several} adapters."
            )


def _join_tree(trainable: Any, frozen: Any) -> Any:
    def join(part, rest):
        if part is None:
            return rest
        if not isinstance(rest, LoraTensor):
            raise ValueError(
                "trainable and frozen are not of one model: an adapter meets "
                f"{type(rest).__name__}."
            )
        trained = {name: getattr(part, name) for name in TRAINED}
        return dataclasses.replace(rest, **trained)

    return jax.tree.map(
        join,
        trainable,
        frozen,
        is_leaf=lambda node: node is None or isinstance(node, LoraTensor),
    )

"""Adapters put on a model, taken apart for training, put together again, stacked."""

import dataclasses
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer

from qlora_jax.lora import initial
from qlora_jax.lora.forms import KernelForm
from qlora_jax.lora.lora import LoRAParam, LoraTensor, scale_of
from qlora_jax.lora.places import (
    PARTS,
    TRAINED,
    Partly,
    Targets,
    is_module,
    is_weight,
    kernel_forms,
    listed,
    map_lora,
    named_weights,
    opened,
    pattern_of,
    replace_weights,
)
from qlora_jax.lora.rows import TrainedRows
from qlora_jax.quant.rules import leaf_path

if TYPE_CHECKING:
    from jaxtyping import Array, Int32, Key

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
        new[path] = initial.with_magnitude(lt, dtype) if dora else lt
    return replace_weights(model, new)


def split_trainable(model: Any, *, also: Targets | None = None) -> tuple[Any, Any]:
    """Takes a model apart into what is trained and what is frozen.

    Both are pytrees, fit to be arguments of jit; gradients and optimizers take the
    first. Of an NNX module the parts are `State` and `(graphdef, State)`, as
    `nnx.split(model, LoRAParam, ...)` gives them. Of a plain tree both have its
    structure, None standing for what is in the other part.

    Args:
        model: a model with adapters in it, see `add_lora`, or rows, see `train_rows`.
        also: arrays to be trained whole beside the adapters, by pattern or predicate as
            in `add_lora`, biases and norms included: `"bias$|norm"`, `"embed|lm_head"`.
            They are trained in the type they have.

    Returns:
        `(trainable, frozen)`, for `join_trainable`.

    Raises:
        ValueError: if nothing is trained, an adapter is merged, or `also` names
            nothing or a weight that cannot be trained.
    """
    weights = named_weights(model)
    lora = {p: w for p, w in weights.items() if isinstance(w, LoraTensor)}
    whole = frozenset() if also is None else trained_whole(weights, also)
    partly = any(isinstance(w, Partly) for w in weights.values())
    if not partly and not whole:
        raise ValueError("The model holds no adapter: call add_lora first.")
    for path, lt in lora.items():
        if lt.merged is not None:
            raise ValueError(
                f"The adapter of {path!r} is merged and would get no gradient: call "
                "unmerge_lora first."
            )
    if is_module(model):
        named = lambda path, _: "/".join(map(str, path)) in whole
        chosen = nnx.Any(LoRAParam, named) if whole else LoRAParam
        graphdef, trainable, rest = nnx.split(model, chosen, ...)
        return trainable, (graphdef, rest)

    def part(rest: bool):
        def take(path, leaf):
            if isinstance(leaf, Partly):
                trained, base = PARTS[type(leaf)]
                own = ("key", "ids") if isinstance(leaf, LoraTensor) else ()
                emptied = trained if rest else (*base, *own)
                return dataclasses.replace(leaf, **dict.fromkeys(emptied))
            return leaf if rest != (leaf_path(path) in whole) else None

        return jax.tree_util.tree_map_with_path(take, model, is_leaf=is_weight)

    return part(rest=False), part(rest=True)


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
        ValueError: if the parts are not of one model, an adapter does not fit its
            weight, or an id is out of range.
    """
    is_nnx = isinstance(frozen, tuple) and isinstance(frozen[0], nnx.GraphDef)
    model = (_join_module if is_nnx else _join_tree)(trainable, frozen)
    for path, weight in named_weights(model).items():
        if isinstance(weight, LoraTensor):
            _check_fits(path, opened(weight))
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
        name = leaf_path(path).rsplit("/", 1)[-1]
        if name not in TRAINED:
            raise ValueError(
                f"{leaf_path(path)!r} is trained whole (also=...), and only adapters "
                "can be chosen by row."
            )
        return jnp.stack(leaves, -2 if name == "magnitude" else -3)

    return jax.tree_util.tree_map_with_path(stack, *trainables)


FormOf = Callable[[str], KernelForm | None]


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


def trained_whole(weights: Mapping[str, Any], also: Targets) -> frozenset[str]:
    """Returns the paths of the arrays that `also` of `split_trainable` names.

    Raises:
        ValueError: if it names nothing, or what cannot be trained.
    """
    fit = [
        path
        for path, w in weights.items()
        if not is_weight(w) and jnp.issubdtype(w.dtype, jnp.floating)
    ]
    if callable(also):
        chosen = [path for path in weights if also(path, weights[path])]
    else:
        patterns = [also] if isinstance(also, str) else also
        of = "array that can be trained whole"
        chosen = list(pattern_of(patterns, fit, what="also", of=of))
    for path in chosen:
        if path not in fit:
            raise ValueError(
                f"{path!r} is {type(weights[path]).__name__} and cannot be trained "
                f"whole; these can: {listed(fit)}."
            )
    return frozenset(chosen)


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


def _join_module(trainable: Any, frozen: Any) -> Any:
    graphdef, rest = frozen
    try:
        # Variables of this trace, not the ones in the arguments, or transforms of NNX
        # inside of a model would refuse them under grad. No array is copied.
        return nnx.merge(graphdef, trainable, rest, copy=True)
    except (TypeError, ValueError) as error:
        given = type(trainable).__name__
        if isinstance(trainable, nnx.State):
            paths = nnx.to_flat_state(trainable)
            given = listed(["/".join(map(str, path)) for path, _ in paths])
        raise ValueError(
            "trainable and frozen are not of one model: the frozen part lacks other "
            f"arrays than it is given ({given})."
        ) from error


def _check_fits(path: str, lt: LoraTensor) -> None:
    """Raises unless the adapter is one of its weight."""
    *stack, n_in, n_out = lt.shape
    sizes = {"a": (n_in, None), "b": (None, n_out), "magnitude": (n_out,)}
    for name, wanted in sizes.items():
        leaf = getattr(lt, name)
        if leaf is None and name == "magnitude":
            continue
        if leaf is None:
            raise ValueError(
                f"{path!r} was adapted and has no adapter here: trainable is of a "
                "model with other targets."
            )
        shape = getattr(leaf, "shape", None)
        if shape is None:  # a tree of something else than arrays
            continue
        own = shape[len(stack) :]
        same = all(
            w in (None, n) for w, n in zip(wanted[::-1], own[::-1], strict=False)
        )
        adapters = len(own) - len(wanted)
        if list(shape[: len(stack)]) != stack or adapters not in (0, 1) or not same:
            raise ValueError(
                f"{path!r}: {name} has shape {list(shape)}, and the weight is "
                f"{list(lt.shape)}: the adapter is of another base."
            )


def _join_tree(trainable: Any, frozen: Any) -> Any:
    def join(part, rest):
        if part is None or rest is None:
            return rest if part is None else part
        if not isinstance(rest, Partly) or type(rest) is not type(part):
            raise ValueError(
                "trainable and frozen are not of one model: an adapter meets "
                f"{type(rest).__name__}."
            )
        trained = {name: getattr(part, name) for name in PARTS[type(rest)][0]}
        return dataclasses.replace(rest, **trained)

    is_leaf = lambda node: node is None or is_weight(node)
    parts, treedef = jax.tree.flatten(trainable, is_leaf=is_leaf)
    rests, other = jax.tree.flatten(frozen, is_leaf=is_leaf)
    if treedef != other:
        raise ValueError(
            "trainable and frozen are not of one model: they are trees of "
            f"{treedef.num_leaves} and {other.num_leaves} weights, in different places."
        )
    return treedef.unflatten(map(join, parts, rests))

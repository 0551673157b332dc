"""Optimizer state in host memory, on the device one page at a time."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from qlora_jax.optim.memory import has_host_memory, to_device, to_host
from qlora_jax.optim.pages import PAGE_SIZE, evaluate_by_page
from qlora_jax.optim.slices import (
    check_elementwise,
    join_slices,
    rows_of_slices,
    slice_tree,
)
from qlora_jax.sharding import is_concrete, mesh_of, on_all_of


class PagedTransformation(optax.GradientTransformationExtraArgs):
    """What `paged` returns: an optax transformation that can take a whole step as well.

    Attributes:
        step: (gradients, state, params, **extra) -> new parameters, new state.
    """

    step: Callable[..., tuple[Any, Any]]

    def __new__(cls, init, update, step):
        """As of an optax transformation, and `step`."""
        self = super().__new__(cls, init, update)
        self.step = step
        return self


def take_step(
    tx: optax.GradientTransformation, grads: Any, state: Any, params: Any, **extra: Any
) -> tuple[Any, Any]:
    """Returns the parameters and the state after a step of an optimizer.

        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)

    What `paged` returns computes new parameters page by page as well: with
    `slice_leaves` no update is in memory but that of a page, and a new parameter takes
    the room of its gradient.

    Args:
        tx: any optax transformation.
        grads: the gradients.
        state: of `tx.init(params)`.
        params: the parameters.
        extra: what `tx.update` takes besides.
    """
    if (step := getattr(tx, "step", None)) is not None:
        return step(grads, state, params, **extra)
    updates, state = tx.update(grads, state, params, **extra)
    return optax.apply_updates(params, updates), state


def paged(
    inner: optax.GradientTransformation,
    *,
    page_size: int = PAGE_SIZE,
    device_budget: int = 0,
    min_size: int = 65_536,
    slice_leaves: bool = False,
    own_shapes: bool = False,
) -> PagedTransformation:
    """Keeps the state of an optimizer in host memory, as QLoRA's paged optimizers do.

    The state is the inner optimizer's own, with every large leaf in the host's pinned
    memory. `update` brings it to the device a page at a time, and writes each page back
    before it fetches the next but one, so that two pages are on the device at once and
    transfers go both ways at once. A page is a group of whole leaves: each number is
    computed by the inner optimizer's own operations, in its order.

    Which leaves must be together is read off the inner optimizer's jaxpr. Adam's
    moments of one parameter meet, so they share a page, whereas no two parameters do,
    also after clipping the gradients by their global norm. An optimizer that looks
    across its own state, such as a clip of the *update* after Adam, gets all of the
    state that it looks across in one page. Outside of jit the whole state comes to the
    device.

    Arrays in host memory are committed to their device, so a step's results are too. If
    the first parameters are not (`jax.device_put(params, device)` commits them), the
    second step compiles again.

    Put it anywhere in `optax.chain`, `masked`, `partition` and `inject_hyperparams`, or
    around them. A wrapper that computes with the state of what it wraps goes inside:
    `paged(optax.MultiSteps(inner, 4).gradient_transformation())`, since arithmetic on
    host memory runs on the host, and slowly.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from qlora_jax.optim import paged
        >>> tx = paged(optax.adamw(1e-3), min_size=0)
        >>> params = {"w": jnp.ones((4, 4))}
        >>> state = tx.init(params)
        >>> state[0].mu["w"].sharding.memory_kind
        'pinned_host'

    .. warning::
        jit matches donated inputs with outputs by shape and type, and does not look at
        the memory they are in: `donate_argnums` of the state alone, or a step that
        returns the state before the parameters, makes the runtime abort the process
        ("PjRtBuffer's memory kind does not match"). Donate `(params, state)` and
        return them in that order, or set `own_shapes`.

    Args:
        inner: any optax transformation.
        page_size: bytes of state in a page. Leaves that belong together make a larger
            page if they have to, unless `slice_leaves`.
        device_budget: bytes of state that stay on the device for good: leaves in their
            order as long as they fit, which is what paging does when memory is free.
        min_size: numbers in a leaf below which it is not worth a transfer and stays.
        slice_leaves: cut parameters whose state exceeds a page into slices of their
            first axis, each an own leaf for `inner`, whose state then has a tuple of
            slices in the place of a leaf. Only for optimizers that treat every number
            alike; sums over a leaf (a global norm) run in another order, which moves
            the result by at most 2 ulp a step.
        own_shapes: give state leaves on the host a leading axis of 1, so that no
            donated buffer is mistaken for one in the other memory, in whatever order
            a step returns its results.

    Returns:
        A transformation whose state is the inner one's, as far as its tree goes.

    Raises:
        ValueError: if `page_size` is not positive, `device_budget` or `min_size` is
            negative; in `init` and `update`, if a page cannot hold one row (an index of
            the first axis) of a leaf, if `slice_leaves` meets an optimizer that is not
            elementwise, or if the state is of another optimizer or other parameters.

    Source: Dettmers et al. 2023, section 3 (https://arxiv.org/abs/2305.14314).
    """
    if page_size <= 0:
        raise ValueError(f"{page_size=} bytes must be positive; the default is 2**26.")
    if device_budget < 0:
        raise ValueError(
            f"{device_budget=} bytes must not be negative; 0 keeps every large leaf on "
            "the host."
        )
    if min_size < 0:
        raise ValueError(f"{min_size=} numbers must not be negative.")
    inner = optax.with_extra_args_support(inner)

    def plan(params: Any) -> tuple[Any, Any, list[bool]]:
        """Rows in a slice of each parameter, the state's shapes, its paged leaves."""
        shapes = jax.eval_shape(inner.init, params)
        rows = None
        if slice_leaves:
            rows = rows_of_slices(params, shapes, page_size, min_size)
            shapes = jax.eval_shape(lambda p: inner.init(slice_tree(p, rows)), params)
        hosted = _paged_leaves(jax.tree.leaves(shapes), device_budget, min_size)
        _check_rows(shapes, hosted, page_size)
        if not has_host_memory(params):
            hosted = [False] * len(hosted)
        return rows, shapes, hosted

    def cut(tree: Any, rows: Any) -> Any:
        return slice_tree(tree, rows) if slice_leaves else tree

    def init_fn(params):
        rows, _, hosted = plan(params)

        def init(params):
            leaves, treedef = jax.tree.flatten(inner.init(cut(params, rows)))
            if (mesh := mesh_of(params)) is not None:
                # What is not made from a parameter's array (step counts, factored
                # moments, scales of blocks) would in host memory be committed to the
                # one device, which no program over the others takes.
                leaves = on_all_of(mesh, leaves)
            if own_shapes:
                leaves = [
                    x[None] if host else x
                    for x, host in zip(leaves, hosted, strict=True)
                ]
            return treedef.unflatten(_placed(leaves, hosted))

        # One program writes leaf after leaf to the host, whereas eager operations would
        # fill the device with all of the state first; but they keep shardings.
        return jax.jit(init)(params) if _on_one_device(params) else init(params)

    def update_fn(updates, state, params=None, **extra_args):
        return evaluate(updates, state, params, extra_args, applied=False)

    def step_fn(updates, state, params, **extra_args):
        return evaluate(updates, state, params, extra_args, applied=True)

    def evaluate(updates, state, params, extra_args, *, applied: bool):
        rows, shapes, hosted = plan(updates if params is None else params)
        _check_state(state, shapes, hosted if own_shapes else [False] * len(hosted))
        leaves, treedef = jax.tree.flatten(state)
        cut_updates = cut(updates, rows)
        cut_params: Any = None if params is None else cut(params, rows)
        if slice_leaves:
            check_elementwise(
                lambda u, s, p: inner.update(u, s, p, **extra_args),
                (cut_updates, shapes, cut_params),
                rows,
            )
        resident = [
            None if host else to_device(x)
            for x, host in zip(leaves, hosted, strict=True)
        ]
        out_tree = None

        def fn(*pages):
            nonlocal out_tree
            fetched = iter(x[0] if own_shapes else x for x in pages)
            full = [
                next(fetched) if host else x
                for x, host in zip(resident, hosted, strict=True)
            ]
            new_updates, new_state = inner.update(
                cut_updates, treedef.unflatten(full), cut_params, **extra_args
            )
            if applied:
                new_updates = optax.apply_updates(cut_params, new_updates)
            update_leaves, out_tree = jax.tree.flatten(new_updates)
            state_leaves = [
                x[None] if host and own_shapes else x
                for x, host in zip(
                    treedef.flatten_up_to(new_state), hosted, strict=True
                )
            ]
            return [*state_leaves, *update_leaves]

        pages = [x for x, host in zip(leaves, hosted, strict=True) if host]
        on_host = [i for i, host in enumerate(hosted) if host]
        if any(isinstance(x, Tracer) for x in jax.tree.leaves((updates, state))):
            outputs = evaluate_by_page(
                fn,
                pages,
                page_size=page_size,
                host_outputs=on_host,
                after=jax.tree.leaves(cut_updates),
                complete=applied,
            )
        else:
            # Outside of jit the inner optimizer is called as it is: cut in pages, what
            # it jits itself would be compiled, and rounded, in other pieces.
            outputs = fn(*map(to_device, pages))
            for i in on_host:
                outputs[i] = to_host(outputs[i])
        assert out_tree is not None  # evaluate_by_page has traced fn
        new_state = treedef.unflatten(outputs[: len(leaves)])
        new_updates = out_tree.unflatten(outputs[len(leaves) :])
        if slice_leaves:
            new_updates = join_slices(new_updates, updates)
        return new_updates, new_state

    return PagedTransformation(init_fn, update_fn, step_fn)


def _paged_leaves(
    shapes: list[jax.ShapeDtypeStruct], device_budget: int, min_size: int
) -> list[bool]:
    """Which leaves live on the host: all but the small and what fits the budget."""
    hosted = []
    for x in shapes:
        small = x.size < min_size or not x.shape
        fits = not small and _nbytes(x) <= device_budget
        if fits:
            device_budget -= _nbytes(x)
        hosted.append(not (small or fits))
    return hosted


def _placed(leaves: list[Any], hosted: list[bool]) -> list[Any]:
    """Moves leaves to the host, under jit each when the one before it is there.

    A compiler left to itself has three of them on the device at a time.
    """
    placed, last = list(leaves), None
    for i, host in enumerate(hosted):
        if host:
            x = leaves[i]
            if last is not None and isinstance(x, Tracer):
                x, placed[last] = jax.lax.optimization_barrier((x, placed[last]))
            placed[i], last = to_host(x), i
    return placed


def _nbytes(x: jax.ShapeDtypeStruct) -> int:
    return x.size * x.dtype.itemsize


def _check_rows(shapes: Any, hosted: list[bool], page_size: int) -> None:
    for (path, x), host in zip(jax.tree.leaves_with_path(shapes), hosted, strict=True):
        if host and (row := -(-_nbytes(x) // x.shape[0])) > page_size:
            raise ValueError(
                f"{page_size=} bytes is smaller than the {row} bytes of one row of "
                f"state{jax.tree_util.keystr(path)}, {x.shape} {x.dtype}; pass at "
                "least that."
            )


def _check_state(state: Any, shapes: Any, grown: list[bool]) -> None:
    """Raises unless the state is one that this optimizer makes for its parameters."""
    if (found := jax.tree.structure(state)) != (wanted := jax.tree.structure(shapes)):
        raise ValueError(
            "The state is of another optimizer or other parameters. Make it by "
            f"`paged(...).init(params)`.\n  expected: {wanted}\n  got:      {found}"
        )
    paths = jax.tree.leaves_with_path(shapes)
    for (path, x), leaf, front in zip(
        paths, jax.tree.leaves(state), grown, strict=True
    ):
        shape = (1, *x.shape) if front else x.shape
        if jnp.shape(leaf) != shape:
            raise ValueError(
                f"state{jax.tree_util.keystr(path)} has shape {jnp.shape(leaf)}, and "
                f"this optimizer makes {shape} for these parameters. Restore the state "
                "with the `paged` arguments it was saved with."
            )


def _on_one_device(tree: Any) -> bool:
    """Whether every leaf is concrete and on a single device."""
    return not any(
        isinstance(x, Tracer) or (is_concrete(x) and len(x.sharding.device_set) > 1)
        for x in jax.tree.leaves(tree)
    )

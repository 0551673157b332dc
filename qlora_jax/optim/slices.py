"""Parameters cut along their first axis, each slice a leaf of its own."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, Literal

# What computes each number of its result from the numbers at the same place.
_ELEMENTWISE = frozenset(
    "abs add add_any and atan2 broadcast_in_dim cbrt ceil clamp convert_element_type "
    "copy cos cosh device_put div eq erf erfc erf_inv exp exp2 expm1 floor ge gt "
    "integer_pow is_finite le log log1p logistic lt max min mul ne neg nextafter not "
    "optimization_barrier or pow reduce_precision rem round rsqrt select_n sign sin "
    "sinh sqrt square stop_gradient sub tan tanh xor".split()
)


def rows_of_slices(params: Any, state: Any, page_size: int, min_size: int) -> Any:
    """Returns how many rows a slice of each parameter has, 0 for one left whole.

    Args:
        params: the parameters, or their shapes.
        state: the shapes of the optimizer's state; what it needs for one number of the
            parameters, on average, says which parameters exceed a page.
        page_size: bytes of state in a page.
        min_size: numbers below which a parameter is never cut.

    Raises:
        ValueError: if the state of one row exceeds a page.
    """
    sizes = [math.prod(jnp.shape(x)) for x in jax.tree.leaves(params)]
    numbers = sum(size for size in sizes if size >= min_size)
    large = [x for x in jax.tree.leaves(state) if x.size >= max(min_size, 2)]
    state_bytes = sum(x.size * x.dtype.itemsize for x in large)
    bytes_of_one = state_bytes / max(numbers, 1)

    def rows(param) -> int:
        shape = jnp.shape(param)
        size = math.prod(shape)
        if not shape or size < min_size or size * bytes_of_one <= page_size:
            return 0
        row_bytes = math.ceil(size // shape[0] * bytes_of_one)
        if row_bytes > page_size:
            raise ValueError(
                f"{page_size=} bytes is smaller than the {row_bytes} bytes of state of "
                f"one row of a {shape} parameter; pass at least that."
            )
        slices = -(-shape[0] // (page_size // row_bytes))
        return -(-shape[0] // slices)

    return jax.tree.map(rows, params)


def slice_tree(tree: Any, rows: Any) -> Any:
    """Replaces each leaf by a tuple of slices with `rows` rows, unless that is 0."""

    def cut(x, step: int):
        if not step:
            return x
        return tuple(x[start : start + step] for start in range(0, x.shape[0], step))

    return jax.tree.map(cut, tree, rows)


def join_slices(sliced: Any, like: Any) -> Any:
    """Undoes `slice_tree`; `like` is a tree with the leaves whole."""

    def join(_, part: Any):
        return jnp.concatenate(part) if isinstance(part, tuple) else part

    return jax.tree.map(join, like, sliced)


def check_elementwise(update: Callable, args: tuple, rows: Any) -> None:
    """Raises unless an update treats every number of a cut parameter alike.

    A sum over all slices of a parameter (a global norm) is the sum over the parameter,
    but one over some of its slices is another optimizer's: a trust ratio, a factored
    moment, scales of a block.

    Args:
        update: of updates, state and parameters.
        args: these, the first and the last cut (the last possibly None).
        rows: what they were cut by.

    Raises:
        ValueError: if an output mixes numbers of one slice but not of its siblings.
    """
    updates, state, params = args
    jaxpr = jax.make_jaxpr(update)(*args).jaxpr
    before_params = len(jax.tree.leaves((updates, state)))
    wholes = _groups(updates, rows, 0)
    if params is not None:
        wholes += _groups(params, rows, before_params)
    cut = sum(wholes)
    inputs = [(cut & 1 << i, 0) for i in range(len(jaxpr.invars))]
    for _, mixed in _mixing(jaxpr, inputs):
        if any(mixed & whole not in (0, whole) for whole in wholes):
            raise ValueError(
                "slice_leaves=True is for optimizers that treat every number alike, "
                "and this one computes over a leaf (a norm, a factored moment, blocks "
                "of scales). Leave it False: pages are then groups of whole leaves."
            )


def _groups(tree: Any, rows: Any, start: int) -> list[int]:
    """For each cut leaf the set of its slices, counted from `start`, as bits."""
    treedef = jax.tree.structure(tree)
    numbers = treedef.unflatten(range(start, start + treedef.num_leaves))
    parts = jax.tree.structure(rows).flatten_up_to(numbers)
    return [sum(1 << i for i in part) for part in parts if isinstance(part, tuple)]


def _mixing(jaxpr: Jaxpr, inputs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """For each output: the inputs it depends on, and those it mixes the numbers of."""
    known = dict(zip(jaxpr.invars, inputs, strict=True))

    def read(atom) -> tuple[int, int]:
        return (0, 0) if isinstance(atom, Literal) else known.get(atom, (0, 0))

    for eqn in jaxpr.eqns:
        operands = [read(atom) for atom in eqn.invars]
        if eqn.primitive.name in ("jit", "pjit"):
            results = _mixing(eqn.params["jaxpr"].jaxpr, operands)
        else:
            depends = mixed = 0
            for d, m in operands:
                depends |= d
                mixed |= m
            if eqn.primitive.name not in _ELEMENTWISE:
                mixed |= depends
            results = [(depends, mixed)] * len(eqn.outvars)
        known.update(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]

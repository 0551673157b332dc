"""Plain functions of arrays, called with weights that are not arrays.

A function is traced with arrays of the weights' shapes, and the trace is run with the
weights themselves: each product of something with a weight becomes `x @ w`. Nothing of
JAX is patched and no code is rewritten.
"""

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.extend.core import primitives

from qlora_jax.lora.forms import KernelForm
from qlora_jax.lora.initial import dense
from qlora_jax.lora.layers import contract, dot_product
from qlora_jax.lora.lora import LoraTensor
from qlora_jax.lora.merge import merged_array
from qlora_jax.lora.places import is_weight
from qlora_jax.lora.rows import TrainedRows


def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function that takes weights where `function` takes arrays.

    `function` may be anything that JAX can trace: it writes `x @ w`, `jnp.dot`,
    `jnp.einsum`, `lax.dot_general`, `jax.vmap` of them; it casts, transposes, stacks
    layers for `lax.scan`; it calls `jax.jit`, `jax.checkpoint`, `lax.cond`. A weight
    that meets a product which sums over its `in` axes is multiplied as a weight. Where
    it meets anything else it is made an array first, dequantized and with its adapter
    added: right always, and a warning says where, since it takes the memory that the
    weight was to save.

    Args:
        function: of pytrees of arrays. It is traced anew at each call: put the result
            under `jax.jit`.

    Returns:
        A function of the same arguments, in which LoraTensors and QuantizedTensors may
        stand for arrays of their shapes (the kernel's, if `add_lora(forms=...)` laid it
        out as a matrix).

    Raises:
        NotImplementedError: by the result, if a weight with dropout or several adapters
            would have to become an array.
    """

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        leaves, tree = jax.tree.flatten((args, kwargs), is_leaf=is_weight)
        leaves = [x.array() if isinstance(x, TrainedRows) else x for x in leaves]
        is_input = [is_weight(x) or hasattr(x, "dtype") for x in leaves]
        inputs = [x for x, used in zip(leaves, is_input, strict=True) if used]

        def of_arrays(*arrays):
            given = iter(arrays)
            both = zip(leaves, is_input, strict=True)
            args, kwargs = jax.tree.unflatten(
                tree, [next(given) if used else x for x, used in both]
            )
            return function(*args, **kwargs)

        shapes = [_Held.of(x).abstract if is_weight(x) else x for x in inputs]
        jaxpr, out = jax.make_jaxpr(of_arrays, return_shape=True)(*shapes)
        held = [_Held.of(x) if is_weight(x) else x for x in inputs]
        results = map(_array, _run(jaxpr.jaxpr, jaxpr.consts, held))
        return jax.tree.unflatten(jax.tree.structure(out), list(results))

    return wrapped


class _Held:
    """A weight, as the array it stands for after casts and transpositions.

    Its axis i is axis `axes[i]` of the kernel, less the stack axes in front, which
    stay where they are.
    """

    def __init__(self, weight: Any, form: KernelForm, axes: Sequence[int], dtype: Any):
        self.weight, self.form, self.axes, self.dtype = weight, form, axes, dtype

    @classmethod
    def of(cls, weight: Any) -> "_Held":
        form = getattr(weight, "form", None)
        if form is None:
            form = KernelForm(tuple(weight.shape[-2:]), (0,), (1,))
        return cls(weight, form, tuple(range(len(form.shape))), weight.dtype)

    @property
    def stack(self) -> tuple[int, ...]:
        depth = len(self.weight.shape) - len(self.form.matrix_shape)
        return tuple(self.weight.shape[:depth])

    @property
    def abstract(self) -> jax.ShapeDtypeStruct:
        shape = (*self.stack, *(self.form.shape[a] for a in self.axes))
        return jax.ShapeDtypeStruct(shape, self.dtype)

    def array(self, why: str) -> jax.Array:
        weight = self.weight
        if isinstance(weight, LoraTensor) and (
            weight.num_adapters is not None
            or (weight.key is not None and weight.dropout)
        ):
            raise NotImplementedError(
                f"{weight!r} meets {why}, which needs an array, and one with dropout "
                "or several adapters is none."
            )
        warnings.warn(
            f"A weight meets {why} and is made an array: {weight!r}. Written as a "
            "product with the weight, the call would save that memory.",
            stacklevel=2,
        )
        if isinstance(weight, LoraTensor):
            whole = merged_array(weight)
        else:
            whole = dense(weight)
        depth = len(self.stack)
        order = (*range(depth), *(depth + a for a in self.axes))
        return self.form.kernel(whole).transpose(order).astype(self.dtype)


def _array(value: Any, why: str = "the end of the function") -> Any:
    return value.array(why) if isinstance(value, _Held) else value


def _run(jaxpr: core.Jaxpr, consts: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
    """Evaluates a jaxpr of which some values are weights."""
    values: dict[Any, Any] = {}

    def read(var):
        return var.val if isinstance(var, core.Literal) else values[var]

    values.update(zip(jaxpr.constvars, consts, strict=True))
    values.update(zip(jaxpr.invars, inputs, strict=True))
    for equation in jaxpr.eqns:
        operands = [read(var) for var in equation.invars]
        if any(isinstance(x, _Held) for x in operands):
            rule = _RULES.get(equation.primitive)
            results = None if rule is None else rule(equation, operands)
            if results is None:
                name = equation.primitive.name
                operands = [_array(x, f"`{name}`") for x in operands]
                results = _bind(equation, operands)
        else:
            results = _bind(equation, operands)
        values.update(zip(equation.outvars, results, strict=True))
    return [read(var) for var in jaxpr.outvars]


def _bind(equation: Any, operands: Sequence[Any]) -> list[Any]:
    """Runs an equation as it stands, with the rules of differentiation it has."""
    params = equation.primitive.get_bind_params(equation.params)
    with equation.ctx.manager:
        results = equation.primitive.bind(*operands, **params)
    return list(results) if equation.primitive.multiple_results else [results]


def _dot_general(equation: Any, operands: Sequence[Any]) -> list[Any] | None:
    """X · w where exactly the weight's `in` axes are summed over."""
    left, right = operands
    (left_axes, right_axes), (left_batch, right_batch) = equation.params[
        "dimension_numbers"
    ]
    if isinstance(left, _Held) and isinstance(right, _Held):
        return None
    on_left = isinstance(left, _Held)
    held, x = (left, right) if on_left else (right, left)
    axes, batch = (left_axes, left_batch) if on_left else (right_axes, right_batch)
    x_axes, x_batch = (right_axes, right_batch) if on_left else (left_axes, left_batch)
    form, depth = held.form, len(held.stack)
    if form.kind != "linear":
        return None
    # Labels of the weight's axes: -depth, ..., -1 for the stack, then the kernel's.
    labels = [*range(-depth, 0), *held.axes]
    summed, shared = [labels[a] for a in axes], [labels[a] for a in batch]
    wanted = [*range(-depth, 0), *form.batch]
    alone = [a for a in range(-depth, 0) if a not in shared]
    if sorted(shared + alone) != sorted(wanted) or sorted(summed) != sorted(
        form.contracted
    ):
        return None
    # Matrices of a stack that the equation gives the whole of x get it each.
    x = jnp.broadcast_to(x, (*(held.stack[a] for a in alone), *x.shape))
    x_axes, x_batch = ([a + len(alone) for a in some] for some in (x_axes, x_batch))
    x_batch, shared_first = [*range(len(alone)), *x_batch], [*alone, *shared]
    params = equation.params
    y = contract(
        x,
        held.weight,
        axis=[x_axes[summed.index(a)] for a in form.contracted],
        batch_axis=[x_batch[shared_first.index(a)] for a in wanted],
        features=form.free_shape,
        product=dot_product(
            jax.lax.dot_general,
            precision=params["precision"],
            dtype=held.dtype,
            preferred=params["preferred_element_type"],
        ),
    )
    # y: [*wanted, *rows, *form.free]. The equation has its own order of batch axes,
    # then the free axes of the left operand, then those of the right.
    n_free = len(form.free)
    rows = list(range(len(wanted), y.ndim - n_free))
    own = [
        wanted.index(a) if a in alone else y.ndim - n_free + form.free.index(a)
        for a in labels
        if a in alone or a in form.free
    ]
    order = [wanted.index(a) for a in shared]
    order += own + rows if on_left else rows + own
    return [y.transpose(order)]


def _cast(equation: Any, operands: Sequence[Any]) -> list[Any] | None:
    (held,) = operands
    dtype = equation.params["new_dtype"]
    if not jnp.issubdtype(dtype, jnp.floating):
        return None
    return [_Held(held.weight, held.form, held.axes, jnp.dtype(dtype))]


def _transpose(equation: Any, operands: Sequence[Any]) -> list[Any] | None:
    (held,) = operands
    permutation, depth = equation.params["permutation"], len(held.stack)
    if permutation[:depth] != tuple(range(depth)):
        return None
    axes = tuple(held.axes[p - depth] for p in permutation[depth:])
    return [_Held(held.weight, held.form, axes, held.dtype)]


def _squeeze(equation: Any, operands: Sequence[Any]) -> list[Any] | None:
    (held,) = operands
    dimensions = equation.params["dimensions"]
    if any(d >= len(held.stack) for d in dimensions):
        return None
    weight = jax.tree.map(lambda x: jnp.squeeze(x, dimensions), held.weight)
    return [_Held(weight, held.form, held.axes, held.dtype)]


def _slice(equation: Any, operands: Sequence[Any]) -> list[Any] | None:
    """One or more layers of a stack, as `w[i]` takes them."""
    held, *starts = operands
    shape, depth = held.abstract.shape, len(held.stack)
    params = equation.params
    if starts:
        sizes = params["slice_sizes"]
        take = lambda x, a: jax.lax.dynamic_slice_in_dim(x, starts[a], sizes[a], a)
    else:
        first, last = params["start_indices"], params["limit_indices"]
        if params["strides"] is not None and set(params["strides"]) != {1}:
            return None
        sizes = [z - a for a, z in zip(first, last, strict=True)]
        take = lambda x, a: jax.lax.slice_in_dim(x, first[a], last[a], axis=a)
    if tuple(sizes[depth:]) != tuple(shape[depth:]):
        return None
    weight = held.weight
    for axis in range(depth):
        weight = jax.tree.map(functools.partial(take, a=axis), weight)
    return [_Held(weight, held.form, held.axes, held.dtype)]


def _run_body(closed: Any, operands: Sequence[Any]) -> list[Any]:
    """Runs the jaxpr that a parameter of an equation is."""
    jaxpr, consts = getattr(closed, "jaxpr", closed), getattr(closed, "consts", ())
    return _run(jaxpr, consts, operands)


def _call(equation: Any, operands: Sequence[Any]) -> list[Any]:
    """jit: its body, inlined."""
    return _run_body(equation.params["jaxpr"], operands)


def _split(operands: Sequence[Any]):
    """The operands as a pytree of arrays, and the function back from it."""
    held = [x if isinstance(x, _Held) else None for x in operands]
    leaves = [x.weight if isinstance(x, _Held) else x for x in operands]

    def back(leaves):
        return [
            leaf if h is None else _Held(leaf, h.form, h.axes, h.dtype)
            for leaf, h in zip(leaves, held, strict=True)
        ]

    return leaves, back


def _checkpoint(equation: Any, operands: Sequence[Any]) -> list[Any]:
    leaves, back = _split(operands)
    params = equation.params

    @functools.partial(
        jax.checkpoint, prevent_cse=params["prevent_cse"], policy=params["policy"]
    )
    def body(leaves):
        return list(map(_array, _run_body(params["jaxpr"], back(leaves))))

    return body(leaves)


def _scan(equation: Any, operands: Sequence[Any]) -> list[Any] | None:
    """A loop, over the same pytrees with weights in them."""
    params, closed = equation.params, equation.params["jaxpr"]
    body_in, body_out = closed.in_avals, closed.out_avals
    # What is stacked has an axis more outside; the rest are constants, then the carry.
    rank = lambda var: len(var.aval.shape)
    both_out = zip(equation.outvars, body_out, strict=True)
    num_carry = sum(rank(var) == len(aval.shape) for var, aval in both_out)
    both_in = zip(equation.invars, body_in, strict=True)
    num_consts = sum(rank(v) == len(aval.shape) for v, aval in both_in) - num_carry
    consts = operands[:num_consts]
    init = operands[num_consts : num_consts + num_carry]
    stacked = operands[num_consts + num_carry :]
    if any(isinstance(x, _Held) for x in init) or any(
        isinstance(x, _Held) and not x.stack for x in stacked
    ):
        return None
    leaves, back = _split(stacked)

    def body(carry, leaves):
        inputs = [*consts, *carry, *back(leaves)]
        out = list(map(_array, _run_body(closed, inputs)))
        return out[:num_carry], out[num_carry:]

    carry, out = jax.lax.scan(
        body,
        list(init),
        leaves,
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    return [*carry, *out]


def _cond(equation: Any, operands: Sequence[Any]) -> list[Any] | None:
    index, *rest = operands
    leaves, back = _split(rest)

    def branch(closed):
        return lambda leaves: list(map(_array, _run_body(closed, back(leaves))))

    return jax.lax.switch(index, list(map(branch, equation.params["branches"])), leaves)


_RULES: dict[Any, Callable[[Any, Sequence[Any]], list[Any] | None]] = {
    primitives.dot_general_p: _dot_general,
    primitives.convert_element_type_p: _cast,
    primitives.transpose_p: _transpose,
    primitives.squeeze_p: _squeeze,
    primitives.slice_p: _slice,
    primitives.dynamic_slice_p: _slice,
    primitives.scan_p: _scan,
    primitives.cond_p: _cond,
    primitives.jit_p: _call,
    primitives.remat_p: _checkpoint,
}

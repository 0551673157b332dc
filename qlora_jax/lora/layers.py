"""What layers of Flax compute, over weights that are not arrays.

Shared by the modules of `lora/nnx.py` and the interception of `lora/linen.py`. A weight
here is a LoraTensor, a QuantizedTensor or an array in the matrix form of its kernel.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from qlora_jax.lora.forms import Equation, KernelForm
from qlora_jax.lora.lora import LoraTensor, Product, unwrapped
from qlora_jax.lora.rows import TrainedRows
from qlora_jax.quant import QuantizedTensor, dequantize

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

# From an input and a kernel to what the convolution of the layer, less its bias, gives.
Convolve = Callable[[Any, Any], Any]


def dot_product(
    dot_general: Callable[..., Any],
    *,
    precision: Any,
    dtype: Any,
    preferred: Any = None,
) -> Product:
    """Returns the product of a layer with a matrix, made with the layer's own options.

    Args:
        dot_general: with the signature of `lax.dot_general`.
        precision: of the product of arrays.
        dtype: that the layer casts its kernel to.
        preferred: the type of the result, or None.

    Returns:
        A function from x [..., in] and w [in, out] to [..., out]. Quantized weights
        multiply in their own way: of the options only `preferred` then counts.
    """
    options = {} if preferred is None else {"preferred_element_type": preferred}

    def product(x, w):
        if isinstance(w, QuantizedTensor):
            y = x @ w
            return y if preferred is None else y.astype(preferred)
        dims = (((x.ndim - 1,), (0,)), ((), ()))
        return dot_general(x, w.astype(dtype), dims, precision=precision, **options)

    return product


def multiply(weight: Any, x: Any, product: Product) -> Any:
    """Returns the product of x [*batch, ..., in] with a weight [*batch, in, out]."""
    if isinstance(weight, LoraTensor):
        return weight.multiply(x, product)
    if isinstance(weight, TrainedRows):  # a table is multiplied by its transpose
        return weight.each(lambda w: product(x, w if weight.axis else w.T))
    if len(weight.shape) > 2:
        return jax.vmap(lambda x, w: multiply(w, x, product))(x, weight)
    return product(x, weight)


def contract(
    x: "Float[Array, '...']",
    weight: Any,
    *,
    axis: Sequence[int],
    batch_axis: Sequence[int] = (),
    features: Sequence[int],
    product: Product,
) -> "Float[Array, '...']":
    """Returns what `lax.dot_general(x, kernel, ...)` gives for the weight's kernel.

    Args:
        x: the input.
        weight: [*batch, in, out].
        axis: axes of x to sum over, in the order of the kernel's.
        batch_axis: axes of x that the kernel has too, in its order.
        features: the sizes that `out` is flattened from.
        product: see `dot_product`.

    Returns:
        [*batch, *the other axes of x, *features].
    """
    axis, batch_axis = ([a % x.ndim for a in axes] for axes in (axis, batch_axis))
    free = [a for a in range(x.ndim) if a not in (*axis, *batch_axis)]
    order = [*batch_axis, *free, *axis]
    x = x if order == list(range(x.ndim)) else x.transpose(order)
    kept = x.shape[: len(order) - len(axis)]
    y = multiply(weight, x.reshape(*kept, weight.shape[-2]), product)
    return y.reshape(*kept, *features)


def einsum(
    x: "Float[Array, '...']",
    weight: Any,
    equation: Equation,
    form: KernelForm,
    product: Product,
) -> "tuple[Float[Array, '...'], tuple[int, ...]]":
    """Returns the einsum of x with the kernel, and the shape of a bias beside it."""
    gap = x.ndim - len(equation.inputs.replace(".", ""))
    # Each axis of an ellipsis gets a digit for its letter.
    ellipsis = "".join(map(str, range(gap)))
    inputs = equation.inputs.replace(".", ellipsis)
    output = equation.output.replace(".", ellipsis)
    kernel = equation.kernel
    y = contract(
        x,
        weight,
        axis=[inputs.index(kernel[i]) for i in form.contracted],
        batch_axis=[inputs.index(kernel[i]) for i in form.batch],
        features=form.free_shape,
        product=product,
    )
    batch = "".join(kernel[i] for i in form.batch)
    rows = "".join(c for c in inputs if c not in kernel)
    have = batch + rows + "".join(kernel[i] for i in form.free)
    bias_shape = (form.shape[kernel.index(c)] if c in kernel else 1 for c in output)
    return y.transpose([have.index(c) for c in output]), tuple(bias_shape)


def convolution(
    x: "Float[Array, '...']",
    weight: Any,
    form: KernelForm,
    convolve: Convolve,
    *,
    groups: int = 1,
) -> "Float[Array, '...']":
    """Returns the convolution of x with a weight's kernel.

    The adapter is one of two convolutions, `a` with the window of the layer and `b` of
    one point: together of rank r, as in PEFT. Where channels come in groups, every
    group is convolved with the one `a`, and multiplied by its own columns of `b`: that
    is what `kernel + scale a b` computes. (PEFT lets `a` see the channels of all
    groups, which no kernel of the layer does.) A quantized kernel is decoded for each
    call, forwards and backwards, and not kept in between.

    Args:
        x: [*batch, *space, in].
        weight: [window * in, out], `in` the channels of a group.
        form: of the kernel.
        convolve: the layer's convolution.
        groups: of its channels.
    """

    def with_window(x, matrix):
        return convolve(x, form.with_free(matrix.shape[-1]).kernel(matrix))

    def project(x, a):  # [*batch, *space, groups, rank]
        h = with_window(x, jnp.tile(a, groups))
        return h.reshape(*h.shape[:-1], groups, a.shape[-1])

    def expand(h, b):
        y = jnp.einsum("...gr,rgo->...go", h, b.reshape(len(b), groups, -1))
        return y.reshape(*y.shape[:-2], -1)

    @jax.checkpoint
    def decoded(x, w):
        return with_window(x, dequantize(w, x.dtype))

    def product(x, w):
        return decoded(x, w) if isinstance(w, QuantizedTensor) else with_window(x, w)

    if isinstance(weight, LoraTensor):
        if groups == 1:
            return weight.multiply(x, product, with_window)
        return weight.multiply(x, product, project, expand)
    return product(x, weight)


def lookup(ids: "Int[Array, '*b']", weight: Any, dtype: Any) -> "Float[Array, '*b d']":
    """Returns rows of an embedding that is held as a weight [d, num].

        y = w[:, ids].T + (a @ b[:, ids]).T * scale

    The adapter's dropout does not act here, as in PEFT.

    Args:
        ids: which rows.
        weight: of matrix form, see `embed_form`.
        dtype: of the result.

    Raises:
        NotImplementedError: if the adapter has a magnitude.
    """
    if isinstance(weight, TrainedRows):
        return weight[ids].astype(dtype)
    if not isinstance(weight, LoraTensor):
        return _columns(weight, ids).astype(dtype)
    if weight.merged is not None:
        return lookup(ids, unwrapped(weight.merged), dtype)
    if weight.magnitude is not None:
        raise NotImplementedError(
            "DoRA rescales the columns of a matrix that is multiplied by: leave "
            "embeddings out of its targets."
        )
    y = _columns(unwrapped(weight.w), ids).astype(dtype)
    a, b = (unwrapped(leaf).astype(dtype) for leaf in (weight.a, weight.b))
    of_row = weight.ids
    if of_row is None:
        return y + _columns(b, ids) @ a.T * weight.scale
    # Of each row of the batch: its adapter's columns, [*b, rank], times that one's a.
    of_row = of_row.reshape(*of_row.shape, *(1,) * (ids.ndim - of_row.ndim))
    at = jnp.maximum(of_row, 0)
    h = b.at[at, :, ids].get(mode="fill", fill_value=jnp.nan)
    several, d, rank = a.shape
    own = at[..., None] == jnp.arange(several, dtype=at.dtype)
    own &= of_row[..., None] >= 0
    h = jnp.where(own[..., None], h[..., None, :], jnp.zeros((), dtype))
    h = jnp.where((at >= several)[..., None, None], jnp.asarray(jnp.nan, dtype), h)
    h = h.reshape(*ids.shape, several * rank)
    return y + h @ jnp.moveaxis(a, 1, 2).reshape(several * rank, d) * weight.scale


def _columns(w: Any, ids: Any) -> Any:
    """w[:, ids] with the ids' axes in front; of quantized rows only those are read."""
    if not isinstance(w, QuantizedTensor):
        return jnp.moveaxis(jnp.take(w, ids, axis=1), 0, -1)
    if w.layer is not None or w.in_features % w.block_size:
        return _columns(dequantize(w), ids)
    flat = ids.reshape(-1)
    absmax = jnp.take(w.absmax, flat, axis=0)
    if w.nested_format is not None:
        blocks = w.in_features // w.block_size
        index = flat[:, None] * blocks + jnp.arange(blocks, dtype=flat.dtype)
        nested = jnp.take(w.nested_absmax, index // w.spec.nested_block_size)
        numbers = jnp.asarray(w.nested_format.codebook, jnp.float32)
        # Two roundings, as `dequantize` has them.
        scaled = jax.lax.optimization_barrier(jnp.take(numbers, absmax) * nested)
        absmax = scaled + w.offset
    rows = dataclasses.replace(
        w,
        codes=jnp.take(w.codes, flat, axis=0),
        absmax=absmax,
        nested_absmax=None,
        offset=None,
        nested_format=None,
        out_features=flat.size,
    )
    return dequantize(rows).T.reshape(*ids.shape, w.in_features)

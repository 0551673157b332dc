"""Models of Flax Linen over params that hold weights which are not arrays.

The params stay a plain tree, in which `add_lora` puts LoraTensors. A Linen model asks
for arrays in it, so its layers are met by `flax.linen.intercept_methods`: those that
find a weight for a kernel compute with it, all others run as they are.

    forms = lora.linen.forms(lambda p: model.apply({"params": p}, x), params)
    params = add_lora(params, rank=16, quantize="nf4", forms=forms, key=key)
    y = lora.linen.apply(model)({"params": params}, x)
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from qlora_jax.lora import layers
from qlora_jax.lora.forms import (
    MASKED,
    Equation,
    KernelForm,
    conv_form,
    embed_form,
    linear_form,
)
from qlora_jax.lora.places import is_weight, named_weights

_LAYERS = (
    nn.Dense,
    nn.DenseGeneral,
    nn.Einsum,
    nn.Conv,
    nn.ConvTranspose,
    nn.Embed,
)


def apply(model: nn.Module) -> Callable[..., Any]:
    """Returns `model.apply`, for variables whose params may hold weights.

    Kernels of Dense, DenseGeneral (and so of attention), Einsum, Conv and tables of
    Embed may be LoraTensors or QuantizedTensors, under `nn.scan`, `nn.vmap`, `nn.remat`
    and `nn.jit` too.

    Args:
        model: any Linen module.

    Returns:
        A function with the arguments of `model.apply`, fit for jit and grad.
    """
    return wrap(model.apply)


def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function that calls Linen models, with its layers taking weights.

    Args:
        function: any that calls `apply` of Linen models: a loss, `TrainState.apply_fn`.

    Returns:
        A function of the same arguments.
    """

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        with nn.intercept_methods(_compute):
            return function(*args, **kwargs)

    return wrapped


def forms(call: Callable[[Any], Any], params: Any) -> dict[str, KernelForm]:
    """Returns which matrix the kernel of each layer is, for `add_lora(forms=...)`.

    A params tree does not tell whether a kernel [768, 12, 64] is a stack of 768 layers
    or one projection to 12 heads; the layer that uses it does. The model is traced with
    abstract values, and nothing is computed.

    Args:
        call: runs the model on params: `lambda params: model.apply({"params": params},
            x, train=False)`. Layers that it does not run are not found.
        params: the tree of params, of arrays or `jax.ShapeDtypeStruct`s.

    Returns:
        The form of each kernel by its path. Layers that cannot be adapted (masked or
        local convolutions, einsums that are no contraction) are left out.
    """
    found: dict[str, KernelForm] = {}

    def note(next_function, args, kwargs, context):
        layer = context.module
        if _is_call(layer, context.method_name) and args:
            name = "/".join((*layer.path, _name(layer)))
            try:
                found[name] = _form(layer, jnp.shape(args[0]), *args[1:], **kwargs)
            except NotImplementedError:
                found.pop(name, None)
        return next_function(*args, **kwargs)

    with nn.intercept_methods(note):
        jax.eval_shape(call, params)
    weights = named_weights(params)
    return {path: form for path, form in found.items() if path in weights}


def _is_call(layer: Any, method: str) -> bool:
    return isinstance(layer, _LAYERS) and method in ("__call__", "attend")


def _name(layer: nn.Module) -> str:
    return "embedding" if isinstance(layer, nn.Embed) else "kernel"


def _form(layer: Any, shape: Any, einsum_str: str | None = None) -> KernelForm:
    """The form of a layer's kernel, given the shape of its input."""
    match layer:
        case nn.Dense():
            return linear_form([shape[-1]], [layer.features])
        case nn.DenseGeneral():
            axis, batch = _axes(layer, len(shape))
            features = _tuple(layer.features)
            return linear_form(
                [shape[a] for a in axis], features, [shape[a] for a in batch]
            )
        case nn.Einsum():
            return Equation.parse(einsum_str or str(layer.einsum_str)).form(layer.shape)
        case nn.Embed():
            return embed_form(layer.num_embeddings, layer.features)
    if layer.mask is not None:
        name = f"{'/'.join(layer.path)!r}: "
        raise NotImplementedError(name + MASKED.format(type(layer).__name__))
    swapped = getattr(layer, "transpose_kernel", False)
    sides = [shape[-1] // _groups(layer), layer.features]
    sides = reversed(sides) if swapped else sides
    return conv_form((*_tuple(layer.kernel_size), *sides), swapped=swapped)


def _groups(layer: Any) -> int:
    return getattr(layer, "feature_group_count", 1)


def _tuple(value: Any) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)


def _axes(layer: Any, ndim: int) -> tuple[list[int], list[int]]:
    """Contracted and batch axes of a DenseGeneral's input; Flax sorts them."""
    axis, batch = (_tuple(a) for a in (layer.axis, layer.batch_dims))
    return sorted(a % ndim for a in axis), sorted(a % ndim for a in batch)


def _compute(next_function, args, kwargs, context):
    """The interceptor: computes layers that hold a weight, lets all else pass."""
    layer = context.module
    if isinstance(layer, nn.ConvLocal) and is_weight(
        layer.get_variable("params", "kernel")
    ):
        raise NotImplementedError(
            f"{'/'.join(layer.path)!r} is a ConvLocal, which has a kernel for each "
            "place: leave it out of the targets."
        )
    if not isinstance(layer, _LAYERS):
        return next_function(*args, **kwargs)
    weight = _unboxed(layer.get_variable("params", _name(layer)))
    if not is_weight(weight):
        return next_function(*args, **kwargs)
    if context.method_name == "setup":
        return None  # of Embed, which would ask for an array here
    if not _is_call(layer, context.method_name):
        raise NotImplementedError(
            f"{type(layer).__name__}.{context.method_name} of {'/'.join(layer.path)!r} "
            "over a weight: only __call__ and attend are known."
        )
    return _call(layer, weight, context.method_name, *args, **kwargs)


def _unboxed(value: Any) -> Any:
    """What a `nn.Partitioned` holds, without its constraint on the sharding."""
    return value.value if isinstance(value, nn.Partitioned) else value


def _call(
    layer: Any, weight: Any, method: str, inputs: Any, einsum_str: str | None = None
) -> Any:
    """What the layer's method returns for these inputs."""
    inputs = jnp.asarray(inputs)
    if isinstance(layer, nn.Embed) and method == "__call__":
        if not jnp.issubdtype(inputs.dtype, jnp.integer):
            raise ValueError(f"An embedding is looked up by integers: {inputs.dtype}.")
        return layers.lookup(inputs, weight, layer.dtype or weight.dtype)
    has_bias = not isinstance(layer, nn.Embed) and layer.use_bias
    bias = _unboxed(layer.get_variable("params", "bias")) if has_bias else None
    stand_in = jnp.zeros((1, 1), weight.dtype)
    promoted: Any = layer.promote_dtype(inputs, stand_in, bias, dtype=layer.dtype)
    x, dtype, bias = promoted[0], promoted[1].dtype, promoted[2]
    product = _product(layer, dtype)
    if method == "attend":
        return layers.multiply(weight, x, product)
    form = _form(layer, x.shape, einsum_str)
    if tuple(weight.shape) != form.matrix_shape:
        raise ValueError(
            f"{'/'.join(layer.path)!r} multiplies by a kernel {list(form.shape)}, and "
            f"holds {weight!r}: give add_lora(..., forms=lora.linen.forms(...))."
        )
    match layer:
        case nn.Conv() | nn.ConvTranspose():
            convolve = _convolve(layer, dtype, form)
            groups = _groups(layer)
            y = layers.convolution(x, weight, form, convolve, groups=groups)
            return y if bias is None else y + bias
        case nn.Einsum():
            equation = Equation.parse(einsum_str or str(layer.einsum_str))
            y, bias_shape = layers.einsum(x, weight, equation, form, product)
            return y if bias is None else y + bias.reshape(bias_shape)
        case nn.DenseGeneral():
            axis, batch = _axes(layer, x.ndim)
            features = _tuple(layer.features)
            y = layers.contract(
                x,
                weight,
                axis=axis,
                batch_axis=batch,
                features=features,
                product=product,
            )
            if bias is None:
                return y
            ones = (1,) * (y.ndim - len(batch) - len(features))
            return y + bias.reshape(*y.shape[: len(batch)], *ones, *features)
    y = layers.multiply(weight, x, product)
    return y if bias is None else y + bias


def _product(layer: Any, dtype: Any):
    dot_general = getattr(layer, "dot_general", None) or jax.lax.dot_general
    if getattr(layer, "dot_general_cls", None) is not None:
        dot_general = layer.dot_general_cls()
    return layers.dot_product(
        dot_general,
        precision=getattr(layer, "precision", None),
        dtype=dtype,
        preferred=getattr(layer, "preferred_element_type", None),
    )


def _convolve(layer: Any, dtype: Any, form: KernelForm) -> layers.Convolve:
    (out,) = form.free

    def convolve(x, kernel):
        # Flax's own convolution, of a layer that is this one but for the kernel.
        same: Mapping[str, Any] = {"use_bias": False, "dtype": dtype, "name": None}
        one = layer.clone(parent=None, features=kernel.shape[out], **same)
        return one.apply({"params": {"kernel": kernel}}, x)

    return convolve

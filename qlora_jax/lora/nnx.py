"""Layers of Flax NNX over weights that are not arrays.

`add_lora` turns the layers it chooses, in its copy of the model, into the classes here:
an `nnx.Linear` becomes a `Linear`, which is an `nnx.Linear` still, with its bias, its
options and its place in the model, and a weight for a kernel.
"""

import functools
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qlora_jax.lora import layers
from qlora_jax.lora.forms import (
    MASKED,
    Equation,
    KernelForm,
    conv_form,
    embed_form,
    linear_form,
)
from qlora_jax.lora.lora import unwrapped

_FLAX = (
    nnx.Linear,
    nnx.LinearGeneral,
    nnx.Einsum,
    nnx.Conv,
    nnx.ConvTranspose,
    nnx.Embed,
)


def _refuse(layer: Any, out_sharding: Any) -> None:
    if out_sharding is not None:
        raise NotImplementedError(
            f"{out_sharding=} of an adapted {type(layer).__name__}: constrain the "
            "sharding of its result instead."
        )


def _promoted(layer: Any, x: Any, weight: Any, bias: Any) -> tuple[Any, Any, Any]:
    """X and bias as the layer casts them, and the type that it casts its kernel to."""
    stand_in = jnp.zeros((1, 1), weight.dtype)
    x, kernel, bias = layer.promote_dtype(
        (x, stand_in, None if bias is None else bias[...]), dtype=layer.dtype
    )
    return x, kernel.dtype, bias


class Linear(nnx.Linear):
    """`nnx.Linear` over any weight [in, out]."""

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Returns what `nnx.Linear` does."""
        _refuse(self, out_sharding)
        weight = unwrapped(self.kernel)
        x, dtype, bias = _promoted(self, inputs, weight, self.bias)
        y = layers.multiply(weight, x, _product(self, self.dot_general, dtype))
        return y if bias is None else y + bias


class LinearGeneral(nnx.LinearGeneral):
    """`nnx.LinearGeneral`, and so the projections of `nnx.MultiHeadAttention`."""

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Returns what `nnx.LinearGeneral` does."""
        _refuse(self, out_sharding)
        weight = unwrapped(self.kernel)
        x, dtype, bias = _promoted(self, inputs, weight, self.bias)
        if self.dot_general_cls is not None:
            dot_general = self.dot_general_cls()
        else:
            dot_general = self.dot_general or jax.lax.dot_general
        # Flax sorts the axes, and takes the kernel's as they come.
        y = layers.contract(
            x,
            weight,
            axis=sorted(a % x.ndim for a in self.axis),
            batch_axis=sorted(a % x.ndim for a in self.batch_axis),
            features=self.out_features,
            product=_product(self, dot_general, dtype),
        )
        if bias is None:
            return y
        batch, features = len(self.batch_axis), len(self.out_features)
        ones = (1,) * (y.ndim - batch - features)
        return y + bias.reshape(*bias.shape[:batch], *ones, *self.out_features)


class Einsum(nnx.Einsum):
    """`nnx.Einsum` over any weight; its equation is that of the layer."""

    def __call__(
        self,
        inputs: jax.Array,
        einsum_str: str | None = None,
        out_sharding: Any = None,
    ) -> jax.Array:
        """Returns what `nnx.Einsum` does."""
        _refuse(self, out_sharding)
        weight = unwrapped(self.kernel)
        equation = Equation.parse(einsum_str or self.einsum_str)
        form = equation.form(self.kernel_shape)
        if form != _form_of_einsum(self):
            raise NotImplementedError(
                f"The kernel was adapted for {self.einsum_str!r}, and {einsum_str!r} "
                "contracts other axes of it."
            )
        x, dtype, bias = _promoted(self, inputs, weight, self.bias)
        product = _product(self, jax.lax.dot_general, dtype)
        y, bias_shape = layers.einsum(x, weight, equation, form, product)
        return y if bias is None else y + bias.reshape(bias_shape)


class Conv(nnx.Conv):
    """`nnx.Conv` over any weight [window * in, out]."""

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Returns what `nnx.Conv` does."""
        _refuse(self, out_sharding)
        return _convolved(self, nnx.Conv, inputs, groups=self.feature_group_count)


class ConvTranspose(nnx.ConvTranspose):
    """`nnx.ConvTranspose` over any weight [window * in, out]."""

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Returns what `nnx.ConvTranspose` does."""
        return _convolved(self, nnx.ConvTranspose, inputs, groups=1)


def _convolved(layer: Any, kind: type, inputs: jax.Array, groups: int) -> jax.Array:
    """What a convolution of Flax's returns, over a weight for a kernel."""
    weight = unwrapped(layer.kernel)
    x, dtype, bias = _promoted(layer, inputs, weight, layer.bias)
    options = {**vars(layer), "bias": None, "use_bias": False, "dtype": dtype}

    def convolve(x, kernel):
        # Flax's own convolution, of a layer that is this one but for the kernel.
        other = types.SimpleNamespace(**{**options, "kernel": kernel})
        return kind.__call__(other, x)

    y = layers.convolution(x, weight, layer_form(layer), convolve, groups=groups)
    return y if bias is None else y + bias


class Embed(nnx.Embed):
    """`nnx.Embed` over a weight [features, num], the transpose of its table."""

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Returns the rows of the table that `inputs` names."""
        _refuse(self, out_sharding)
        if not jnp.issubdtype(inputs.dtype, jnp.integer):
            raise ValueError(f"An embedding is looked up by integers: {inputs.dtype}.")
        return layers.lookup(inputs, unwrapped(self.embedding), self.dtype)

    def attend(self, query: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Returns the inner products of `query` with every row of the table."""
        _refuse(self, out_sharding)
        weight = unwrapped(self.embedding)
        (query, stand_in) = self.promote_dtype(
            (query, jnp.zeros((1, 1), weight.dtype)), dtype=self.dtype
        )
        product = layers.dot_product(
            jax.lax.dot_general, precision=None, dtype=stand_in.dtype
        )
        return layers.multiply(weight, query, product)


_CLASSES = {
    nnx.Linear: Linear,
    nnx.LinearGeneral: LinearGeneral,
    nnx.Einsum: Einsum,
    nnx.Conv: Conv,
    nnx.ConvTranspose: ConvTranspose,
    nnx.Embed: Embed,
}


def is_kernel(layer: Any, name: str) -> bool:
    """Whether `name` is the kernel, or the table, of one of Flax's layers."""
    kind = _kind(layer)
    return kind is not None and name == ("embedding" if kind is nnx.Embed else "kernel")


def layer_form(layer: Any) -> KernelForm:
    """Returns the form of the kernel of one of Flax's layers.

    Raises:
        NotImplementedError: if the layer cannot be adapted.
    """
    kind = _kind(layer)
    if kind is nnx.Linear:
        return linear_form([layer.in_features], [layer.out_features])
    if kind is nnx.LinearGeneral:
        batch = list(layer.batch_axis.values())
        return linear_form(layer.in_features, layer.out_features, batch)
    if kind is nnx.Einsum:
        return _form_of_einsum(layer)
    if kind is nnx.Embed:
        return embed_form(layer.num_embeddings, layer.features)
    if layer.mask is not None:
        raise NotImplementedError(MASKED.format(type(layer).__name__))
    swapped = getattr(layer, "transpose_kernel", False)
    return conv_form(layer.kernel_shape, swapped=swapped)


def adapt(layer: Any) -> None:
    """Makes a layer of Flax the class here that takes any weight, in place."""
    kind = _kind(layer)
    if kind is not None and not _is_adapted(layer):
        # The layer keeps its identity, so that it stays shared where it is shared.
        layer.__class__ = _adapted_class(type(layer))


def restore(layer: Any) -> None:
    """Makes a layer the class again that `adapt` found, in place."""
    if _is_adapted(layer):
        layer.__class__ = _original_class(type(layer))


def _is_adapted(layer: Any) -> bool:
    return isinstance(layer, tuple(_CLASSES.values()))


def _kind(layer: Any) -> type | None:
    return next((kind for kind in _FLAX if isinstance(layer, kind)), None)


@functools.cache
def _adapted_class(original: type) -> type:
    if original in _CLASSES:
        return _CLASSES[original]
    # A user's subclass: ours goes between it and Flax's, so that what it calls as
    # `super()` is ours.
    kind = next(kind for kind in _FLAX if issubclass(original, kind))
    bases = (original, _CLASSES[kind])
    return types.new_class(original.__name__, bases)


def _original_class(adapted: type) -> type:
    back = {new: old for old, new in _CLASSES.items()}
    return back.get(adapted, adapted.__bases__[0])


def _form_of_einsum(layer: Any) -> KernelForm:
    return Equation.parse(layer.einsum_str).form(layer.kernel_shape)


def _product(layer: Any, dot_general: Callable[..., Any], dtype: Any):
    return layers.dot_product(
        dot_general,
        precision=layer.precision,
        dtype=dtype,
        preferred=layer.preferred_element_type,
    )

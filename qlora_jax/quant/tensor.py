"""The quantized weight as a value: a pytree that multiplies."""

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

import pallas_kernels
from pallas_kernels import PackedSpec, PackedWeight
from qlora_jax.quant.blockwise import check_block_size
from qlora_jax.quant.formats import DYNAMIC8, Format, get_format

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Shaped

_LEAVES = ("codes", "absmax", "nested_absmax", "offset", "layer")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=list(_LEAVES),
    meta_fields=[
        "format",
        "nested_format",
        "in_features",
        "out_features",
        "block_size",
        "dtype",
    ],
)
@dataclasses.dataclass(frozen=True)
class QuantizedTensor:
    """A frozen weight in 4 or 8 bits, of shape `[*stack, in, out]`, used as `x @ w`.

    The following hold:

    * It stands for `dequantize(w)`; `x @ w` is `x @ dequantize(w)` accumulated in
      float32, without the dequantized weight being kept for the gradient.
    * It is held row per output feature, in the bytes of bitsandbytes: `codes`,
      `absmax`, `nested_absmax` and `offset` are those of `PackedWeight`, each with the
      stack axes in front. Conversion to and from a bitsandbytes checkpoint is free.
    * Blocks of `block_size` run over the flattened `[out, in]`, blocks of 256 scales
      over the flattened scales: they cross rows where they do not divide them.
      The fused kernels, and sharding along `in`, ask for `in % block_size == 0`.
      When sharding, replicate `nested_absmax` and `offset`.
    * The arrays are leaves, everything else is static and never tells of stack axes, so
      a slice taken by `lax.scan` or `jax.tree.map` describes itself truly.
    * It is frozen: differentiating `x @ w` gives x a gradient and the weight none.

    With NF4, blocks of 64 and double quantization it costs 4.127 bits a parameter.

    Attributes:
        codes: uint8 codes; two a byte for formats of 4 bits.
        absmax: the scale of each block, float32, or its uint8 code.
        nested_absmax: float32 scales of the scales, or None.
        offset: float32, the mean that was taken off the scales, or None.
        layer: None, or the index into the one stack axis that makes this value a view
            of one layer; see `at_layer`.
        format: which numbers the codes stand for.
        nested_format: which numbers quantized scales stand for, or None.
        in_features: rows of the matrix that `x @ w` multiplies by.
        out_features: columns of that matrix.
        block_size: numbers that share a scale.
        dtype: the type the weight had, and that `dequantize` returns by default.
    """

    codes: Any
    absmax: Any
    nested_absmax: Any
    offset: Any
    layer: Any
    format: Format
    nested_format: Format | None
    in_features: int
    out_features: int
    block_size: int
    dtype: np.dtype

    # `numpy_array @ w` asks `w` instead of looking at it as an array of objects.
    __array_ufunc__ = None

    @property
    def spec(self) -> PackedSpec:
        """The static description that the kernels take."""
        nested = self.nested_format and self.nested_format.codebook
        return PackedSpec(
            self.format.codebook,
            n=self.out_features,
            k=self.in_features,
            block_size=self.block_size,
            nested_codebook=nested,
        )

    @property
    def packed(self) -> PackedWeight:
        """The arrays that the kernels take."""
        return PackedWeight(
            self.codes, self.absmax, self.nested_absmax, self.offset, self.layer
        )

    @property
    def stack(self) -> tuple[int, ...]:
        """The leading axes, those of layers that are scanned over."""
        is_flat = self.format.bits == 4 and self.in_features % 2
        axes = self.codes.shape[: self.codes.ndim - (1 if is_flat else 2)]
        return axes if self.layer is None else axes[1:]

    @property
    def shape(self) -> tuple[int, ...]:
        """`(*stack, in, out)`, the shape of the weight this stands for."""
        return (*self.stack, self.in_features, self.out_features)

    @property
    def ndim(self) -> int:
        """Length of `shape`."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Parameters, the product of `shape`."""
        return int(np.prod(self.shape))

    @property
    def nbytes(self) -> int:
        """Bytes of all leaves together; of a view, those of its layer."""
        leaves = (self.codes, self.absmax, self.nested_absmax, self.offset)
        total = sum(leaf.nbytes for leaf in leaves if leaf is not None)
        return total if self.layer is None else total // self.codes.shape[0]

    @property
    def bits_per_parameter(self) -> float:
        """Bits that a parameter costs, scales included."""
        return 8 * self.nbytes / self.size

    def at_layer(self, layer: jax.Array | int) -> "QuantizedTensor":
        """Returns a view of one layer of the stack, without slicing it.

        The kernels then index the stack themselves. Inside a loop over layers this
        saves the copy that a slice costs in front of a kernel.

        Args:
            layer: the index, a number or an int32 scalar (which may be traced).

        Raises:
            ValueError: unless there is exactly one stack axis.
        """
        if len(self.stack) != 1 or self.layer is not None:
            raise ValueError(
                f"at_layer takes a weight with one stack axis; this one is {self!r}."
            )
        return dataclasses.replace(self, layer=jnp.asarray(layer, jnp.int32))

    def __getitem__(self, index) -> "QuantizedTensor":
        """Slices the stack axes; `...`, as Flax reads variables, is all of it."""
        if index is Ellipsis:
            return self
        if not self.stack:
            raise IndexError(f"Only stack axes can be indexed; this is {self!r}.")
        if self.layer is not None:
            raise IndexError(f"A view of a layer cannot be indexed; this is {self!r}.")
        return jax.tree.map(lambda leaf: leaf[index], self)

    def __rmatmul__(self, x: jax.Array) -> jax.Array:
        x = jnp.asarray(x)
        stack = self.stack
        if not stack:
            return quantized_matmul(x, self)
        if x.shape[: len(stack)] != stack or x.ndim == len(stack):
            raise ValueError(
                f"x of shape {x.shape} must begin with the stack axes {stack} of "
                f"{self!r}; for one x through all layers, scan over the stack."
            )
        return jax.vmap(lambda x, w: x @ w)(x, self)

    def __repr__(self) -> str:
        try:
            nested = "" if self.nested_format is None else ", double quantization"
            return (
                f"QuantizedTensor({self.format.name}, {list(self.shape)}, "
                f"blocks of {self.block_size}{nested}, "
                f"{self.bits_per_parameter:.3f} bits a parameter, "
                f"{self.nbytes / 1e6:,.2f} MB)"
            )
        except (
            AttributeError,
            TypeError,
        ):  # leaves that are no arrays: a tree of specs
            fields = ", ".join(f"{n}={getattr(self, n)!r}" for n in _LEAVES)
            return f"QuantizedTensor({self.format.name}, {fields})"


def quantized_matmul(
    x: "Float[Array, '*batch in']",
    w: QuantizedTensor,
    *,
    addend: "tuple[Float[Array, '*batch r'], Float[Array, 'out r']] | None" = None,
    onto: "Float[Array, '*batch out'] | None" = None,
    implementation: pallas_kernels.Implementation | None = None,
) -> "Float[Array, '*batch out']":
    """Returns `x @ dequantize(w)`, accumulated in float32; what `x @ w` calls.

    With an `addend` of t and u it returns `x @ dequantize(w) + t @ u.T`, and with
    `onto` the sum of that and `onto`, on Hopper GPUs in one pass.

    The gradient with respect to x is computed from the same codes; the dequantized
    weight is kept neither in between nor for the gradient. Relative error against a
    float64 product with the same dequantized weight: at most 5e-3 for bfloat16 x.

    Args:
        x: `[..., in]`, bfloat16, float16 or float32.
        w: a quantized weight without stack axes.
        addend: t and u, in x's type, or None.
        onto: in x's type, or None.
        implementation: None chooses by device, shape and measurements; a name forces
            one, see `pallas_kernels.Implementation`.

    Returns:
        `[..., out]` in x's type.

    Raises:
        ValueError: if shapes or types do not fit together.
        NotImplementedError: if the implementation that was named cannot do this.
    """
    return pallas_kernels.quantized_matmul(
        x, w.packed, w.spec, addend=addend, onto=onto, implementation=implementation
    )


def transposed_product(
    dy: "Float[Array, '*batch out']",
    w: QuantizedTensor,
    *,
    addend: "tuple[Float[Array, '*batch r'], Float[Array, 'in r']] | None" = None,
    onto: "Float[Array, '*batch in'] | None" = None,
) -> "Float[Array, '*batch in']":
    """Returns dy @ wᵀ, the gradient of `x @ w` with respect to x.

    With an `addend` of t and u, and `onto`, it returns the sum of that, t @ u.T and
    `onto`, as `quantized_matmul` does.
    """
    return pallas_kernels.quantized_matmul_dx(
        dy, w.packed, w.spec, addend=addend, onto=onto
    )


def quantize(
    w: "Shaped[Array, '*stack in out'] | Shaped[np.ndarray, '*stack in out']",
    format: str | Format = "nf4",
    *,
    block_size: int = 64,
    double_quant: bool = True,
) -> QuantizedTensor:
    """Quantizes a weight into blocks of codes, scales quantized in turn.

    With the weight held as rows of output features, flattened, in blocks b:

        absmax[b] = max |w[i]|  over i in b
        code[i]   = argmin_c |w[i] * (1 / absmax[b]) - codebook[c]|

    and with double quantization, in blocks B of 256 scales:

        offset           = mean(absmax)
        nested_absmax[B] = max |absmax[b] - offset|  over b in B
        q[b]             = argmin_c |(absmax[b] - offset) / nested_absmax[B] - map[c]|

    Codes and float32 scales equal those of bitsandbytes bit for bit. Under jit or not;
    with `jax.ShapeDtypeStruct` use `jax.eval_shape`.

    Args:
        w: `[*stack, in, out]`, floating point. Each matrix of the stack is quantized by
            itself.
        format: a name of `FORMATS`, or a format of your own.
        block_size: numbers that share a scale: 32, 64, ... 4096. QLoRA uses 64.
        double_quant: also quantize the scales, which saves 0.373 bits a parameter at
            blocks of 64 for a further error of 0.1 % of the quantization error.

    Returns:
        The quantized weight.

    Raises:
        ValueError: if `w` is no stack of floating-point matrices, the format is
            unknown, the block size is not one of those, or `w` holds NaN or infinity
            (not checked under jit).

    Source: QLoRA, sections 2 and 3 (https://arxiv.org/abs/2305.14314).
    """
    format = get_format(format)
    check_block_size(block_size)
    w = jnp.asarray(w)
    if w.ndim < 2:
        raise ValueError(
            f"A weight has at least two axes, [..., in, out], got shape {w.shape}."
        )
    if not jnp.issubdtype(w.dtype, jnp.floating):
        raise ValueError(f"Only floating point is quantized, got {w.dtype}.")
    if w.size == 0:
        raise ValueError(f"An empty weight cannot be quantized: shape {w.shape}.")
    *stack, k, n = w.shape
    nested_format = DYNAMIC8 if double_quant else None
    nested = nested_format and nested_format.codebook
    spec = PackedSpec(format.codebook, n, k, block_size, nested)
    packed, is_finite = _quantize_stack(w, spec, len(stack))
    if not isinstance(is_finite, Tracer) and not is_finite:
        raise ValueError(
            f"The weight of shape {w.shape} holds NaN or infinity, which no block of "
            "codes can stand for: find out where it comes from, or replace it."
        )
    return QuantizedTensor(
        codes=packed.codes,
        absmax=packed.absmax,
        nested_absmax=packed.nested_absmax,
        offset=packed.offset,
        layer=None,
        format=format,
        nested_format=nested_format,
        in_features=k,
        out_features=n,
        block_size=block_size,
        dtype=w.dtype,
    )


@functools.partial(jax.jit, static_argnums=(1, 2))
def _quantize_stack(
    w: jax.Array, spec: PackedSpec, depth: int
) -> tuple[PackedWeight, jax.Array]:
    def one(w):
        return pallas_kernels.quantize(w.T, spec)

    rows = one
    for _ in range(depth):
        # One matrix at a time: the temporaries are those of one.
        rows = functools.partial(jax.lax.map, rows)
    # Looked for by itself: a maximum drops NaN on some backends.
    return rows(w), jnp.isfinite(w).all()


def dequantize(qt: QuantizedTensor, dtype=None) -> "Float[Array, '*stack in out']":
    """Returns the weight that the codes stand for.

    Each number is `codebook[code] * absmax` in float32, rounded once to `dtype`: equal
    bit for bit to what bitsandbytes decodes from the same bytes.

    Args:
        qt: the quantized weight.
        dtype: of the result; None is the type the weight had.

    Returns:
        `[*stack, in, out]`.
    """
    return _dequantize_stack(qt, jnp.dtype(qt.dtype if dtype is None else dtype))


@functools.partial(jax.jit, static_argnums=1)
def _dequantize_stack(qt: QuantizedTensor, dtype) -> jax.Array:
    if qt.stack:
        return jax.lax.map(lambda one: _dequantize_stack(one, dtype), qt)
    return pallas_kernels.dequantize(qt.packed, qt.spec, dtype).T

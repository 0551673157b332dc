"""The public ops: checks shapes once, chooses an implementation, defines gradients."""

import functools
from typing import TYPE_CHECKING, get_args

import jax
import jax.numpy as jnp

from pallas_kernels import reference, tuning
from pallas_kernels.implementations import Implementation, run
from pallas_kernels.packed import PackedSpec, PackedWeight

if TYPE_CHECKING:
    from jaxtyping import Array, Float


def quantized_matmul(
    x: "Float[Array, '*batch k']",
    packed: PackedWeight,
    spec: PackedSpec,
    *,
    addend: "tuple[Float[Array, '*batch r'], Float[Array, 'n r']] | None" = None,
    onto: "Float[Array, '*batch n'] | None" = None,
    implementation: Implementation | None = None,
) -> "Float[Array, '*batch n']":
    """Multiplies by a quantized weight without keeping it dequantized.

        y[..., n] = sum_k x[..., k] * W[n, k],    W = dequantize(packed, spec)

    and, with an `addend` of t and u, what a low-rank adapter adds,

        y[..., n] += sum_r t[..., r] * u[n, r]

    and, with `onto`, y += onto; all accumulated in float32. Relative error against a
    float64 product with the same dequantized weight: at most 5e-3 for bfloat16 x. The
    gradient with respect to x is `quantized_matmul_dx`; what is saved for it is
    `packed` alone. The weight is frozen and gets no gradient; t, u and `onto` do, and t
    and u are saved for each other's.

    Args:
        x: `[..., k]`, bfloat16, float16 or float32.
        packed: the weight.
        spec: what its arrays mean.
        addend: t and u, in x's type, or None. The Hopper kernel takes them as further
            columns of x and W; elsewhere theirs is a product of its own.
        onto: in x's type, or None. The Hopper kernel adds it before results are
            rounded; elsewhere it is left to the compiler.
        implementation: None chooses by device and shape. "xla" is the plain form, right
            on every backend and under every sharding; "sm90" the Hopper kernel; "sm80"
            the Ampere one; "matvec" the one for few rows of x, "skinny" the one
            for tens; "two_pass" a kernel that decodes the weight, then the library's
            product.

    Returns:
        `[..., n]` in x's type.

    Raises:
        ValueError: if shapes or types do not fit together.
        NotImplementedError: if the implementation that was named cannot do this.
    """
    _check_activation("x", x, spec.k, "k")
    _check_packed(packed, spec)
    _check_addend(addend, "x", x, spec.n, "n")
    _check_onto(onto, "x", x, spec.n, "n")
    _check_implementation(implementation)
    return _matmul(x, packed, addend, onto, spec, implementation)


def quantized_matmul_dx(
    dy: "Float[Array, '*batch n']",
    packed: PackedWeight,
    spec: PackedSpec,
    *,
    addend: "tuple[Float[Array, '*batch r'], Float[Array, 'k r']] | None" = None,
    onto: "Float[Array, '*batch k'] | None" = None,
    implementation: Implementation | None = None,
) -> "Float[Array, '*batch k']":
    """The gradient of `quantized_matmul` with respect to x.

        dx[..., k] = sum_n dy[..., n] * W[n, k]  (+ sum_r t[..., r] * u[k, r] + onto)

    Args:
        dy: `[..., n]`, bfloat16, float16 or float32.
        packed: the weight.
        spec: what its arrays mean.
        addend: t and u, as in `quantized_matmul`: for an adapter x @ a @ b the gradient
            of x @ a, and a.
        onto: as in `quantized_matmul`: for an x that several weights multiply the sum
            of the gradients before.
        implementation: as in `quantized_matmul`.

    Returns:
        `[..., k]` in dy's type.

    Raises:
        ValueError: if shapes or types do not fit together.
        NotImplementedError: if the implementation that was named cannot do this.
    """
    _check_activation("dy", dy, spec.n, "n")
    _check_packed(packed, spec)
    _check_addend(addend, "dy", dy, spec.k, "k")
    _check_onto(onto, "dy", dy, spec.k, "k")
    _check_implementation(implementation)
    return _dispatch("matmul_dx", dy, packed, addend, onto, spec, implementation)


def dequantize(
    packed: PackedWeight, spec: PackedSpec, dtype=jnp.float32
) -> "Float[Array, 'n k']":
    """Returns the [n, k] weight that the codes stand for.

    `codebook[code] * absmax` in float32, rounded once to `dtype`: equal bit for bit to
    what bitsandbytes decodes from the same bytes.

    Raises:
        ValueError: if the arrays do not fit `spec`.
    """
    _check_packed(packed, spec)
    return reference.dequantize(packed, spec, dtype)


def quantize(w: "Float[Array, 'n k']", spec: PackedSpec) -> PackedWeight:
    """Quantizes an [n, k] weight; see `reference.quantize` for the definition.

    On a GPU a kernel does it in one pass where it can: it divides as the definition
    does, while XLA's division may be off by a unit in the last place, which moves a
    code where a number lies between two.

    Raises:
        ValueError: if `w` is not `[spec.n, spec.k]`.
    """
    if w.shape != (spec.n, spec.k):
        raise ValueError(f"{w.shape=} must be ({spec.n=}, {spec.k=}).")
    if tuning.has_one_hopper():
        from pallas_kernels import quantize_kernel  # the GPU part of Pallas

        try:
            return quantize_kernel.quantize(w, spec)
        except NotImplementedError:
            pass
    return reference.quantize(w, spec)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _matmul(x, packed, addend, onto, spec, implementation):
    return _dispatch("matmul", x, packed, addend, onto, spec, implementation)


def _matmul_fwd(x, packed, addend, onto, spec, implementation):
    y = _matmul(x, packed, addend, onto, spec, implementation)
    # Of onto only whether there is one, which the structure says.
    return y, (packed, addend, None if onto is None else ())


def _matmul_bwd(spec, implementation, saved, dy):
    packed, addend, added = saved
    # Kernels for few rows have no backward of their own; one was named for the forward.
    named = None if implementation in ("matvec", "skinny") else implementation
    dx = _dispatch("matmul_dx", dy, packed, None, None, spec, named)
    d_onto = None if added is None else dy
    if addend is None:
        return dx, None, None, d_onto
    t, u = addend
    by_row, t_by_row = (array.reshape(-1, array.shape[-1]) for array in (dy, t))
    du = reference.dot(by_row.T, t_by_row.T, contract=1)
    return dx, None, (reference.dot(dy, u, contract=0), du), d_onto


_matmul.defvjp(_matmul_fwd, _matmul_bwd)


def _dispatch(op, x, packed, addend, onto, spec, implementation):
    """Runs the named implementation, or the first of the tuned order that can."""
    rows = x.reshape(-1, x.shape[-1])
    adds = addend is not None or onto is not None
    if addend is not None:
        t, u = addend
        addend = t.reshape(-1, u.shape[1]), u
    if onto is not None:
        onto = onto.reshape(-1, onto.shape[-1])
    names = (implementation,) if implementation else None
    for name in names or tuning.preference(
        op, rows.shape[0], x.dtype, packed, spec, adds
    ):
        try:
            out = run(name, op, rows, packed, spec, addend, onto)
        except NotImplementedError:
            if names:
                raise
            continue
        return out.reshape(*x.shape[:-1], out.shape[-1])
    raise AssertionError("the plain form can do every op")


def _check_activation(name: str, x: jax.Array, size: int, letter: str) -> None:
    if x.ndim < 1 or x.shape[-1] != size:
        raise ValueError(
            f"The last axis of {name} must be {letter}={size} of the weight; "
            f"{name}.shape={x.shape}."
        )
    if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise ValueError(
            f"{name} must be float32, bfloat16 or float16, got {x.dtype}: cast it."
        )


def _check_addend(addend, name: str, x: jax.Array, size: int, letter: str) -> None:
    if addend is None:
        return
    t, u = addend
    if u.ndim != 2 or u.shape[0] != size or t.shape != (*x.shape[:-1], u.shape[1]):
        raise ValueError(
            f"addend of {t.shape=} and {u.shape=} must be [..., r] with the rows of "
            f"{name}, of shape {x.shape}, and [{letter}, r] with {letter}={size} of "
            "the weight."
        )
    if t.dtype != x.dtype or u.dtype != x.dtype:
        raise ValueError(
            f"addend of {t.dtype=} and {u.dtype=} must be {x.dtype} as {name} is: "
            "cast it."
        )


def _check_onto(onto, name: str, x: jax.Array, size: int, letter: str) -> None:
    if onto is None:
        return
    if onto.shape != (*x.shape[:-1], size):
        raise ValueError(
            f"{onto.shape=} must be [..., {letter}] with the rows of {name}, of shape "
            f"{x.shape}, and {letter}={size} of the weight."
        )
    if onto.dtype != x.dtype:
        raise ValueError(f"{onto.dtype=} must be {x.dtype} as {name} is: cast it.")


def _check_packed(packed: PackedWeight, spec: PackedSpec) -> None:
    if spec.bits == 8:
        codes = (spec.n, spec.k)
    elif spec.k % 2 == 0:
        codes = (spec.n, spec.k // 2)
    else:
        codes = (-(-spec.n * spec.k // 2),)
    if spec.blocks_in_rows:
        absmax = (spec.n, spec.k // spec.block_size)
    else:
        absmax = (spec.num_blocks,)
    stack = packed.codes.shape[:1] if packed.layer is not None else ()
    for name, leaf, shape in (
        ("codes", packed.codes, codes),
        ("absmax", packed.absmax, absmax),
    ):
        if leaf.shape != (*stack, *shape):
            hint = (
                " A stack of weights is multiplied one layer at a time: slice it, scan "
                "over it, or set `layer`."
                if leaf.ndim > len(stack) + len(shape)
                else ""
            )
            raise ValueError(
                f"{name} of shape {leaf.shape} must be {(*stack, *shape)} for "
                f"n={spec.n}, k={spec.k}, block_size={spec.block_size}.{hint}"
            )
    if (spec.nested_codebook is None) != (packed.nested_absmax is None):
        raise ValueError(
            "nested_absmax and nested_codebook go together: got "
            f"nested_absmax={packed.nested_absmax is not None}, "
            f"nested_codebook={spec.nested_codebook is not None}."
        )


def _check_implementation(implementation: str | None) -> None:
    if implementation is not None and implementation not in get_args(Implementation):
        raise ValueError(
            f"Unknown {implementation=}: None or one of {get_args(Implementation)}."
        )

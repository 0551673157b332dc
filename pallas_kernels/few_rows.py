"""What the kernels for few and for tens of rows of x share: checks and operands."""

import jax
import jax.numpy as jnp

from pallas_kernels.matvec_plan import BLOCK
from pallas_kernels.packed import PackedSpec, PackedWeight


def check(m: int, most: int, dtype, spec: PackedSpec) -> None:
    """Raises where such a kernel cannot multiply.

    Args:
        m: rows of x.
        most: how many the kernel can take.
        dtype: of x.
        spec: of the weight.

    Raises:
        NotImplementedError: saying what it is.
    """
    if dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"{dtype=} of x must be bfloat16 or float16.")
    if spec.bits != 4:
        raise NotImplementedError(f"codes of {spec.bits} bits must have 4.")
    if not 1 <= m <= most:
        raise NotImplementedError(f"{m=} rows of x must be 1 to {most}.")
    if spec.k % BLOCK:
        raise NotImplementedError(f"k={spec.k} must be a multiple of {BLOCK}.")


def operands(
    x: jax.Array, packed: PackedWeight, **own: jax.Array
) -> dict[str, jax.Array]:
    """The operands of a call by name, in the order in which the kernel takes them.

    Args:
        x: [m, k].
        packed: the weight; its leaves that are None are left out.
        own: what one kernel alone takes.
    """
    named = {"x": x, "codes": packed.codes, "absmax": packed.absmax, **own}
    if packed.nested_absmax is not None:
        named["nested_absmax"] = packed.nested_absmax
        named["offset"] = jnp.reshape(packed.offset, (-1,))
    if packed.layer is not None:
        named["layer"] = jnp.reshape(packed.layer, (1,)).astype(jnp.int32)
    return named

"""Causal attention of rows over themselves, by the best library for the device."""

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float


def attention(
    q: "Float[Array, 'b t h c']",
    k: "Float[Array, 'b t k c']",
    v: "Float[Array, 'b t k c']",
    *,
    mask: "Bool[Array, 'b 1 t t'] | None",
    window: int | None,
) -> "Float[Array, 'b t h c']":
    """Causal attention of a row over itself: cuDNN's where it can, else XLA's.

    Args:
        q: queries, rotated.
        k: keys, rotated; `h` is a multiple of `k`.
        v: values.
        mask: which pairs belong together besides being causal; None for all.
        window: how many last tokens a token sees, itself included; None for all.
    """
    # cuDNN's flash attention: NVIDIA GPUs, 16-bit, heads of 8 to 128 in steps of 8, and
    # with a mask an even number of tokens.
    dtype_fits = q.dtype in (jnp.bfloat16, jnp.float16)
    head_fits = q.shape[-1] % 8 == 0 and q.shape[-1] <= 128
    mask_fits = mask is None or q.shape[1] % 2 == 0
    on_gpu = jax.default_backend() == "gpu"
    flash = dtype_fits and head_fits and mask_fits and on_gpu
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        mask=mask,
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn" if flash else "xla",
    )

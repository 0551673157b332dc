"""Float32 numbers from the words in which they were loaded, and words to store."""

import itertools

import jax.numpy as jnp

from pallas_kernels import emit


def half_of(dtype) -> str | None:
    """What PTX calls a type of 16 bits; None for float32."""
    return {"bfloat16": "bf16", "float16": "f16"}.get(jnp.dtype(dtype).name)


def widen(words: list, half: str | None) -> list:
    """Returns the numbers of words in float32, in their order.

    Args:
        words: of two numbers each, or of one if they are float32.
        half: "bf16" or "f16"; None for float32.
    """
    if half is None:
        return [emit.from_bits(word) for word in words]
    if half == "bf16":
        text = "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;"
    else:
        text = (
            "{.reg .b16 l, h; mov.b32 {l, h}, $2; "
            "cvt.f32.f16 $0, l; cvt.f32.f16 $1, h;}"
        )
    pairs = [emit.ptx(text, word, out="ff", pure=True) for word in words]
    return [*itertools.chain(*pairs)]


def narrow(numbers: list, half: str | None) -> list:
    """Returns words of the numbers, each rounded to nearest even: `widen`'s inverse.

    Args:
        numbers: float32, an even count of them.
        half: "bf16" or "f16", two in a word; None for float32.
    """
    if half is None:
        return [emit.to_bits(number) for number in numbers]
    text = f"cvt.rn.{half}x2.f32 $0, $2, $1;"
    pairs = itertools.batched(numbers, 2)
    return [emit.ptx(text, *pair, out="r", pure=True) for pair in pairs]

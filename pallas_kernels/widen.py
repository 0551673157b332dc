"""Float32 numbers from the words in which 16-bit ones were loaded."""

import itertools

from pallas_kernels import emit


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

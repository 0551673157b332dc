"""The number formats: which numbers the codes of a weight stand for.

A format is one value of this table. Codebooks are plain tuples, in the order of the
codes, so that they are static under jit and reach a kernel as data.
"""

import dataclasses
import functools

import numpy as np


@dataclasses.dataclass(frozen=True)
class Format:
    """A block format: code `i` of a block stands for `codebook[i] * absmax`.

    Attributes:
        name: what users write, for example "nf4".
        codebook: 16 numbers (4-bit codes, two a byte) or 256 (8-bit codes), the largest
            magnitude 1, in the order of the codes; not necessarily sorted.

    Raises:
        ValueError: if the codebook has neither 16 nor 256 numbers, or any of them is
            not finite or exceeds 1 in magnitude.
    """

    name: str
    codebook: tuple[float, ...]

    def __post_init__(self):
        if len(self.codebook) not in (16, 256):
            raise ValueError(
                f"A codebook has 16 or 256 numbers; {self.name!r} has "
                f"{len(self.codebook)}."
            )
        if not all(abs(number) <= 1 for number in self.codebook):
            raise ValueError(
                f"The numbers of a codebook lie in [-1, 1]; {self.name!r} reaches from "
                f"{min(self.codebook)} to {max(self.codebook)}: divide by the largest."
            )

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return 4 if len(self.codebook) == 16 else 8

    def __repr__(self) -> str:
        return f"Format({self.name!r}, {self.bits} bits)"


@functools.cache
def dynamic_map(signed: bool = True) -> tuple[float, ...]:
    """Returns the 256 numbers of the dynamic 8-bit map, ascending.

    A code spends a unary prefix on the decade and what is left on a linear fraction.
    With e = 0 ... 6 and the midpoints of 2**e (unsigned: 2**(e + 1)) equal parts of
    [0.1, 1],

        numbers = {+-10**(e - 6) * midpoint} + {0, 1}

    computed in float32, so the negative side ends at -0.99296874.

    Args:
        signed: both signs (128 numbers above zero, 127 below), or from zero up.

    Source: Dettmers 2015 (https://arxiv.org/abs/1511.04561), and the map that
    bitsandbytes uses for nested scales and for 8-bit optimizer states.
    """
    numbers = [np.float32(0), np.float32(1)]
    for exponent in range(7):
        parts = 2 ** (exponent + (0 if signed else 1))
        edges = _linspace_float32(0.1, 1.0, parts + 1)
        midpoints = (edges[:-1] + edges[1:]) / np.float32(2)
        scaled = np.float32(10.0 ** (exponent - 6)) * midpoints
        numbers += [*scaled, *-scaled] if signed else [*scaled]
    return tuple(float(number) for number in sorted(numbers))


def _linspace_float32(start: float, stop: float, num: int) -> np.ndarray:
    """Evenly spaced float32 numbers, each half counted from its own end.

    Each is one fused multiply-add (here: float64, rounded once), which is the
    arithmetic that fixed the published map; numpy's linspace differs in the last place.
    """
    first, last = np.float32(start), np.float32(stop)
    step = np.float64((last - first) / np.float32(num - 1))
    up = first + step * np.arange(num)
    down = last - step * np.arange(num - 1, -1, -1)
    return np.where(np.arange(num) < num // 2, up, down).astype(np.float32)


def _signed_magnitudes(magnitudes: tuple[float, ...]) -> tuple[float, ...]:
    """Codebook of a sign bit (the highest) over eight magnitudes, in float32."""
    positive = [float(np.float32(value)) for value in magnitudes]
    return tuple(positive + [0.0 - value for value in positive])  # no -0.0


# QLoRA, appendix E (https://arxiv.org/abs/2305.14314), as float32.
NF4 = Format(
    "nf4",
    (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ),
)

# Two exponent bits, one mantissa bit, bias 3, divided by the largest, 12: the table and
# the code order of bitsandbytes, where code 1 is the subnormal 0.0625 / 12.
FP4 = Format(
    "fp4",
    _signed_magnitudes(
        (0.0, 0.0625 / 12, 2 / 3, 1.0, 1 / 3, 0.5, 1 / 6, 0.25),
    ),
)

# Three exponent bits, no mantissa: zero and the powers of two, divided by the largest.
FP4_E3M0 = Format(
    "fp4-e3m0", _signed_magnitudes((0.0, *(2.0**e for e in range(-6, 1))))
)

# Two's complement without -8, which leaves code 8 a second name for -1: symmetric.
INT4 = Format(
    "int4",
    tuple(float(np.float32(max(i, -7) / 7)) for i in [*range(8), *range(-8, 0)]),
)

# Two's complement bytes, symmetric: -128 is never written and read as -1.
INT8 = Format(
    "int8",
    tuple(
        float(np.float32(max(i, -127) / 127)) for i in [*range(128), *range(-128, 0)]
    ),
)

DYNAMIC8 = Format("dynamic8", dynamic_map(signed=True))
DYNAMIC8_UNSIGNED = Format("dynamic8-unsigned", dynamic_map(signed=False))

FORMATS: dict[str, Format] = {
    format.name: format
    for format in (NF4, FP4, FP4_E3M0, INT4, INT8, DYNAMIC8, DYNAMIC8_UNSIGNED)
}


def get_format(format: "str | Format") -> Format:
    """Returns the format of that name, or the format itself.

    Raises:
        ValueError: if no format has the name; the message lists those there are.
    """
    if isinstance(format, Format):
        return format
    if format not in FORMATS:
        raise ValueError(
            f"Unknown format {format!r}: one of {', '.join(map(repr, FORMATS))}, or a "
            "Format of your own."
        )
    return FORMATS[format]

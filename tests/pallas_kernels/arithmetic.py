"""What instructions of PTX compute from registers alone, on numpy arrays."""

import ml_dtypes
import numpy as np

from tests.pallas_kernels.values import lop3, permute

HALVES = {"bf16": ml_dtypes.bfloat16, "f16": np.float16}


def typed(value, kind):
    """Bits as numbers of a type of PTX."""
    return value.view(np.float32) if kind == "f32" else value


def compute(op, values):
    """The result of an instruction, cut at its dots, from its operands' bits."""
    kind, last = op[0], op[-1]
    f32 = [v.view(np.float32) for v in values if v.dtype == np.uint32]
    with np.errstate(all="ignore"):
        if kind == "cvt":
            return _convert(op, values, f32)
        if kind == "fma" and last.endswith("x2"):
            half = HALVES[last[:-2]]
            a, b, c = (v.view(half).astype(np.float64) for v in values)
            return (a * b + c).astype(half).view(np.uint32)
        if kind == "max" and last.endswith("x2"):
            a, b = (v.view(HALVES[last[:-2]]) for v in values)
            if op[1:3] == ["xorsign", "abs"]:
                sign = (values[0] ^ values[1]) & np.uint32(0x80008000)
                return np.fmax(abs(a), abs(b)).view(np.uint32) | sign
            return np.fmax(a, b).view(np.uint32)
        if last == "f32" and kind != "mov":
            return {
                "add": lambda a, b: a + b,
                "mul": lambda a, b: a * b,
                "div": lambda a, b: a / b,
                "sqrt": np.sqrt,
                "max": np.fmax,
                "min": np.fmin,
                "abs": np.abs,
                "rcp": lambda a: np.float32(1) / a,
                "ex2": np.exp2,
                "fma": lambda a, b, c: _fma(op[1], a, b, c),
            }[kind](*f32)
        return {
            "mov": lambda a: a,
            "add": lambda a, b: a + b,
            "sub": lambda a, b: a - b,
            "min": np.minimum,
            "max": np.maximum,
            "and": lambda a, b: a & b,
            "or": lambda a, b: a | b,
            "shl": lambda a, b: a << b,
            "shr": lambda a, b: a >> b,
            "mad": lambda a, b, c: a * b + c,
            "bfe": lambda a, b, c: (a >> b) & ((np.uint32(1) << c) - np.uint32(1)),
            "prmt": permute,
            "lop3": lop3,
        }[kind](*values)


def _fma(rounding, a, b, c):
    exact = a.astype(np.float64) * b + c  # exact enough: 24 bits times 24, plus one
    rounded = exact.astype(np.float32)
    if rounding == "rm":
        above = rounded.astype(np.float64) > exact
        rounded = np.where(above, np.nextafter(rounded, np.float32(-np.inf)), rounded)
    return rounded.astype(np.float32)


def _convert(op, values, f32):
    if op[-2].endswith("x2"):  # the first operand goes to the high half
        half = HALVES[op[-2][:-2]]
        high, low = (f.astype(half).view(np.uint16).astype(np.uint32) for f in f32)
        return high << np.uint32(16) | low
    if op[-1] == "f32":
        return f32[0].astype(HALVES[op[-2]]).view(np.uint16).astype(np.uint32)
    number = values[0].astype(np.uint16).view(HALVES[op[-1]])
    return number.astype(np.float32)

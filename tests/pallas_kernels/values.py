"""Values of the emulator: numpy arrays over threads, and buffers."""

import numpy as np


class Ref:
    """A buffer with an address."""

    def __init__(self, data: np.ndarray, base: int, shared: bool):
        self.bytes = data.reshape(-1).view(np.uint8)
        self.shape, self.base, self.shared = data.shape, base, shared
        self.item_bytes = data.dtype.itemsize


class Int:
    """Unsigned integers, one a thread, wrapping as the hardware's do."""

    def __init__(self, value):
        self.value = value

    def _with(self, x, op):
        x = x.value if isinstance(x, Int) else np.asarray(x % 2**64, np.uint64)
        with np.errstate(over="ignore"):
            return op(self.value, x.astype(self.value.dtype))

    def __add__(self, x):
        return Int(self._with(x, np.add))

    def __sub__(self, x):
        return Int(self._with(x, np.subtract))

    def __mul__(self, x):
        return Int(self._with(x, np.multiply))

    def __floordiv__(self, x):
        return Int(self._with(x, np.floor_divide))

    def __mod__(self, x):
        return Int(self._with(x, np.mod))

    def __xor__(self, x):
        return Int(self._with(x, np.bitwise_xor))

    def __lt__(self, x):
        return self._with(x, np.less)

    def __eq__(self, x):  # pyright: ignore[reportIncompatibleMethodOverride]
        return self._with(x, np.equal)

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def wide(self):
        return Int(self.value.astype(np.uint64))

    def min(self, x: int):
        return Int(self._with(x, np.minimum))


class NumpyOps:
    """`decode.Ops` on arrays over threads."""

    def __init__(self, dtype: str):
        self._half = np.dtype(dtype)

    def and_(self, a, mask):
        return a & np.uint32(mask)

    def or_(self, a, bits):
        return a | np.uint32(bits)

    def shift_right(self, a, bits):
        return a >> np.uint32(bits)

    def permute(self, a, b, selector):
        if isinstance(selector, int):
            selector = np.full_like(a, selector)
        return permute(a, b, selector)

    def multiply(self, a, constant):
        return a * np.float32(constant)

    def round_pair(self, low, high):
        pair = np.stack([low, high], -1).astype(self._half)
        return pair.view(np.uint32)[..., 0]

    def multiply_pair(self, a, b):
        numbers = (v.copy().view(self._half).reshape(-1, 2) for v in (a, b))
        return np.multiply(*numbers).view(np.uint32)[..., 0]


def permute(a, b, selector):
    """`prmt`: bytes 0 to 3 are a's, 4 to 7 b's."""
    octets = np.stack(
        [(v >> np.uint32(8 * i)) & np.uint32(255) for v in (a, b) for i in range(4)]
    )
    result = np.zeros_like(a)
    for i in range(4):
        index = (selector >> np.uint32(4 * i)) & np.uint32(7)
        byte = np.take_along_axis(octets, index[None].astype(np.int64), 0)[0]
        result |= byte << np.uint32(8 * i)
    return result


def lop3(a, b, c, table):
    """`lop3`: bit by bit, bit 4 a + 2 b + c of the table."""
    result = np.zeros_like(a)
    for i in range(8):
        taken = (table >> np.uint32(i) & np.uint32(1)).astype(bool)
        bits = [v if i >> j & 1 else ~v for v, j in ((a, 2), (b, 1), (c, 0))]
        result |= np.where(taken, bits[0] & bits[1] & bits[2], np.uint32(0))
    return result

"""Tables that find the nearest number of a codebook by one look-up, one comparison.

The numbers line is cut into cells so small that none holds two midpoints between
neighbouring numbers of the codebook. What a cell has is the midpoint in it, the code of
the number below that and of the number above; without a midpoint both are the same.
A tie goes to the lower number.

* `even_cells`: 256 cells of equal width from -1 to 1, for codebooks of 16 numbers. The
  cell is in the bits of `x * 2**14 + 2**23 + 2**14`, rounded down.
* `float_cells`: cells of a sign, an exponent and some bits of the mantissa, for
  codebooks whose numbers get denser towards zero, as the dynamic map's do. The cell is
  in the high bits of a float32.
"""

import dataclasses
import functools

import numpy as np

EVEN_CELLS = 256
_MOST_MANTISSA_BITS = 8
_ONE = 0x3F800000  # the bits of 1.0


def neighbours(codebook: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the float32 midpoints, ascending, and the codes around them.

    Of numbers that occur twice (the zeros of fp4) the lower code is returned.
    """
    numbers: dict[float, int] = {}
    for code, number in enumerate(codebook):
        numbers.setdefault(number + 0.0, code)  # -0.0 + 0.0 is 0.0
    ascending = sorted(numbers)
    values = np.asarray(ascending, np.float32)
    midpoints = (values[1:] + values[:-1]) / np.float32(2)
    return midpoints + np.float32(0), np.asarray([numbers[v] for v in ascending])


def _decide(codebook, place, cells) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What each cell has.

    Args:
        codebook: the numbers of the codes.
        place: gives each float32 the number of its cell, ascending.
        cells: the numbers of the cells that are wanted.

    Returns:
        The midpoint, the code at or below it, the code above it, of each cell.

    Raises:
        NotImplementedError: if a cell holds two midpoints.
    """
    midpoints, codes = neighbours(codebook)
    places = place(midpoints)
    first = np.searchsorted(places, cells, side="left")
    last = np.searchsorted(places, cells, side="right")
    if np.any(last - first > 1):
        raise NotImplementedError("two midpoints of the codebook are in one cell.")
    middle = midpoints[np.minimum(first, len(midpoints) - 1)]
    return middle, codes[first], codes[last]


@functools.lru_cache
def even_cells(codebook: tuple[float, ...]) -> np.ndarray:
    """The table of 256 equal cells of [-1, 1].

    The first cell is met by numbers from 1 on too, the last by those below -1 and by
    NaN: these two decide between the lowest and the highest code by the sign.

    Returns:
        uint32 [256, 2]: the bits of the midpoint; the code at or below it four times
        in the low half, the code above it four times in the high half.

    Raises:
        NotImplementedError: if two midpoints are in one cell, or one in the first or
            the last.
    """
    width = 2 / EVEN_CELLS

    def place(x):
        return np.floor(x.astype(np.float64) / width + EVEN_CELLS / 2).astype(int)

    cells = np.arange(EVEN_CELLS)
    try:
        middle, below, above = _decide(codebook, place, cells)
    except NotImplementedError:
        raise NotImplementedError(
            f"two midpoints of the codebook are nearer than {width}."
        ) from None
    if np.any(below[[0, -1]] != above[[0, -1]]):
        raise NotImplementedError(
            f"a midpoint of the codebook is nearer than {width} to -1 or 1."
        )
    lowest, highest = below[0], above[-1]
    middle[[0, -1]], below[[0, -1]], above[[0, -1]] = 0, lowest, highest
    table = np.zeros((EVEN_CELLS, 2), np.uint32)
    table[:, 0] = middle.view(np.uint32)
    table[:, 1] = below * 0x1111 + above * 0x11110000
    return table


@dataclasses.dataclass(frozen=True)
class FloatCells:
    """The table of cells of a sign, an exponent and some bits of the mantissa.

    Attributes:
        entries: uint32 [2 * cells, 2]: the bits of the midpoint, the code at or below
            it plus 256 times the code above it. Cells of negative numbers follow those
            of positive ones.
        shift: low bits of a magnitude that do not count.
        base: the bits of the magnitude that cells start at; smaller ones are in the
            first cell.
    """

    entries: np.ndarray
    shift: int
    base: int

    @property
    def cells(self) -> int:
        """How many a sign has."""
        return len(self.entries) // 2


@functools.lru_cache
def float_cells(codebook: tuple[float, ...]) -> FloatCells:
    """The table of float32 cells, as few as can be.

    Raises:
        NotImplementedError: if cells of eight bits of mantissa hold two midpoints.
    """
    midpoints, _ = neighbours(codebook)
    smallest = np.abs(midpoints[midpoints != 0]).min()
    octave = 1 << 23
    base = int(smallest.view(np.uint32)) // octave * octave - octave
    for bits in range(_MOST_MANTISSA_BITS + 1):
        shift = 23 - bits
        cells = (_ONE - base >> shift) + 1

        def place(x, shift=shift):
            magnitude = x.view(np.uint32).astype(np.int64) & 0x7FFFFFFF
            cell = np.maximum(magnitude - base, 0) >> shift
            return np.where(np.signbit(x), -1 - cell, cell)

        places = np.arange(cells)
        try:
            middle, below, above = _decide(
                codebook, place, np.concatenate([places, -1 - places])
            )
        except NotImplementedError:
            continue
        entries = np.zeros((2 * cells, 2), np.uint32)
        entries[:, 0] = middle.view(np.uint32)
        entries[:, 1] = below + 256 * above
        return FloatCells(entries, shift, base)
    raise NotImplementedError(
        "two midpoints of the codebook have the same eight bits of mantissa."
    )

"""The tables that find nearest codes: right at every midpoint, and next to it."""

import numpy as np
import pytest

from pallas_kernels import nearest
from qlora_jax.quant import FORMATS
from qlora_jax.quant.formats import dynamic_map
from tests.pallas_kernels.test_quantize_kernel import CODEBOOKS, NESTED

BYTES = {
    "dynamic": dynamic_map(),
    "unsigned": dynamic_map(signed=False),
    "even": NESTED,
}


def edges(codebook):
    """Midpoints, the numbers themselves, and what is next to them on both sides."""
    midpoints, _ = nearest.neighbours(codebook)
    x = np.concatenate([midpoints, np.asarray(codebook, np.float32), [0.0, -0.0]])
    x = x.astype(np.float32)
    return np.concatenate(
        [x, np.nextafter(x, np.float32(-2)), np.nextafter(x, np.float32(2))]
    )


def expected_codes(codebook, x):
    """By the definition: how many midpoints are below x."""
    midpoints, codes = nearest.neighbours(codebook)
    return codes[np.searchsorted(midpoints, x, side="left")]


@pytest.mark.parametrize("name", CODEBOOKS)
def test_even_cells_decide_every_edge(name):
    table = nearest.even_cells(CODEBOOKS[name])
    x = edges(CODEBOOKS[name])
    cell = np.floor(x.astype(np.float64) * 128 + 128).astype(int) % 256
    above = x > table[cell, 0].copy().view(np.float32)
    codes = np.where(above, table[cell, 1] >> 16, table[cell, 1] & 0xFFFF)
    np.testing.assert_array_equal(codes, 0x1111 * expected_codes(CODEBOOKS[name], x))


@pytest.mark.parametrize("name", BYTES)
def test_float_cells_decide_every_edge(name):
    cells = nearest.float_cells(BYTES[name])
    x = edges(BYTES[name])
    magnitude = np.maximum(x.view(np.uint32) & 0x7FFFFFFF, cells.base)
    cell = (magnitude - cells.base) >> cells.shift
    cell = cell + np.signbit(x) * cells.cells
    above = x > cells.entries[cell, 0].copy().view(np.float32)
    codes = cells.entries[cell, 1] >> np.where(above, 8, 0) & 255
    np.testing.assert_array_equal(codes, expected_codes(BYTES[name], x))


def test_cells_are_as_few_as_can_be():
    """23 octaves of 64 cells, one more and both signs: 24 KB."""
    assert len(nearest.float_cells(dynamic_map()).entries) == 2 * (23 * 64 + 1)


@pytest.mark.parametrize(
    "codebook, message",
    [
        (tuple(i / 1000 for i in range(16)), "nearer than 0.0078125"),
        (FORMATS["int8"].codebook, "nearer than 0.0078125 to -1 or 1"),
    ],
)
def test_codebooks_too_dense_are_refused(codebook, message):
    with pytest.raises(NotImplementedError, match=message):
        nearest.even_cells(codebook)

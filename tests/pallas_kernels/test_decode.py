"""The decoding sequence of the kernels, run on numpy registers."""

import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import decode
from qlora_jax.quant import FORMATS
from tests.pallas_kernels.values import NumpyOps

NF4 = FORMATS["nf4"].codebook
INT4 = tuple(i / 8 for i in (*range(8), *range(-8, 0)))


class CheckedOps(NumpyOps):
    """`NumpyOps` whose permutes must select a byte, not its sign."""

    def permute(self, a, b, selector):
        a, b, selector = np.broadcast_arrays(a, b, np.asarray(selector, np.uint32))
        assert (selector & 0x8888 == 0).all()
        return super().permute(a, b, selector)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("codebook", [NF4, INT4], ids=["nf4", "int4"])
def test_words_decode_to_rows(codebook, dtype):
    rng = np.random.default_rng(0)
    # every byte at every place of a word
    packed = rng.permuted(np.tile(np.arange(256, dtype=np.uint8), (4, 1)), axis=1)
    packed = packed.T.copy()  # [256, 4]
    codes = np.stack([packed >> 4, packed & 15], -1).reshape(256, 8)
    expected = np.array(codebook, np.float32).astype(dtype)[codes]

    low, high = decode.byte_table(codebook, np.dtype(dtype).name)
    table = [np.uint32(x) for x in low], [np.uint32(x) for x in high]
    word = packed.view("<u4")[:, 0]
    registers = decode.decode_word(CheckedOps(np.dtype(dtype).name), word, table)
    got = np.stack(registers, -1).view(dtype)  # [256, 8]
    np.testing.assert_array_equal(got.view(np.uint16), expected.view(np.uint16))


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_pair_table_has_both_numbers_of_every_byte(dtype):
    table = decode.pair_table(NF4, np.dtype(dtype).name)
    assert table.dtype == np.uint32 and table.shape == (256,)
    numbers = np.array(NF4, np.float32).astype(dtype).view(np.uint16)
    for byte in range(256):
        low, high = table[byte] & 0xFFFF, table[byte] >> 16
        assert (low, high) == (numbers[byte >> 4], numbers[byte & 15]), hex(byte)


def test_a_word_costs_21_instructions():
    counted = []

    class Counting(CheckedOps):
        def __getattribute__(self, name):
            if name in ("and_", "or_", "shift_right", "permute"):
                counted.append(name)
            return super().__getattribute__(name)

    ops = Counting("bfloat16")
    table = ([np.uint32(0)] * 4, [np.uint32(0)] * 4)
    decode.decode_word(ops, np.uint32(0), table)
    # `and` and `or` with constants are one instruction
    assert len(counted) - 1 == 21

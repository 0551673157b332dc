import numpy as np
import pytest

from qlora_jax.quant.formats import (
    FORMATS,
    FP4,
    INT8,
    NF4,
    Format,
    dynamic_map,
    get_format,
)


@pytest.fixture(scope="module")
def golden(golden_bitsandbytes):
    return golden_bitsandbytes


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_codebooks_are_those_of_bitsandbytes(golden, name):
    ours = np.asarray(FORMATS[name].codebook, np.float32)
    np.testing.assert_array_equal(ours, golden[f"codebook_{name}"])


@pytest.mark.parametrize("sign", ["signed", "unsigned"])
def test_dynamic_maps_are_those_of_bitsandbytes(golden, sign):
    ours = np.asarray(dynamic_map(sign == "signed"), np.float32)
    np.testing.assert_array_equal(ours, golden[f"dynamic_map_{sign}"])


def test_dynamic_map_known_points():
    signed = dynamic_map(signed=True)
    assert len(signed) == 256 and list(signed) == sorted(signed)
    assert signed[127] == 0 and signed[255] == 1
    assert signed[0] == pytest.approx(-0.99296874, abs=1e-8)
    assert min(abs(x) for x in signed if x) == pytest.approx(5.5e-7, rel=1e-6)


def test_nf4_has_an_exact_zero_and_both_ends():
    assert NF4.codebook[7] == 0.0
    assert NF4.codebook[0] == -1.0 and NF4.codebook[15] == 1.0


def test_fp4_is_twelfths():
    twelfths = np.asarray(FP4.codebook[:8]) * 12
    np.testing.assert_allclose(twelfths, [0, 0.0625, 8, 12, 4, 6, 2, 3], rtol=1e-7)


def test_int8_reads_as_twos_complement():
    assert INT8.codebook[1] == pytest.approx(1 / 127)
    assert INT8.codebook[255] == pytest.approx(-1 / 127)
    assert INT8.codebook[129] == INT8.codebook[128] == -1.0


def test_bits():
    assert {name: format.bits for name, format in FORMATS.items()} == {
        "nf4": 4,
        "fp4": 4,
        "fp4-e3m0": 4,
        "int4": 4,
        "int8": 8,
        "dynamic8": 8,
        "dynamic8-unsigned": 8,
    }


def test_unknown_format_is_named():
    with pytest.raises(ValueError, match="Unknown format 'nf5': one of 'nf4', 'fp4'"):
        get_format("nf5")


def test_codebook_of_a_wrong_length():
    with pytest.raises(ValueError, match=r"16 or 256 numbers; 'mine' has 15"):
        Format("mine", (0.0,) * 15)


def test_codebook_beyond_one():
    with pytest.raises(ValueError, match=r"lie in \[-1, 1\]; 'mine' reaches from 0"):
        Format("mine", (0.0,) * 15 + (2.0,))

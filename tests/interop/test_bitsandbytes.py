"""Bytes against those that bitsandbytes 0.50.2 wrote (tests/golden)."""

import hashlib
import json

import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.interop.bitsandbytes import from_state, to_state
from qlora_jax.quant import dequantize, quantize
from tests.conftest import GOLDEN
from tests.tolerances import ULP_NESTED_OFFSET

CASES = json.loads(bytes(np.load(GOLDEN / "bitsandbytes.npz")["cases"]))
IDS = [case[0] for case in CASES]


def read(golden, case):
    prefix = f"{case}/state/"
    return {
        key.removeprefix(prefix): golden[key]
        for key in golden.files
        if key.startswith(prefix)
    }


def read_input(golden, case, dtype):
    raw = golden[f"{case.split('/')[0]}/input"]
    return jnp.asarray(raw.view(jnp.bfloat16) if dtype == "bfloat16" else raw)


def without_negative_zero(packed, case):
    """fp4 has a code for -0.0, which bitsandbytes writes and we do not."""
    if "fp4" not in case:
        return packed
    high, low = packed >> 4, packed & 15
    return np.where(high == 8, 0, high) << 4 | np.where(low == 8, 0, low)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_no_byte_is_lost(golden_bitsandbytes, case):
    state = read(golden_bitsandbytes, case[0])
    back = to_state(from_state(state, "p.weight"), "p.weight")
    assert list(back) == list(state)
    for key, value in state.items():
        assert back[key].dtype == value.dtype
        np.testing.assert_array_equal(back[key], value, strict=True, err_msg=key)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_decodes_bit_for_bit(golden_bitsandbytes, case, dtype):
    name, n, k, _, _ = case
    qt = from_state(read(golden_bitsandbytes, name), "p.weight")
    weight = dequantize(qt, dtype)
    assert weight.shape == (k, n)
    rows = np.ascontiguousarray(np.asarray(weight).T)
    digest = hashlib.sha256(rows.tobytes()).digest()
    assert digest == bytes(golden_bitsandbytes[f"{name}/decoded/{dtype}"])


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_encodes_bit_for_bit(golden_bitsandbytes, case):
    name, _, _, block_size, dtype = case
    _, format, scales = name.split("/")
    state = read(golden_bitsandbytes, name)
    w = read_input(golden_bitsandbytes, name, dtype)
    qt = quantize(w.T, format, block_size=block_size, double_quant=scales == "dq")
    ours = to_state(qt, "p.weight")
    np.testing.assert_array_equal(
        without_negative_zero(ours["p.weight"], name),
        without_negative_zero(state["p.weight"], name),
    )
    if scales == "single":
        np.testing.assert_array_equal(ours["p.weight.absmax"], state["p.weight.absmax"])
        return
    mean = golden_bitsandbytes[f"{name}/mean_float64"]
    offset = np.asarray(qt.offset)
    assert abs(offset - mean) <= ULP_NESTED_OFFSET * np.spacing(offset)
    if offset == np.float32(mean):  # else a code may sit on another side of a midpoint
        np.testing.assert_array_equal(
            ours["p.weight.absmax"], golden_bitsandbytes[f"{name}/nested_nearest"]
        )


def test_stored_under_another_dtype(golden_bitsandbytes):
    state = read(golden_bitsandbytes, "plain/nf4/dq")
    as_bf16 = state | {
        "p.weight": state["p.weight"].reshape(-1).view(np.uint16)[:, None]
    }
    qt = from_state(as_bf16, "p.weight")
    np.testing.assert_array_equal(qt.codes.reshape(-1, 1), state["p.weight"])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"p.weight.absmax": None}, r"p\.weight\.absmax is missing"),
        (
            {"p.weight": np.zeros((7, 1), np.uint8)},
            r"p\.weight holds 7 bytes; 48 x 128",
        ),
        (
            {"p.weight.nested_absmax": np.zeros(9, np.float32)},
            r"nested_absmax must be float32 \[1\], found float32 \[9\]",
        ),
        (
            {"p.weight.quant_state.bitsandbytes__nf4": None},
            r"must have one tensor p\.weight\.quant_state\.bitsandbytes__nf4",
        ),
        (
            {"p.weight.quant_state.bitsandbytes__nf4": np.frombuffer(b"{", np.uint8)},
            "is not JSON in UTF-8",
        ),
        (
            {"p.weight.quant_state.bitsandbytes__nf4": np.frombuffer(b"{}", np.uint8)},
            r"lacks \['blocksize', 'dtype', 'quant_type', 'shape'\]",
        ),
    ],
)
def test_what_does_not_fit_is_named(golden_bitsandbytes, change, message):
    state = read(golden_bitsandbytes, "plain/nf4/dq") | change
    state = {key: value for key, value in state.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        from_state(state, "p.weight")


def test_formats_without_a_form_there():
    qt = quantize(jnp.ones((64, 64)), "int8")
    with pytest.raises(ValueError, match="stores nf4 and fp4 in 4 bits, not 'int8'"):
        to_state(qt, "p.weight")
    stack = quantize(jnp.ones((2, 64, 64)))
    with pytest.raises(ValueError, match="is a stack or a view of one"):
        to_state(stack, "p.weight")

"""Folders in 4 bits that transformers 5.23.0 with bitsandbytes 0.50.2 saved."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from qlora_jax.interop.bitsandbytes import to_state
from qlora_jax.interop.bitsandbytes_folder import open_folder
from qlora_jax.interop.hub import load_model
from qlora_jax.interop.weights import ModelFileError
from qlora_jax.models.config import LINEAR_WEIGHTS
from qlora_jax.quant import QuantizedTensor, dequantize, quantize
from tests.conftest import GOLDEN
from tests.tolerances import ULP_NESTED_OFFSET

FAMILIES = GOLDEN / "families"
QUANTIZED = {"nf4_double": ("nf4", True), "fp4_bfloat16": ("fp4", False)}
UP = "model.layers.{}.mlp.up_proj.weight"
TOKENS = jnp.arange(1, 13)[None]


def tensors_of(folder):
    return safetensors.numpy.load_file(folder / "model.safetensors")


@pytest.mark.parametrize("name", QUANTIZED)
def test_the_bytes_are_those_of_the_file(name):
    model = load_model(FAMILIES / name)
    tensors = tensors_of(FAMILIES / name)
    format, double_quant = QUANTIZED[name]
    for attribute in LINEAR_WEIGHTS:
        weight = getattr(model.layers, attribute).get_value()
        assert isinstance(weight, QuantizedTensor)
        assert (weight.format.name, weight.stack) == (format, (2,))
        assert weight.dtype == jnp.bfloat16
        assert (weight.nested_format is not None) == double_quant
    weight = model.layers.up_proj.get_value()
    for i in range(2):
        stored = tensors[UP.format(i)]
        assert stored.dtype == ("bfloat16" if name == "fp4_bfloat16" else "uint8")
        assert np.asarray(weight.codes[i]).tobytes() == stored.tobytes()
        absmax = np.asarray(weight.absmax[i]).reshape(-1)
        np.testing.assert_array_equal(
            absmax, tensors[f"{UP.format(i)}.absmax"], strict=True
        )


@pytest.mark.parametrize("name", QUANTIZED)
def test_equal_to_quantizing_the_source(name):
    """What transformers quantized at loading, and what we do, are one model."""
    format, double_quant = QUANTIZED[name]
    theirs = load_model(FAMILIES / name, dtype=jnp.float32)
    ours = load_model(
        FAMILIES / "source", format, double_quant=double_quant, dtype=jnp.float32
    )
    for attribute in LINEAR_WEIGHTS:
        a, b = (getattr(m.layers, attribute).get_value() for m in (theirs, ours))
        if not double_quant:  # -0.0 has a code in fp4 that we do not write
            np.testing.assert_array_equal(
                dequantize(a, jnp.float32), dequantize(b, jnp.float32)
            )
            continue
        np.testing.assert_array_equal(a.codes, b.codes)
        spacing = np.spacing(np.asarray(a.offset))
        difference = np.abs(np.asarray(a.offset) - np.asarray(b.offset))
        assert (difference <= ULP_NESTED_OFFSET * spacing).all()


def test_eight_bits():
    """LLM.int8: the bytes of the file, and rows of the source within half a step."""
    model = load_model(FAMILIES / "int8", dtype=jnp.float32)
    tensors = tensors_of(FAMILIES / "int8")
    dense = tensors_of(FAMILIES / "source")
    for name in ("mlp.down_proj", "self_attn.k_proj"):
        weight = getattr(model.layers, name.partition(".")[2]).get_value()
        assert (weight.format.name, weight.stack) == ("int8", (2,))
        decoded = np.asarray(dequantize(weight, jnp.float32))
        for i in range(2):
            stem = f"model.layers.{i}.{name}"
            codes, scale = tensors[f"{stem}.weight"], tensors[f"{stem}.SCB"][:, None]
            assert np.asarray(weight.codes[i]).tobytes() == codes.tobytes()
            np.testing.assert_allclose(decoded[i].T, codes * scale / 127, rtol=1e-6)
            error = np.abs(decoded[i].T - dense[f"{stem}.weight"].astype(np.float32))
            assert (error <= scale / 127 * 0.51).all()
    expected = load_model(FAMILIES / "source", dtype=jnp.float32)(TOKENS)
    difference = np.linalg.norm(model(TOKENS) - expected)
    assert difference <= 0.02 * np.linalg.norm(expected)


def test_eight_bits_that_do_not_fit(tmp_path):
    shutil.copytree(FAMILIES / "int8", tmp_path / "m")
    tensors = tensors_of(tmp_path / "m")
    for key, value, error, words in [
        (
            "SCB",
            np.ones(9, np.float32),
            ModelFileError,
            r"SCB\) must be float32 \[96\]",
        ),
        ("weight", np.ones((96, 64), np.uint8), ModelFileError, "must be int8"),
        ("weight_format", np.uint8([1]), NotImplementedError, r"is \[1\], a layout of"),
    ]:
        changed = tensors | {UP.format(0).replace("weight", key): value}
        safetensors.numpy.save_file(changed, tmp_path / "m" / "model.safetensors")
        with pytest.raises(error, match=words):
            load_model(tmp_path / "m")


def test_the_head_may_be_quantized_too(tmp_path):
    shutil.copytree(FAMILIES / "nf4_double", tmp_path / "m")
    tensors = tensors_of(tmp_path / "m")
    head = tensors.pop("lm_head.weight").astype(np.float32)
    tensors |= to_state(quantize(head.T), "lm_head.weight")
    safetensors.numpy.save_file(tensors, tmp_path / "m" / "model.safetensors")
    model = load_model(tmp_path / "m", dtype=jnp.float32)
    assert model.lm_head.get_value().shape == (64, 48)
    assert model(TOKENS).shape == (1, 12, 48)


def test_quantize_must_agree():
    path = FAMILIES / "nf4_double"
    load_model(path, "nf4")
    with pytest.raises(
        ValueError,
        match=r"down_proj\.weight is already nf4 with double quantization, blocks of "
        r"64; quantize='fp4' with double_quant=True asks for another\. Leave",
    ):
        load_model(path, "fp4")
    with pytest.raises(ValueError, match="double_quant=False asks for another"):
        load_model(path, "nf4", double_quant=False)


def edited(tmp_path, change):
    shutil.copytree(FAMILIES / "nf4_double", tmp_path / "m")
    tensors = tensors_of(tmp_path / "m")
    change(tensors)
    safetensors.numpy.save_file(tensors, tmp_path / "m" / "model.safetensors")
    return tmp_path / "m"


def one_ulp(tensors):
    key = f"{UP.format(1)}.nested_quant_map"
    tensors[key] = np.nextafter(tensors[key], np.float32(0))


def dense_layer(tensors):
    for key in [key for key in tensors if key.startswith(UP.format(1))]:
        del tensors[key]
    tensors[UP.format(1)] = np.ones((96, 64), np.float32)


def quantized_embedding(tensors):
    tensors |= to_state(quantize(jnp.ones((64, 48))), "model.embed_tokens.weight")


@pytest.mark.parametrize(
    "change, error, words",
    [
        (
            one_ulp,
            NotImplementedError,
            r"layers\.1\.mlp\.up_proj\.weight has other numbers in .*"
            r"than model\.layers\.0\.mlp\.up_proj\.weight",
        ),
        (
            dense_layer,
            NotImplementedError,
            r"layers\.1\.mlp\.up_proj\.weight is dense, and model\.layers\.0\.mlp\.up_",
        ),
        (
            quantized_embedding,
            NotImplementedError,
            r"embed_tokens\.weight is quantized; only weights of linear layers",
        ),
        (
            lambda t: t.pop(UP.format(0)),
            ModelFileError,
            r"must be the one description of a tensor model\.layers\.0\.mlp\.up_proj",
        ),
        (
            lambda t: t.pop(f"{UP.format(0)}.absmax"),
            ModelFileError,
            r"m: model\.layers\.0\.mlp\.up_proj\.weight\.absmax is missing",
        ),
        (
            lambda t: t.pop(f"{UP.format(0)}.quant_state.bitsandbytes__nf4"),
            ModelFileError,
            r"config does not explain: model\.layers\.0\.mlp\.up_proj\.weight\.absmax",
        ),
        (
            lambda t: t.update({"model.norm.weight": np.ones(64, np.int32)}),
            ModelFileError,
            r"model\.norm\.weight is of type I32; a weight is one of F64, F32",
        ),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, change, error, words):
    with pytest.raises(error, match=words):
        load_model(edited(tmp_path, change))


@pytest.mark.parametrize(
    "quantization, words",
    [
        ({"quant_method": "gptq", "bits": 4}, "was quantized by 'gptq'; read are the"),
        (
            {"quant_method": "fp8"},
            "was quantized by 'fp8'; .* Take the model it was ma",
        ),
    ],
)
def test_other_ways_of_quantizing_are_refused_by_name(tmp_path, quantization, words):
    config = json.loads((FAMILIES / "source" / "config.json").read_text())
    config["quantization_config"] = quantization
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(NotImplementedError, match=words):
        open_folder(tmp_path)

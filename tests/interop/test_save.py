"""What is saved is what transformers 5.23.0 and bitsandbytes 0.50.2 save."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from qlora_jax.interop import folder
from qlora_jax.interop.hub import load_model
from qlora_jax.interop.save import save_model
from qlora_jax.lora import add_lora, merge_lora
from qlora_jax.models.rope import RopeScaling
from qlora_jax.quant import dequantize, quantize
from tests.conftest import GOLDEN
from tests.interop.folders import write_folder
from tests.tolerances import ULP_NESTED_OFFSET

FAMILIES = GOLDEN / "families"
DENSE = sorted(path.parent.name for path in FAMILIES.glob("*/logits.npy"))


def file_of(folder):
    return (folder / "model.safetensors").read_bytes()


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.fixture(scope="module")
def source():
    return load_model(FAMILIES / "source")


@pytest.mark.parametrize("name", [*DENSE, "source", "nf4_double"])
def test_the_files_are_those_of_transformers(tmp_path, name):
    """Loaded and saved: weights and config of transformers (and bitsandbytes) again."""
    model = load_model(FAMILIES / name)
    save_model(model, tmp_path / "out", source=FAMILIES / name)
    assert file_of(tmp_path / "out") == file_of(FAMILIES / name)
    assert config_of(tmp_path / "out") == config_of(FAMILIES / name)
    ours, theirs = (
        (folder / "generation_config.json").read_bytes()
        for folder in (tmp_path / "out", FAMILIES / name)
    )
    assert ours == theirs
    # Without the folder it came from: the same weights, a config that says the same.
    save_model(model, tmp_path / "alone")
    assert file_of(tmp_path / "alone") == file_of(FAMILIES / name)
    assert load_model(tmp_path / "alone").config == model.config
    assert not list(tmp_path.glob(".*"))


def test_quantized_on_the_way_out_as_bitsandbytes_does(tmp_path, source):
    save_model(source, tmp_path / "out", quantize="nf4", source=FAMILIES / "source")
    assert config_of(tmp_path / "out") == config_of(FAMILIES / "nf4_double")
    ours, theirs = (
        safetensors.numpy.load_file(folder / "model.safetensors")
        for folder in (tmp_path / "out", FAMILIES / "nf4_double")
    )
    assert ours.keys() == theirs.keys()
    for key, expected in theirs.items():
        assert (ours[key].shape, ours[key].dtype) == (
            expected.shape,
            expected.dtype,
        ) or "quant_state" in key
        if "quant_state" in key:
            a, b = (json.loads(t[key].tobytes()) for t in (ours, theirs))
            offsets = [np.float32(state.pop("nested_offset")) for state in (a, b)]
            assert list(a.items()) == list(b.items())
            bound = ULP_NESTED_OFFSET * np.spacing(offsets[1])
            assert abs(offsets[0] - offsets[1]) <= bound
        elif not key.endswith("absmax"):  # follow the offset
            np.testing.assert_array_equal(ours[key], expected, err_msg=key)


def test_fp4_with_plain_scales(tmp_path, source):
    save_model(source, tmp_path / "out", quantize="fp4", double_quant=False)
    ours, theirs = (
        safetensors.numpy.load_file(folder / "model.safetensors")
        for folder in (tmp_path / "out", FAMILIES / "fp4_bfloat16")
    )
    assert ours.keys() == theirs.keys()
    for key, expected in theirs.items():
        if key.endswith(("absmax", "quant_map")) or "quant_state" in key:
            np.testing.assert_array_equal(ours[key], expected, err_msg=key)
    settings = config_of(tmp_path / "out")["quantization_config"]
    assert settings["bnb_4bit_quant_type"] == "fp4"
    assert not settings["bnb_4bit_use_double_quant"]


STORED = ["nf4_double", "nf4_float16", "nf4_float32", "fp4_bfloat16", "int8"]


@pytest.mark.parametrize("name", STORED)
def test_quantized_folders_go_back_as_they_came(tmp_path, name):
    """Every type of storage, and 8 bits: the file of transformers, byte for byte."""
    model = load_model(FAMILIES / name)
    save_model(model, tmp_path / "out", source=FAMILIES / name)
    assert file_of(tmp_path / "out") == file_of(FAMILIES / name)
    assert config_of(tmp_path / "out") == config_of(FAMILIES / name)


def test_eight_bits_on_the_way_out_as_bitsandbytes_does(tmp_path, source):
    save_model(source, tmp_path / "out", quantize="int8", source=FAMILIES / "source")
    assert file_of(tmp_path / "out") == file_of(FAMILIES / "int8")
    assert config_of(tmp_path / "out") == config_of(FAMILIES / "int8")


@pytest.mark.parametrize(
    "name, storage", [("nf4_float16", "float16"), ("fp4_bfloat16", "bfloat16")]
)
def test_storage_on_the_way_out(tmp_path, source, name, storage):
    save_model(
        source,
        tmp_path / "out",
        quantize=name[:3],
        double_quant=False,
        storage=storage,
        source=FAMILIES / "source",
    )
    ours, theirs = (
        safetensors.numpy.load_file(folder / "model.safetensors")
        for folder in (tmp_path / "out", FAMILIES / name)
    )
    assert ours.keys() == theirs.keys()
    for key, expected in theirs.items():
        assert (ours[key].dtype, ours[key].shape) == (expected.dtype, expected.shape)
        if name == "nf4_float16":  # -0.0 has a code in fp4 that we do not write
            assert ours[key].tobytes() == expected.tobytes(), key
    a, b = (
        config_of(f)["quantization_config"] for f in (tmp_path / "out", FAMILIES / name)
    )
    b["bnb_4bit_compute_dtype"] = a[
        "bnb_4bit_compute_dtype"
    ]  # what the caller asks for
    assert a == b


def test_another_storage_type_becomes_bytes(tmp_path):
    """Codes stored as bfloat16 are written as uint8: the same bytes."""
    save_model(load_model(FAMILIES / "fp4_bfloat16"), tmp_path / "out")
    ours, theirs = (
        safetensors.numpy.load_file(folder / "model.safetensors")
        for folder in (tmp_path / "out", FAMILIES / "fp4_bfloat16")
    )
    assert ours.keys() == theirs.keys()
    for key, expected in theirs.items():
        assert ours[key].tobytes() == expected.tobytes()


def test_shards(tmp_path, source):
    save_model(source, tmp_path / "out", shard_bytes=40_000)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    count = len(files)
    assert files == [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(4)]
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    tensors = {}
    for file in files:
        part = safetensors.numpy.load_file(tmp_path / "out" / file)
        assert sum(tensor.nbytes for tensor in part.values()) <= 40_000
        assert {index["weight_map"][name] for name in part} == {file}
        tensors |= part
    whole = safetensors.numpy.load_file(FAMILIES / "source" / "model.safetensors")
    assert tensors.keys() == whole.keys() == index["weight_map"].keys()
    for name, tensor in whole.items():
        np.testing.assert_array_equal(tensors[name], tensor)
    assert index["metadata"] == {
        "total_parameters": sum(tensor.size for tensor in whole.values()),
        "total_size": sum(tensor.nbytes for tensor in whole.values()),
    }
    again = load_model(tmp_path / "out")
    for a, b in zip(*map(jax.tree.leaves, (again, source)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_files_are_for_whom_the_folder_is_for(tmp_path, source):
    save_model(source, tmp_path / "out", shard_bytes=100_000)
    modes = {path.stat().st_mode for path in (tmp_path / "out").iterdir()}
    assert len(modes) == 1


def test_dequantized(tmp_path):
    model = load_model(FAMILIES / "nf4_double")
    save_model(model, tmp_path / "out", dequantized=True, dtype=jnp.float32)
    assert "quantization_config" not in config_of(tmp_path / "out")
    again = load_model(tmp_path / "out", dtype=jnp.float32)
    np.testing.assert_array_equal(
        again.layers.up_proj.get_value(),
        dequantize(model.layers.up_proj.get_value(), jnp.float32),
    )
    assert again.embed[...].dtype == jnp.float32


def test_tokenizer_goes_along(tmp_path):
    write_folder(tmp_path / "in")
    save_model(load_model(tmp_path / "in"), tmp_path / "out", source=tmp_path / "in")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        ours, theirs = ((tmp_path / f / name).read_bytes() for f in ("out", "in"))
        assert ours == theirs


def test_an_adapter_is_merged_first(tmp_path, source):
    adapted = add_lora(source, rank=2, alpha=4, key=jax.random.key(0))
    with pytest.raises(
        ValueError, match=r"layers\.0\.\S+_proj\.weight has an adapter: call merge_lora"
    ):
        save_model(adapted, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    merged = merge_lora(adapted, report=None)
    save_model(merged, tmp_path / "out")
    assert file_of(tmp_path / "out") == file_of(FAMILIES / "source")  # b is zero


def test_a_failed_save_leaves_nothing(tmp_path, source, monkeypatch):
    def fail(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(folder, "_write_shards", fail)
    with pytest.raises(OSError, match="No space"):
        save_model(source, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_full_folder_stays(tmp_path, source):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists and is not empty; give a new folder"):
        save_model(source, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_what_cannot_be_written_is_named(tmp_path, source):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="quantize='int4': bitsandbytes stores 'nf4'"):
        save_model(source, out, quantize="int4")
    with pytest.raises(ValueError, match="storage='int8' is none of uint8, bfloat16"):
        save_model(source, out, quantize="nf4", storage="int8")
    with pytest.raises(ValueError, match="contradict each other"):
        save_model(source, out, quantize="nf4", dequantized=True)
    quantized = load_model(FAMILIES / "nf4_double")
    with pytest.raises(
        ValueError,
        match=r"q_proj\.weight is already nf4 with double .*quantize='fp4' with",
    ):
        save_model(quantized, out, quantize="fp4")
    weight = quantize(jnp.ones((2, 64, 64)), "int8", block_size=32)
    quantized.layers.q_proj.set_value(weight)
    with pytest.raises(ValueError, match=r"'int8' in blocks of 32, and LLM\.int8 has"):
        save_model(quantized, out)
    quantized.layers.q_proj.set_value(quantize(jnp.ones((2, 64, 64)), "int4"))
    with pytest.raises(ValueError, match="quantized to 'int4', which has no form in a"):
        save_model(quantized, out)
    weight = quantize(jnp.ones((2, 64, 64)), "fp4")
    quantized.layers.q_proj.set_value(weight)
    with pytest.raises(ValueError, match=r"in several ways, .*'fp4', True.*'nf4'"):
        save_model(quantized, out)
    with pytest.raises(ValueError, match="is of another model: vocab_size=259, and of"):
        write_folder(tmp_path / "other")
        save_model(source, out, source=tmp_path / "other")
    assert not out.exists()


def test_a_config_without_a_form_there(tmp_path):
    """GGUF files give each rotary factor; a config of Hugging Face cannot."""
    shutil.copytree(FAMILIES / "llama", tmp_path / "in")
    model = load_model(tmp_path / "in")
    scaling = RopeScaling("factors", factors=(1.0,) * 4)
    model.config = dataclasses.replace(model.config, rope_scaling=scaling)
    with pytest.raises(NotImplementedError, match=r"cannot say rope_scaling=RopeScal"):
        save_model(model, tmp_path / "out")
    save_model(model, tmp_path / "out", source=tmp_path / "in")
    assert load_model(tmp_path / "out").config.rope_scaling is None

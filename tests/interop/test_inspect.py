import numpy as np
import pytest

from qlora_jax.interop import peft_files, safetensors
from qlora_jax.interop.convert import convert_model
from qlora_jax.interop.inspect import inspect_file
from qlora_jax.interop.weights import ModelFileError
from tests.conftest import GOLDEN
from tests.interop.folders import write_folder

FAMILIES, PEFT = GOLDEN / "families", GOLDEN / "peft_lora"


def test_a_file_and_its_folder():
    file = inspect_file(FAMILIES / "source" / "model.safetensors")
    folder = inspect_file(FAMILIES / "source")
    assert (file.kind, folder.kind) == ("safetensors", "folder")
    assert file.tensors == folder.tensors
    assert file.metadata == {"format": "pt"}
    assert folder.metadata["model_type"] == "llama"
    row = next(row for row in file.tensors if row.name == "lm_head.weight")
    assert (row.type, row.shape, row.nbytes) == ("BF16", (48, 64), 48 * 64 * 2)
    assert file.parameters == 67904 == file.nbytes // 2


@pytest.mark.parametrize("name", ["nf4_double", "fp4_bfloat16", "int8"])
def test_quantized_weights_count_as_what_they_stand_for(name):
    contents = inspect_file(FAMILIES / name)
    assert contents.parameters == 67904
    assert contents.nbytes < 67904 * 2


def test_shards_and_adapters_and_gguf(tmp_path):
    weights = write_folder(tmp_path / "m", shards=3)
    contents = inspect_file(tmp_path / "m")
    assert len({row.file for row in contents.tensors}) == 3
    assert contents.nbytes == sum(w.nbytes for w in weights.values())
    convert_model(tmp_path / "m", tmp_path / "m.gguf")
    file = inspect_file(tmp_path / "m.gguf")
    assert file.kind == "gguf" and file.parameters == contents.parameters
    assert {row.type for row in file.tensors} == {"F32", "Q8_0"}
    adapter = inspect_file(PEFT / "plain")
    assert adapter.kind == "adapter" and adapter.metadata["r"] == 4
    assert len(adapter.tensors) == 2 * 7 * 2


def test_the_table():
    lines = inspect_file(FAMILIES / "int8").table(limit=2).splitlines()
    assert lines[0].split() == ["tensor", "type", "shape", "bytes"]
    assert lines[1].split()[:2] == ["lm_head.weight", "BF16"]
    assert "... " in lines[3] and "more" in lines[3]
    assert lines[-1].startswith("67,904 parameters in 49 tensors")
    assert len({len(line) for line in lines}) == 1


def test_what_is_no_checkpoint(tmp_path):
    with pytest.raises(ModelFileError, match=r"neither model\.safetensors nor"):
        inspect_file(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ModelFileError, match=r"pytorch_model\.bin holds pickled weig"):
        inspect_file(tmp_path)
    with pytest.raises(ModelFileError, match=r"pytorch_model\.bin holds pickled weig"):
        inspect_file(tmp_path / "pytorch_model.bin")


def test_tensors_in_and_out(tmp_path):
    """`load` and `save` of safetensors and of adapters."""
    tensors = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.int8([1])}
    safetensors.save(tmp_path / "x.safetensors", tensors)
    got = safetensors.load(tmp_path / "x.safetensors")
    assert got.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(got[name], tensor, strict=True)
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]
    weights = write_folder(tmp_path / "m", shards=2)
    assert safetensors.load(tmp_path / "m").keys() == weights.keys()
    config, parts = peft_files.load(PEFT / "plain")
    peft_files.save(tmp_path / "adapter", config, parts)
    again = peft_files.load(tmp_path / "adapter")
    assert again[0] == config and again[1].keys() == parts.keys()

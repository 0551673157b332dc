"""What is wrong with a file is said by tensor, whatever the library says."""

import json
import struct

import numpy as np
import pytest
import safetensors.numpy

from qlora_jax.interop.hub import load_config, load_model
from qlora_jax.interop.safetensors_header import fault_of
from qlora_jax.interop.weights import ModelFileError
from tests.interop.folders import LLAMA, write_folder

NAME = "model.layers.1.self_attn.q_proj.weight"


def parts(path):
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write(path, header, numbers):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + numbers)


@pytest.fixture
def file(tmp_path):
    write_folder(tmp_path)
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize(
    "change, words",
    [
        ({"shape": [128, 64]}, r"is \[128, 64\] of F32, which takes 32768 bytes, and"),
        ({"shape": [-64, -64]}, r"has the shape \[-64, -64\]"),
        ({"shape": [64, 64.0]}, r"has the shape"),
        ({"shape": [2**62, 2**62]}, r"is \[4611686018427387904, 46116860184273879"),
        ({"shape": [2**62] * 300}, r"takes more than any file can hold, and has 16384"),
        ({"shape": "x"}, "has the shape 'x'|has the shape x"),
        ({"dtype": "F99"}, "is of type F99"),
        ({"dtype": 3}, "is of type 3"),
        ({"data_offsets": [5]}, r"has the data_offsets \[5\]"),
        ({"data_offsets": [16384, 0]}, r"has the data_offsets \[16384, 0\]"),
        ({"data_offsets": [1, 16385]}, r"begins at byte 1 of the numbers, the one b"),
    ],
)
def test_a_tensor_that_lies_is_named(file, change, words):
    header, numbers = parts(file)
    header[NAME] |= change
    write(file, header, numbers)
    with pytest.raises(ModelFileError, match=words) as caught:
        load_model(file.parent)
    message = str(caught.value)
    assert message.startswith(f"{file} cannot be read: tensor ")
    assert message.endswith("Download it again.") and "\n" not in message
    assert NAME in message or "data_offsets" in change


def test_a_truncated_file_names_the_tensor_it_ends_in(file):
    header, numbers = parts(file)
    spans = {n: d["data_offsets"] for n, d in header.items() if n != "__metadata__"}
    begin, end = spans[NAME]
    write(file, header, numbers[: begin + 1])
    with pytest.raises(ModelFileError, match=rf"{NAME} ends at byte {end}.*truncated"):
        load_model(file.parent)


@pytest.mark.parametrize(
    "header, numbers, words",
    [
        (b"{", b"", "its header is not JSON"),
        (b"\xff", b"", "its header is not JSON"),
        (b"[" * 100_000, b"", "its header is not JSON"),
        (b"[]", b"", "its header is no JSON object"),
        ({"a": 3}, b"", "tensor a lacks one of dtype, shape and data_offsets"),
        ({}, b"123", "3 bytes after the last tensor belong to none"),
    ],
)
def test_headers_that_are_none(tmp_path, header, numbers, words):
    write(tmp_path / "a.safetensors", header, numbers)
    assert fault_of(tmp_path / "a.safetensors") == words


def test_lengths_of_headers(tmp_path):
    path = tmp_path / "a.safetensors"
    for data, wanted in [
        (b"", "its header should take 8 bytes, the file has 0"),
        (b"\1\0\0\0\0\0\0\0", "its header should take 9 bytes, the file has 8"),
        (b"\xff" * 8, f"its header should take {2**64 + 7} bytes, the file has 8"),
    ]:
        path.write_bytes(data)
        assert fault_of(path) == wanted


@pytest.mark.parametrize("kind", ["float32", "float16", "uint8", "int64", "bool"])
def test_nothing_is_wrong_with_what_the_library_writes(tmp_path, kind):
    path = tmp_path / "a.safetensors"
    tensors = {"a": np.ones((3, 5), kind), "b": np.ones((), kind), "c": np.ones((0, 2))}
    safetensors.numpy.save_file(tensors, path, {"format": "pt"})
    assert fault_of(path) is None


def test_what_is_not_supported_names_the_file(file):
    config = file.parent / "config.json"
    for change, words in [
        ({"architectures": ["BloomForCausalLM"]}, "Architecture 'BloomForCausalLM'"),
        ({"hidden_act": "gelu"}, "Activation 'gelu'"),
        ({"num_attention_heads": -1}, "num_"),
    ]:
        config.write_text(json.dumps(LLAMA | change))
        for read in (load_model, load_config):
            with pytest.raises((ValueError, NotImplementedError), match=words) as error:
                read(file.parent)
            assert str(error.value).startswith(f"{config}: ")
    with pytest.raises(ModelFileError, match="holds weights alone: give its folder"):
        load_model(file)

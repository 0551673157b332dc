"""Damaged folders: the reader's own error, or none; nothing else, and little memory."""

import json
import shutil

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_jax.interop.bitsandbytes import from_state
from qlora_jax.interop.bitsandbytes_folder import open_folder
from qlora_jax.interop.weights import check_tensors
from tests.conftest import GOLDEN
from tests.interop import fuzz

FAMILIES = GOLDEN / "families"
STATE = "model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4"
fuzzed = settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=4,
)


def read_all(folder):
    """Reads everything; a ValueError (ModelFileError is one) may say why it cannot."""
    try:
        source = open_folder(folder)
        check_tensors(source)
        for name in source.shapes():
            source.read(name)
    except (ValueError, NotImplementedError) as error:
        assert str(error)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz") / "m"
    shutil.copytree(FAMILIES / "nf4_double", path)
    return path


def put(folder, name, content):
    (folder / name).write_bytes(content)


@settings(fuzzed, max_examples=300)
@given(st.data())
def test_a_damaged_header_of_safetensors(folder, data):
    content = bytearray((FAMILIES / "nf4_double/model.safetensors").read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, header - 1))
        content[at] = data.draw(st.integers(0, 255))
    cut = data.draw(st.none() | st.integers(0, len(content)))
    put(folder, "model.safetensors", content[:cut])
    read_all(folder)


@settings(fuzzed, max_examples=100)
@given(
    key=st.sampled_from(["dtype", "shape", "data_offsets"]),
    value=json_values | st.sampled_from(["F8_E4M3", "F64", "BOOL", "I4", "F4", "C64"]),
    tensor=st.sampled_from(["model.norm.weight", STATE]),
)
def test_a_lying_header_of_safetensors(folder, key, value, tensor):
    content = (FAMILIES / "nf4_double/model.safetensors").read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header[tensor][key] = value
    text = json.dumps(header).encode()
    content = len(text).to_bytes(8, "little") + text + content[8 + size :]
    put(folder, "model.safetensors", content)
    read_all(folder)


@settings(fuzzed, max_examples=100)
@given(st.data())
def test_a_damaged_config(folder, data):
    config = json.loads((FAMILIES / "nf4_double/config.json").read_text())
    key = data.draw(st.sampled_from(sorted(config)))
    config[key] = data.draw(json_values)
    shutil.copy(FAMILIES / "nf4_double/model.safetensors", folder)
    put(folder, "config.json", json.dumps(config).encode())
    try:
        read_all(folder)
    finally:
        shutil.copy(FAMILIES / "nf4_double/config.json", folder)


@settings(fuzzed, max_examples=100)
@given(json_values)
def test_an_index_of_anything(folder, value):
    shutil.copy(FAMILIES / "nf4_double/model.safetensors", folder / "a.safetensors")
    (folder / "model.safetensors").unlink(missing_ok=True)
    index = {"weight_map": value}
    put(folder, "model.safetensors.index.json", json.dumps(index).encode())
    read_all(folder)


@pytest.fixture(scope="module")
def tensors():
    return safetensors.numpy.load_file(FAMILIES / "nf4_double/model.safetensors")


@settings(fuzzed, max_examples=300)
@given(st.data())
def test_a_damaged_state_of_bitsandbytes(tensors, data):
    name = STATE.partition(".quant_state")[0]
    state = json.loads(tensors[STATE].tobytes())
    for _ in range(data.draw(st.integers(1, 2))):
        key = data.draw(st.sampled_from(sorted(state)))
        state[key] = data.draw(json_values)
    text = bytearray(json.dumps(state).encode())
    if data.draw(st.booleans()):
        at = data.draw(st.integers(0, len(text) - 1))
        text[at] = data.draw(st.integers(0, 255))
    damaged = tensors | {STATE: np.frombuffer(bytes(text), np.uint8)}
    try:
        weight = from_state(damaged, name)
    except ValueError as error:
        assert name in str(error)
    else:
        assert weight.shape == (64, 96)


@pytest.fixture(scope="module", params=fuzz.READERS)
def attempt(request, tmp_path_factory):
    """A function that damages a sound file by a seed and reads it."""
    case = fuzz.READERS[request.param]
    path = tmp_path_factory.mktemp("reader") / "m"
    fuzz.prepare(path, case[0])
    data = (path / case[1]).read_bytes()
    return lambda seed: fuzz.attempt(case, path, data, seed)


@settings(fuzzed, max_examples=60)
@given(seed=st.integers(0, 2**32))
def test_every_reader_refuses_or_reads_damaged_files(attempt, seed):
    """As `python -m tests.interop.fuzz` does with 10,000 for each."""
    attempt(seed)


def test_the_fuzzer_damages():
    """Nearly all files are changed, and most of them so that a reader notices."""
    case = fuzz.READERS["config"]
    data = (FAMILIES / "llama" / "config.json").read_bytes()
    changed = [case[2](data, fuzz.random.Random(seed)) != data for seed in range(200)]
    assert sum(changed) > 150

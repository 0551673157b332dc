"""Files of adapters that are damaged, or of a kind that is not done."""

import json
import pathlib
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qlora_jax.interop import peft_files
from qlora_jax.interop.hub import load_model
from qlora_jax.interop.peft import load_adapter
from tests.conftest import GOLDEN

pytestmark = pytest.mark.unoptimized

FOLDER = GOLDEN / "peft_lora"


@pytest.fixture(scope="module")
def base():
    return load_model(FOLDER / "base", dtype=jnp.float32)


def test_what_is_written_is_read(tmp_path):
    config, tensors = peft_files.load(FOLDER / "dora")
    peft_files.save(tmp_path / "again", config, tensors)
    same, copies = peft_files.load(tmp_path / "again")
    assert same == config and copies.keys() == tensors.keys()
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(copies[key], tensor)
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == [
        peft_files.CONFIG,
        peft_files.WEIGHTS,
    ]


@pytest.mark.parametrize(
    "module, value",
    [("layers.0.q_proj", 8), ("q_proj", 8), ("layers.0.k_proj", 4), ("xq_proj", 2)],
)
def test_the_first_pattern_that_ends_the_name(module, value):
    patterns = {"q_proj": 8, r"layers\.\d+\..*": 4}
    assert peft_files.pattern_value(patterns, module, 2) == value


def broken(tmp_path, *, config=None, tensors=None):
    """A copy of the plain adapter with some of it changed; None deletes a tensor."""
    folder = tmp_path / "broken"
    shutil.copytree(FOLDER / "plain", folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **(config or {})}))
    path = folder / "adapter_model.safetensors"
    changed = {**load_file(path), **(tensors or {})}
    save_file({k: v for k, v in changed.items() if v is not None}, path)
    return folder


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_"


@pytest.mark.parametrize(
    "config, tensors, error, match",
    [
        ({"peft_type": "IA3"}, {}, NotImplementedError, "peft_type 'IA3'"),
        (
            {"bias": "some"},
            {},
            ValueError,
            "bias is 'some', none of none, lora_only, all",
        ),
        ({"modules_to_save": ["x"]}, {}, ValueError, "nothing of modules_to_save 'x'"),
        ({"init_lora_weights": "pissa"}, {}, NotImplementedError, "'pissa' adapts a"),
        ({"r": "4"}, {}, ValueError, "r is '4', not a positive number"),
        (
            {"rank_pattern": {"(": 4}},
            {},
            ValueError,
            r"rank_pattern '\(' is no regular",
        ),
        ({"alpha_pattern": [1]}, {}, ValueError, "alpha_pattern is no object"),
        ({"r": 8}, {}, ValueError, r"lora_[AB] is \[.*rank 8 make it"),
        ({"use_dora": True}, {}, ValueError, "lora_magnitude_vector is missing"),
        (
            {},
            {f"{Q}A.weight": None},
            ValueError,
            "layers.0.self_attn.q_proj.lora_A is m",
        ),
        (
            {},
            {f"{Q}B.weight": np.ones((63, 4), "f4")},
            ValueError,
            r"layers.0.self_attn.q_proj: lora_B is \[63, 4\].*make it \[64, 4\]",
        ),
        (
            {},
            {Q.replace("layers.0", "layers.7") + "A.weight": np.ones((4, 64), "f4")},
            ValueError,
            r"layers\.7\.self_attn.*is of a module that the model has not",
        ),
        (
            {},
            {"base_model.model.lm_head.weight": np.ones((4, 64), "f4")},
            ValueError,
            r"lm_head\.weight is \[4, 64\]",
        ),
    ],
)
def test_wrong_adapters(base, tmp_path, config, tensors, error, match):
    with pytest.raises(error, match=match):
        load_adapter(base, broken(tmp_path, config=config, tensors=tensors))


def test_wrong_files(base, tmp_path):
    with pytest.raises(ValueError, match=r"adapter_config.json is missing"):
        load_adapter(base, tmp_path)
    folder = broken(tmp_path)
    path: pathlib.Path = folder / "adapter_model.safetensors"
    whole = path.read_bytes()
    for length in (0, 7, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(
            ValueError, match=r"adapter_model.safetensors cannot be read"
        ):
            load_adapter(base, folder)
    path.unlink()
    with pytest.raises(ValueError, match=r"adapter_model.safetensors is missing"):
        load_adapter(base, folder)
    path.with_suffix(".bin").write_bytes(b"x")
    with pytest.raises(ValueError, match="pickled, which can run code"):
        load_adapter(base, folder)

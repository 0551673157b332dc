import json

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from qlora_jax.interop.hub import load_model
from qlora_jax.interop.weights import ModelFileError
from tests.interop.folders import BFLOAT16, LLAMA, write_folder

TOKENS = jnp.arange(20)[None]


def test_shards_make_the_same_model(tmp_path):
    write_folder(tmp_path / "one")
    write_folder(tmp_path / "three", shards=3)
    one, three = (load_model(tmp_path / name) for name in ("one", "three"))
    np.testing.assert_array_equal(one(TOKENS), three(TOKENS))


def test_bfloat16_files(tmp_path):
    weights = write_folder(tmp_path, dtype=BFLOAT16)
    model = load_model(tmp_path)
    expected = weights["model.layers.1.mlp.up_proj.weight"].T
    np.testing.assert_array_equal(model.layers.up_proj[...][1], expected)


def test_quantized_layer_by_layer_as_all_at_once(tmp_path):
    from qlora_jax.quant import dequantize, quantize

    weights = write_folder(tmp_path)
    model = load_model(tmp_path, quantize="nf4", dtype=jnp.float32)
    names = [f"model.layers.{i}.self_attn.k_proj.weight" for i in range(3)]
    stacked = jnp.stack([weights[name].T for name in names])
    weight = model.layers.k_proj.get_value()
    assert weight.dtype == jnp.float32
    np.testing.assert_array_equal(dequantize(weight), dequantize(quantize(stacked)))


def edit(folder, change):
    path = folder / "model.safetensors"
    weights = safetensors.numpy.load_file(path)
    change(weights)
    safetensors.numpy.save_file(weights, path)


@pytest.mark.parametrize(
    "change, words",
    [
        (
            lambda w: w.pop("model.layers.2.mlp.up_proj.weight"),
            r"lacks model\.layers\.2\.mlp\.up_proj\.weight",
        ),
        (
            lambda w: w.update({"model.layers.9.mlp.up_proj.weight": np.ones(3)}),
            r"tensors that its config does not explain: model\.layers\.9\.mlp",
        ),
        (
            lambda w: w.update({"model.norm.weight": np.ones(63, np.float32)}),
            r"model\.norm\.weight is \[63\], its config says \[64\]",
        ),
    ],
)
def test_wrong_tensors_are_named(change, words, tmp_path):
    write_folder(tmp_path)
    edit(tmp_path, change)
    with pytest.raises(ModelFileError, match=words):
        load_model(tmp_path)


def test_what_old_checkpoints_carry_along_is_left_out(tmp_path):
    write_folder(tmp_path)
    expected = load_model(tmp_path)(TOKENS)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit(tmp_path, lambda w: w.update({name: np.ones(8), "lm_head.weight": np.ones(1)}))
    np.testing.assert_array_equal(load_model(tmp_path)(TOKENS), expected)


def test_truncated_and_missing_files(tmp_path):
    write_folder(tmp_path, shards=2)
    second = tmp_path / "model-00002-of-00002.safetensors"
    data = second.read_bytes()
    for length in (4, 100, len(data) - 1):
        second.write_bytes(data[:length])
        with pytest.raises(ModelFileError, match=r"00002\.safetensors cannot be read"):
            load_model(tmp_path)
    second.unlink()
    with pytest.raises(
        ModelFileError, match=r"lacks model-00002-of-00002\.safetensors"
    ):
        load_model(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(ModelFileError, match=r"has neither model\.safetensors nor"):
        load_model(tmp_path)


def test_an_index_cannot_point_outside(tmp_path):
    write_folder(tmp_path, shards=2)
    index = {"weight_map": {"model.norm.weight": "../other.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelFileError, match="names files outside its folder"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt", "last.ckpt"]
)
def test_pickle_is_never_read(tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / name).write_bytes(b"\x80\x04.")
    words = rf"{name} holds pickled weights: .*not read.*convert .*save_pretrained"
    with pytest.raises(ModelFileError, match=words):
        load_model(tmp_path)
    with pytest.raises(ModelFileError, match=words):
        load_model(tmp_path / name)


def test_a_damaged_config(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": [')
    with pytest.raises(ModelFileError, match=r"config\.json is not JSON"):
        load_model(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ModelFileError, match=r"config\.json is missing"):
        load_model(tmp_path)

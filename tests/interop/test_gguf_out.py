"""Files we write, read by llama.cpp's own package."""

import gguf
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.interop import gguf as container
from qlora_jax.interop.convert import convert_model
from qlora_jax.interop.gguf_out import TENSOR_TYPES, permute, save_gguf
from qlora_jax.interop.hub import load_model
from qlora_jax.interop.tokenizer import load_tokenizer
from qlora_jax.models.rope import RopeScaling
from tests.interop.folders import FAMILIES, LLAMA, SPECIAL, write_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf_out") / "small"
    write_folder(path, LLAMA | {"tie_word_embeddings": False})
    return path


@pytest.mark.parametrize("kind", TENSOR_TYPES)
def test_the_package_reads_what_its_encoder_makes(folder, tmp_path, kind):
    path = tmp_path / "m.gguf"
    model = load_model(folder, dtype=jnp.float32)
    save_gguf(model, path, tensor_type=kind, tokenizer=load_tokenizer(folder))
    reader = gguf.GGUFReader(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert len(tensors) == 3 + 3 * 9
    q = tensors["blk.1.attn_q.weight"]
    assert q.tensor_type.name == kind and q.shape.tolist() == [64, 64]
    weight = np.asarray(model.layers.q_proj[...][1]).T
    expected = gguf.quants.quantize(permute(weight, 4), q.tensor_type)
    np.testing.assert_array_equal(
        np.asarray(q.data).view(np.uint8).ravel(), expected.view(np.uint8).ravel()
    )
    embedding = tensors["token_embd.weight"].tensor_type.name
    assert embedding == ("Q8_0" if kind in ("Q5_0", "Q4_1", "Q4_0") else kind)
    assert tensors["output_norm.weight"].tensor_type.name == "F32"
    # And we do: within the error of the type.
    bound = {"F32": 0, "F16": 1e-3, "BF16": 5e-3, "Q8_0": 0.01, "Q5_0": 0.06}
    got = load_model(path, dtype=jnp.float32).layers.q_proj[...][1].T
    error = np.linalg.norm(got - weight) / np.linalg.norm(weight)
    assert error <= bound.get(kind, 0.12)


def test_the_metadata(folder, tmp_path):
    convert_model(folder, tmp_path / "m.gguf")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")

    def field(name):
        return reader.get_field(name).contents()

    assert field("general.architecture") == "llama"
    assert field("llama.attention.head_count_kv") == 2
    assert field("llama.rope.dimension_count") == 16
    assert field("llama.context_length") == 128
    assert field("llama.rope.freq_base") == 10000.0
    assert field("tokenizer.ggml.model") == "gpt2"
    assert field("tokenizer.ggml.tokens")[:3] == SPECIAL
    assert field("tokenizer.ggml.token_type")[:4] == [3, 3, 3, 1]
    assert field("tokenizer.ggml.eos_token_id") == 2


def test_rotary_scaling(tmp_path):
    """Llama 3.1's as the factors of its file; read back as what they were made from."""
    published = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    hf = LLAMA | {"head_dim": 128, "rope_theta": 5e5, "rope_scaling": published}
    write_folder(tmp_path / "in", hf | {"max_position_embeddings": 131072})
    convert_model(tmp_path / "in", tmp_path / "m.gguf")
    tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    factors = np.asarray(tensors["rope_freqs.weight"].data)
    assert factors.shape == (64,) and factors[0] == 1 and factors[-1] == 8
    assert load_model(tmp_path / "m.gguf").config.rope_scaling == RopeScaling(
        "llama3", 8.0
    )
    for kind in ("linear", "yarn"):
        scaling = {"rope_type": kind, "factor": 4.0}
        write_folder(tmp_path / kind, LLAMA | {"rope_scaling": scaling})
        convert_model(tmp_path / kind, tmp_path / f"{kind}.gguf")
        before, after = (
            load_model(tmp_path / n).config for n in (kind, f"{kind}.gguf")
        )
        np.testing.assert_allclose(
            before.rope_frequencies(), after.rope_frequencies(), rtol=1e-6
        )
        assert before.rope_scaling is not None and after.rope_scaling is not None
        assert after.rope_scaling.attention_factor == pytest.approx(
            before.rope_scaling.attention_factor
        )


def test_a_tokenizer_without_a_form_there(tmp_path, folder, capsys):
    import shutil

    shutil.copytree(folder, tmp_path / "in")
    (tmp_path / "in" / "tokenizer.json").unlink()
    convert_model(tmp_path / "in", tmp_path / "m.gguf")
    assert "will have no tokenizer" in capsys.readouterr().err
    assert load_model(tmp_path / "m.gguf").config.vocab_size == 259


def test_any_tensors(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {"a": rng.standard_normal((4, 64)), "b": rng.standard_normal(3)}
    metadata = {"general.architecture": "mine", "mine.n": 3, "mine.x": 0.5}
    metadata |= {"mine.names": ["a", "b"], "mine.flag": True, "mine.low": -2}
    path = tmp_path / "x.gguf"
    container.save(path, metadata, tensors, {"a": "Q8_0"})
    found, got = container.load(path)
    assert {key: found[key] for key in metadata} == metadata
    np.testing.assert_array_equal(got["b"], tensors["b"].astype(np.float32))
    assert np.abs(got["a"] - tensors["a"]).max() < 0.02
    with pytest.raises(ValueError, match=r"must say \"general\.architecture\""):
        container.save(path, {}, tensors)
    assert [p.name for p in tmp_path.iterdir()] == ["x.gguf"]


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama-untied-bias"])
def test_types_of_other_families(tmp_path, family):
    write_folder(tmp_path / "in", FAMILIES[family])
    convert_model(tmp_path / "in", tmp_path / "m.gguf", tensor_type="F16")
    tokens = jnp.arange(12)[None]
    before, after = (
        load_model(tmp_path / name, dtype=jnp.float32)(tokens)
        for name in ("in", "m.gguf")
    )
    difference = np.linalg.norm(before - after) / np.linalg.norm(before)
    assert difference < 5e-3

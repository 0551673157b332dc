import struct

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_jax.interop.ggml import TENSOR_TYPES
from qlora_jax.interop.gguf import GGUFFile, GGUFSource, unpermute
from qlora_jax.interop.hub import load_model
from qlora_jax.interop.tokenizer import load_tokenizer
from qlora_jax.interop.weights import ModelFileError
from qlora_jax.models import config_from_hf
from tests.interop.folders import (
    CHATML,
    FAMILIES,
    LLAMA,
    byte_tokenizer,
    random_weights,
    write_folder,
)

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


def permute(rows, heads):
    """What llama.cpp's converter does to q and k of the llama architecture."""
    halves = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return np.swapaxes(halves, 1, 2).reshape(rows.shape)


def write_gguf(path, hf=LLAMA, architecture="llama", types=None):
    """Writes a small model as llama.cpp's converter would; returns its weights."""
    config = config_from_hf(hf)
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_position)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    vocabulary = byte_tokenizer().get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_eos_token_id(2)
    writer.add_chat_template(CHATML)
    weights = random_weights(config)
    for name, value in weights.items():
        own = name
        for theirs, ours in NAMES.items():
            own = own.replace(theirs, ours)
        own = own.replace("model.layers.", "blk.")
        if architecture == "llama" and ".attn_q." in own:
            value = permute(value, config.num_heads)
        if architecture == "llama" and ".attn_k." in own:
            value = permute(value, config.num_kv_heads)
        kind = (types or {}).get(own.split(".")[-2])
        if kind is None:
            writer.add_tensor(own, value)
        else:
            packed = gguf.quants.quantize(value, kind)
            writer.add_tensor(own, packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    write_gguf(path)
    return path


@pytest.mark.parametrize("kind", TENSOR_TYPES.values(), ids=lambda kind: kind.name)
def test_every_type_is_decoded_as_by_the_gguf_package(kind):
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (128, kind.block_bytes), dtype=np.uint8)
    # Keep the two float16 scales, wherever they lie, finite.
    places = {0, 2, kind.block_bytes - 4, kind.block_bytes - 2}
    for place in places if kind.block_size > 1 else {}:
        blocks[:, place + 1] &= 0x3F
    if kind.block_size == 1:
        values = rng.standard_normal(128).astype(np.float32)
        quant = gguf.GGMLQuantizationType[kind.name]
        blocks = gguf.quants.quantize(values, quant).view(np.uint8)
        blocks = blocks.reshape(128, kind.block_bytes)
    expected = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind.name])
    assert kind.decode(blocks).shape == (128, kind.block_size)
    np.testing.assert_array_equal(kind.decode(blocks).ravel(), expected.ravel())


def test_rows_of_q_and_k_are_put_back():
    rows = np.random.default_rng(0).standard_normal((24, 5))
    np.testing.assert_array_equal(unpermute(permute(rows, 3), 3), rows)


@pytest.mark.parametrize(
    "family, architecture", [("llama", "llama"), ("qwen2", "qwen2"), ("qwen3", "qwen3")]
)
def test_the_same_model_as_from_a_folder(family, architecture, tmp_path):
    write_folder(tmp_path / "folder", FAMILIES[family])
    write_gguf(tmp_path / "model.gguf", FAMILIES[family], architecture)
    tokens = jnp.arange(20)[None]
    folder = load_model(tmp_path / "folder", dtype=jnp.float32)
    file = load_model(tmp_path / "model.gguf", dtype=jnp.float32)
    np.testing.assert_allclose(file(tokens), folder(tokens), rtol=1e-6, atol=1e-6)


def test_a_quantized_file(tmp_path):
    types = {
        "ffn_up": gguf.GGMLQuantizationType.Q4_1,
        "attn_q": gguf.GGMLQuantizationType.Q8_0,
        "token_embd": gguf.GGMLQuantizationType.F16,
    }
    weights = write_gguf(tmp_path / "model.gguf", types=types)
    source = GGUFSource(tmp_path / "model.gguf")
    worst = {"mlp.up_proj": 0.1, "self_attn.q_proj": 0.01, "embed_tokens": 1e-3}
    for name, weight in weights.items():
        bound = next((b for part, b in worst.items() if part in name), 0)
        error = np.linalg.norm(source.read(name) - weight) / np.linalg.norm(weight)
        assert error <= bound


def test_tokenizer_from_the_metadata(small):
    tokenizer = load_tokenizer(small)
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.bos_token == ""
    text = "naïve 12 <|im_end|>"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert 2 not in tokenizer.encode(text)
    assert tokenizer.encode(text, special=True)[-1] == 2


def test_what_is_no_gguf_file(tmp_path, small):
    with pytest.raises(ModelFileError, match=r"absent\.gguf is not a file"):
        GGUFFile(tmp_path / "absent.gguf")
    other = tmp_path / "other.gguf"
    other.write_bytes(b"PK\3\4 something else")
    with pytest.raises(ModelFileError, match=r"other\.gguf is not a GGUF file"):
        GGUFFile(other)
    other.write_bytes(b"GGUF" + struct.pack("<I", 1) + small.read_bytes()[8:])
    with pytest.raises(ModelFileError, match="GGUF version 1, and versions 2 and 3"):
        GGUFFile(other)


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path, small):
    data = small.read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in [4, 23, 24, 100, 5000, len(data) // 2, len(data) - 1]:
        cut.write_bytes(data[:length])
        with pytest.raises(ModelFileError, match=r"cut\.gguf: .*(truncated|leaves)"):
            GGUFFile(cut)


def test_an_unknown_architecture_is_refused_by_name(tmp_path):
    write_gguf(tmp_path / "model.gguf", architecture="mamba")
    with pytest.raises(NotImplementedError, match="architecture 'mamba' is not supp"):
        load_model(tmp_path / "model.gguf")


def test_an_unknown_type_is_refused_by_name(tmp_path, small):
    data = bytearray(small.read_bytes())
    at = data.find(b"output_norm.weight") + len(b"output_norm.weight") + 4 + 8
    data[at : at + 4] = struct.pack("<I", 23)
    (tmp_path / "new.gguf").write_bytes(data)
    with pytest.raises(
        NotImplementedError, match=r"output_norm\.weight is of ggml type"
    ):
        GGUFFile(tmp_path / "new.gguf")


@settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.data())
def test_a_damaged_header_gives_the_readers_own_error_or_none(tmp_path, small, data):
    content = bytearray(small.read_bytes())
    header = len(content) - sum(t.nbytes for t in GGUFFile(small).tensors.values())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, header - 1))
        content[at] = data.draw(st.integers(0, 255))
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(content)
    try:
        source = GGUFSource(damaged)
        for name in source.shapes():
            source.read(name)
    except (ModelFileError, NotImplementedError, ValueError) as error:
        assert "\n" not in str(error)

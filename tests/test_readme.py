"""The README's Python runs, in its order, on a tiny model in place of the 8B one."""

import json
import re

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.conftest import ROOT

pytestmark = pytest.mark.unoptimized

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}


@pytest.fixture
def tiny_model(tmp_path):
    """A folder as Hugging Face lays it out, with random weights."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return (rng.normal(size=shape) * 0.05).astype(np.float32)

    tensors = {
        "model.embed_tokens.weight": normal(128, 64),
        "model.norm.weight": np.ones(64, np.float32),
        "lm_head.weight": normal(128, 64),
    }
    for i in range(2):
        prefix = f"model.layers.{i}."
        for name, shape in {
            "self_attn.q_proj": (64, 64),
            "self_attn.k_proj": (32, 64),
            "self_attn.v_proj": (32, 64),
            "self_attn.o_proj": (64, 64),
            "mlp.gate_proj": (128, 64),
            "mlp.up_proj": (128, 64),
            "mlp.down_proj": (64, 128),
        }.items():
            tensors[f"{prefix}{name}.weight"] = normal(*shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{name}.weight"] = np.ones(64, np.float32)
    folder = tmp_path / "tiny"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def test_python_of_the_readme_runs(tiny_model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 3
    source = "\n".join(blocks)
    assert source.count("meta-llama/Llama-3.1-8B") == 1
    source = source.replace("meta-llama/Llama-3.1-8B", str(tiny_model))
    source = source.replace("rank=64", "rank=8")  # the tiny model is 32 wide
    names: dict = {}
    exec(compile(source, "README.md", "exec"), names)
    # An untrained model of 128 tokens: near log(128) = 4.85, here on one token.
    assert 0 < float(names["loss"]) < 6
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    assert "4.127 bits a parameter" in capsys.readouterr().out


def test_commands_of_the_readme_are_there():
    text = (ROOT / "README.md").read_text()
    assert "pip install -e '.[test]' && pytest\n" in text
    assert "pip install -e '.[train]' && python examples/finetune_llama.py\n" in text

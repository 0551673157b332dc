"""Small models of every family, written to disk as users have them."""

import json
import pathlib

import ml_dtypes
import numpy as np
import safetensors.numpy
import tokenizers

from qlora_jax.interop.weights import expected_shapes
from qlora_jax.models import config_from_hf

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VOCAB = 259

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
# Every way in which the families differ, one config each.
FAMILIES = {
    "llama": LLAMA,
    "llama-untied-bias": LLAMA
    | {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
    "llama3": LLAMA | {"rope_scaling": LLAMA3},
    "llama3-transformers5": LLAMA
    | {"rope_theta": None, "rope_parameters": LLAMA3 | {"rope_theta": 5e5}},
    "linear": LLAMA | {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "mistral": LLAMA | {"architectures": ["MistralForCausalLM"], "sliding_window": 5},
    "qwen2": LLAMA
    | {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 4}
    # present in Qwen2's configs, and switched off
    | {"use_sliding_window": False},
    "qwen3": LLAMA | {"architectures": ["Qwen3ForCausalLM"], "head_dim": 24},
}


def random_weights(config, seed: int = 0) -> dict[str, np.ndarray]:
    """Weights under Hugging Face's names, large enough that every part matters."""
    rng = np.random.default_rng(seed)
    return {
        name: (
            1 + 0.1 * rng.standard_normal(shape)
            if "norm" in name
            else rng.standard_normal(shape) * (1 / shape[-1] ** 0.5)
        ).astype(np.float32)
        for name, shape in expected_shapes(config).items()
    }


def byte_tokenizer() -> tokenizers.Tokenizer:
    """A token for each byte, after three special ones."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(SPECIAL + alphabet)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    return backend


def write_folder(
    folder: pathlib.Path, hf: dict = LLAMA, *, shards: int = 1, dtype=np.float32
) -> dict[str, np.ndarray]:
    """Writes a Hugging Face folder and returns its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = random_weights(config_from_hf(hf))
    weights = {name: value.astype(dtype) for name, value in weights.items()}
    (folder / "config.json").write_text(json.dumps(hf))
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<|im_end|>", "chat_template": CHATML}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if shards == 1:
        safetensors.numpy.save_file(weights, folder / "model.safetensors")
        return weights
    names = sorted(weights)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: weights[name] for name in names[i::shards]}
        safetensors.numpy.save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return weights


BFLOAT16 = ml_dtypes.bfloat16

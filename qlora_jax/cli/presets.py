"""The hyperparameters of QLoRA's paper, by size of the model."""

from typing import Any

# Table 9 and appendix B (https://arxiv.org/abs/2305.14314), rows OASST1, and the
# scripts of the paper's code: the whole conversation is learned, 512 tokens of it.
_GUANACO = {
    "data": ("hf:timdettmers/openassistant-guanaco",),
    "format": "oasst1",
    "chat_template": "guanaco",
    "answers": "all",
    "train_on_source": True,
    "target_max_len": 512,
    "seq_len": 512,
    "group_by_length": True,
    "quantize": "nf4",
    "double_quant": True,
    "paged": True,
    "rank": 64,
    "alpha": 16.0,
    "b2": 0.999,
    "max_grad_norm": 0.3,
    "schedule": "constant",
    "warmup_steps": 0,
    "weight_decay": 0.0,
    "batch_size": 16,
    "accumulate": 16,
    "steps": 1875,
    "eval_every": 187,
    "eval_size": 200,
}
_LARGE = {"learning_rate": 1e-4, "dropout": 0.05}
_SMALL = {"learning_rate": 2e-4, "dropout": 0.1}

PRESETS: dict[str, dict[str, Any]] = {
    "guanaco-7b": {**_GUANACO, **_SMALL, "model": "huggyllama/llama-7b"},
    "guanaco-13b": {**_GUANACO, **_SMALL, "model": "huggyllama/llama-13b"},
    "guanaco-33b": {**_GUANACO, **_LARGE, "model": "huggyllama/llama-30b"},
    "guanaco-65b": {**_GUANACO, **_LARGE, "model": "huggyllama/llama-65b"},
}

"""The config of a model as Hugging Face writes it, read and written."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from qlora_jax.models.config import LlamaConfig
from qlora_jax.models.rope import RopeScaling

# What a Hugging Face architecture implies beyond the fields of its config.
FAMILIES: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {},
    "MistralForCausalLM": {},
    "Qwen2ForCausalLM": {"qkv_bias": True},
    "Qwen3ForCausalLM": {"qk_norm": True},
}


def _rope_from_hf(config: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    # transformers 5 nests everything in rope_parameters; 4 has rope_theta beside an
    # optional rope_scaling whose kind is spelled "type" in the oldest configs.
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope = _check_types(rope, _ROPE_TYPES)
    theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor", 1) != 1:
        raise NotImplementedError(
            f"partial_rotary_factor={rope['partial_rotary_factor']!r}: only heads that "
            "are rotated whole are supported."
        )
    if kind == "default":
        return float(theta), None
    context = config.get("max_position_embeddings", 2048)
    original = config.get("original_max_position_embeddings") or rope.get(
        "original_max_position_embeddings"
    )
    if kind == "dynamic":
        original = context  # as transformers has it, whatever the config says besides
    original = original or context
    ratio = context / original if kind == "yarn" and original > 0 else 1.0
    factor = float(rope.get("factor", ratio))
    scaling = RopeScaling(
        kind=kind,
        factor=factor,
        low_freq_factor=float(rope.get("low_freq_factor", 1.0)),
        high_freq_factor=float(rope.get("high_freq_factor", 4.0)),
        original_max_position=original,
        beta_fast=float(rope.get("beta_fast") or 32.0),
        beta_slow=float(rope.get("beta_slow") or 1.0),
        truncate=rope.get("truncate", True),
        attention_factor=_attention_factor(rope, factor) if kind == "yarn" else 1.0,
    )
    return float(theta), scaling


def _attention_factor(rope: Mapping[str, Any], factor: float) -> float:
    """YaRN's factor of cosine and sine: as the config says, else by its formula."""
    if "attention_factor" in rope:
        return float(rope["attention_factor"])

    def sharper(weight: float) -> float:
        return 0.1 * weight * float(np.log(factor)) + 1.0 if factor > 1 else 1.0

    mscale, all_dims = rope.get("mscale"), rope.get("mscale_all_dim")
    if mscale and all_dims:
        return sharper(mscale) / (sharper(all_dims) or 1.0)
    return sharper(1.0)


def _window_from_hf(config: Mapping[str, Any], architecture: str) -> int | None:
    window = config.get("sliding_window")
    # Qwen's configs name a window even where it is switched off, which is the default.
    if not config.get("use_sliding_window", not architecture.startswith("Qwen")):
        return None
    kinds = set(config.get("layer_types") or ())
    if not kinds and config.get("max_window_layers") is not None:
        # The layers before this one see everything.
        before, layers = config["max_window_layers"], config["num_hidden_layers"] or 0
        kinds = {"full_attention"} if before > 0 else set()
        kinds |= {"sliding_attention"} if before < layers else set()
    if window is None or not kinds:
        return window
    if len(kinds) > 1 or not kinds <= {"full_attention", "sliding_attention"}:
        raise NotImplementedError(
            f"Layers of different attention ({', '.join(sorted(map(str, kinds)))}); "
            "supported is one kind, full or sliding, for all."
        )
    return window if kinds == {"sliding_attention"} else None


_NUMBER = (int, float)
# The JSON types of the fields that are read; null stands for absence.
_HF_TYPES: dict[str, tuple[type, ...]] = {
    "architectures": (list,),
    "model_type": (str,),
    "hidden_act": (str,),
    "vocab_size": (int,),
    "hidden_size": (int,),
    "intermediate_size": (int,),
    "num_hidden_layers": (int,),
    "num_attention_heads": (int,),
    "num_key_value_heads": (int,),
    "head_dim": (int,),
    "max_position_embeddings": (int,),
    "original_max_position_embeddings": (int,),
    "max_window_layers": (int,),
    "sliding_window": (int,),
    "rms_norm_eps": _NUMBER,
    "rope_theta": _NUMBER,
    "rope_parameters": (dict,),
    "rope_scaling": (dict,),
    "layer_types": (list,),
    "tie_word_embeddings": (bool,),
    "attention_bias": (bool,),
    "mlp_bias": (bool,),
    "use_sliding_window": (bool,),
    "bos_token_id": (int,),
    "eos_token_id": (int, list),
}
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
_ROPE_TYPES: dict[str, tuple[type, ...]] = {
    "rope_type": (str,),
    "type": (str,),
    "rope_theta": _NUMBER,
    "factor": _NUMBER,
    "low_freq_factor": _NUMBER,
    "high_freq_factor": _NUMBER,
    "original_max_position_embeddings": (int,),
    "partial_rotary_factor": _NUMBER,
    "beta_fast": _NUMBER,
    "beta_slow": _NUMBER,
    "mscale": _NUMBER,
    "mscale_all_dim": _NUMBER,
    "attention_factor": _NUMBER,
    "truncate": (bool,),
}
# Beyond any model, and within what float32 and memory can hold.
_LARGEST = 1e15


def _check_types(
    config: Mapping[str, Any], types: Mapping[str, tuple[type, ...]]
) -> dict[str, Any]:
    """Returns the fields that are given; a value of another type is refused."""
    fields = {k: v for k, v in config.items() if v is not None or k in _REQUIRED}
    for key, kinds in types.items():
        value: Any = fields.get(key)
        if value is None:
            continue
        is_number = type(value) in _NUMBER
        if type(value) not in kinds or (is_number and not abs(value) < _LARGEST):
            names = " or ".join(kind.__name__ for kind in kinds)
            raise ValueError(
                f"The config of the model says {key}={value!r}, which is no {names}."
            )
        if isinstance(value, list) and not all(type(v) in (int, str) for v in value):
            raise ValueError(f"The config of the model says {key}={value!r}.")
    return fields


def config_from_hf(config: Mapping[str, Any]) -> LlamaConfig:
    """Reads the `config.json` of a Hugging Face checkpoint.

    Both forms are understood: transformers 4 (`rope_theta`, `rope_scaling`) and 5
    (`rope_parameters`).

    Args:
        config: the parsed JSON.

    Returns:
        The config of the same model.

    Raises:
        ValueError: if a field that every family has is missing, or one is of another
            type than it should be.
        NotImplementedError: if the architecture, the activation or the rotary scaling
            is not one of those this model can be.
    """
    config = _check_types(config, _HF_TYPES)
    names = config.get("architectures") or [config.get("model_type", "unknown")]
    architecture = names[0]
    if architecture not in FAMILIES:
        raise NotImplementedError(
            f"Architecture {architecture!r} is not supported; supported are "
            f"{', '.join(FAMILIES)}."
        )
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise NotImplementedError(f"Activation {activation!r}; supported is 'silu'.")
    theta, scaling = _rope_from_hf(config)
    family = FAMILIES[architecture]
    heads = config.get("num_attention_heads", 0)
    eos = config.get("eos_token_id")
    try:
        return LlamaConfig(
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_layers=config["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or 0,
            norm_eps=config.get("rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            max_position=config.get("max_position_embeddings", 2048),
            tie_embeddings=config.get("tie_word_embeddings", False),
            qkv_bias=family.get("qkv_bias", config.get("attention_bias", False)),
            o_bias=config.get("attention_bias", False) and "qkv_bias" not in family,
            mlp_bias=config.get("mlp_bias", False),
            qk_norm=family.get("qk_norm", False),
            sliding_window=_window_from_hf(config, architecture),
            architecture=architecture,
            bos_token_id=config.get("bos_token_id"),
            eos_token_id=() if eos is None else tuple(np.atleast_1d(eos).tolist()),
        )
    except KeyError as error:
        raise ValueError(f"The config of the model has no {error}.") from None


# The fields that go by another name in a Hugging Face config.
_HF_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
    "max_position": "max_position_embeddings",
    "tie_embeddings": "tie_word_embeddings",
    "mlp_bias": "mlp_bias",
    "sliding_window": "sliding_window",
    "bos_token_id": "bos_token_id",
}


# The fields of a scaling besides its factor, by its kind.
_ORIGINAL = {"original_max_position": "original_max_position_embeddings"}
_HF_ROPE_FIELDS: dict[str, dict[str, str]] = {
    "llama3": _ORIGINAL
    | {name: name for name in ("low_freq_factor", "high_freq_factor")},
    "yarn": _ORIGINAL
    | {
        name: name
        for name in ("beta_fast", "beta_slow", "truncate", "attention_factor")
    },
}


def config_to_hf(config: LlamaConfig) -> dict[str, Any]:
    """Returns the `config.json` of a model, in the form that transformers 4 and 5 read.

    Args:
        config: the model's.

    Raises:
        NotImplementedError: if such a config cannot say all of it; the fields are
            named.
    """
    hf: dict[str, Any] = {
        "architectures": [config.architecture],
        "model_type": config.architecture.removesuffix("ForCausalLM").lower(),
        "hidden_act": "silu",
        "attention_bias": config.o_bias,
    }
    hf |= {name: getattr(config, field) for field, name in _HF_FIELDS.items()}
    if config.architecture.startswith("Qwen"):
        hf["use_sliding_window"] = config.sliding_window is not None
        hf["max_window_layers"] = 0 if config.sliding_window else config.num_layers
    eos = config.eos_token_id
    hf["eos_token_id"] = eos[0] if len(eos) == 1 else list(eos) or None
    if (scaling := config.rope_scaling) is not None:
        hf["rope_scaling"] = {"rope_type": scaling.kind, "factor": scaling.factor}
        fields = _HF_ROPE_FIELDS.get(scaling.kind, {})
        hf["rope_scaling"] |= {name: getattr(scaling, f) for f, name in fields.items()}
    again = config_from_hf(hf)
    fields = [field.name for field in dataclasses.fields(config)]
    if lost := [f for f in fields if getattr(again, f) != getattr(config, f)]:
        told = ", ".join(f"{field}={getattr(config, field)!r}" for field in lost)
        raise NotImplementedError(
            f"The config of a {config.architecture} in Hugging Face's form cannot say "
            f"{told}."
        )
    return hf

"""What distinguishes one Llama-like model from another, as data."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

# Names of the linear weights of a layer, in the order they are applied.
ATTENTION_WEIGHTS = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_WEIGHTS = ("gate_proj", "up_proj", "down_proj")
LINEAR_WEIGHTS = ATTENTION_WEIGHTS + MLP_WEIGHTS


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How the frequencies of the rotary embedding are stretched for long contexts.

    Attributes:
        kind: a name in `ROPE_SCALINGS`: "linear", "dynamic", "yarn", "llama3" or
            "factors".
        factor: by how much the lowest frequencies are divided. "dynamic": by how many
            times the context may grow for the stretch to grow as much.
        low_freq_factor: "llama3": wavelengths above `original_max_position` divided by
            this are divided by `factor`.
        high_freq_factor: "llama3": wavelengths below `original_max_position` divided by
            this stay.
        original_max_position: the context the model was pretrained with.
        factors: "factors": what each frequency is divided by, `head_dim / 2` numbers.
        beta_fast: "yarn": frequencies that turn more often than this within
            `original_max_position` stay.
        beta_slow: "yarn": those that turn less often than this are divided by `factor`.
        truncate: "yarn": the bounds between them are rounded outwards to whole pairs.
        attention_factor: "yarn": what cosine and sine are multiplied by.

    Raises:
        NotImplementedError: if the kind is not known.
        ValueError: if a number has no meaning.
    """

    kind: str
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192
    factors: tuple[float, ...] = ()
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0

    def __post_init__(self):
        if self.kind not in ROPE_SCALINGS:
            raise NotImplementedError(
                f"Rotary scaling {self.kind!r} is not known; known are "
                f"{', '.join(sorted(ROPE_SCALINGS))}."
            )
        for name in ("factor", "original_max_position", "attention_factor"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)!r} must be positive.")
        for low, high in (
            ("low_freq_factor", "high_freq_factor"),
            ("beta_slow", "beta_fast"),
        ):
            if not 0 < getattr(self, low) < getattr(self, high):
                raise ValueError(
                    f"{low}={getattr(self, low)!r} must be positive and below "
                    f"{high}={getattr(self, high)!r}."
                )
        if any(not factor > 0 for factor in self.factors):
            raise ValueError("Rotary factors must be positive.")


def _linear(frequencies: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    return frequencies / scaling.factor


def _dynamic(frequencies: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    # Up to the original context nothing is stretched; see `rope_exponents`.
    return frequencies


def _yarn(frequencies: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    # https://arxiv.org/abs/2309.00071, section 3.2, with the ramp over pairs of
    # dimensions between those that turn beta_fast and beta_slow times.
    pairs = len(frequencies)
    # Frequency i is theta ** (-i / pairs), so i is -pairs log(frequency) / log(theta).
    log_theta = -pairs * np.log(frequencies[1]) if pairs > 1 else 0.0
    if not log_theta > 0:
        raise ValueError("yarn takes rope_theta above 1 and head_dim above 2.")

    def pair_that_turns(times: float) -> float:
        frequency = 2 * np.pi * times / scaling.original_max_position
        return -pairs * np.log(frequency) / log_theta

    low = pair_that_turns(scaling.beta_fast)
    high = pair_that_turns(scaling.beta_slow)
    if scaling.truncate:
        low, high = np.floor(low), np.ceil(high)
    low, high = max(low, 0), min(high, 2 * pairs - 1)
    width = high - low or 0.001
    ramp = np.clip((np.arange(pairs) - low) / width, 0, 1)
    return frequencies * (1 - ramp + ramp / scaling.factor)


def _llama3(frequencies: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    # Llama 3.1: between the two wavelengths the divisor goes smoothly from 1 to factor.
    wavelengths = 2 * np.pi / frequencies
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = (scaling.original_max_position / wavelengths - low) / (high - low)
    smooth = np.clip(smooth, 0, 1)
    return frequencies * ((1 - smooth) / scaling.factor + smooth)


def _factors(frequencies: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    if len(scaling.factors) != len(frequencies):
        raise ValueError(
            f"{len(scaling.factors)} rotary factors for {len(frequencies)} "
            "frequencies; there is one for each pair of head dimensions."
        )
    return frequencies / np.asarray(scaling.factors)


ROPE_SCALINGS: dict[str, Callable[[np.ndarray, RopeScaling], np.ndarray]] = {
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "llama3": _llama3,
    "factors": _factors,
}


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Shape and variants of a Llama-like decoder.

    Attributes:
        vocab_size: rows of the embedding.
        hidden_size: width of the residual stream.
        intermediate_size: width of the gated MLP.
        num_layers: decoder layers.
        num_heads: query heads.
        num_kv_heads: key and value heads; it divides `num_heads`.
        head_dim: width of a head; 0 stands for `hidden_size // num_heads`.
        norm_eps: added to the mean square in every RMSNorm.
        rope_theta: base of the rotary frequencies.
        rope_scaling: how they are stretched, None for not at all.
        max_position: the context length the model is meant for.
        tie_embeddings: the head is the transposed embedding.
        qkv_bias: q, k and v projections add a bias (Qwen2).
        o_bias: the output projection adds a bias.
        mlp_bias: the three projections of the MLP add a bias.
        qk_norm: RMSNorm over each head of q and k before the rotation (Qwen3).
        sliding_window: a token sees this many last tokens, itself included (Mistral);
            None for all.
        architecture: the class name in a Hugging Face config.
        bos_token_id: first token of a text, None if the model has none.
        eos_token_id: the tokens that end a text.

    Raises:
        ValueError: if heads or sizes do not fit together.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int = 0
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    max_position: int = 2048
    tie_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    architecture: str = "LlamaForCausalLM"
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            positive = field.type is int and field.name != "head_dim"
            if positive and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{field.name}={value!r} must be a positive integer.")
        if self.head_dim < 0:
            raise ValueError(f"{self.head_dim=} must be positive, or 0.")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"{self.num_heads=} must be a multiple of {self.num_kv_heads=}."
            )
        if not self.head_dim:
            if self.hidden_size % self.num_heads:
                raise ValueError(
                    f"{self.hidden_size=} is no multiple of {self.num_heads=}: "
                    "give head_dim."
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_heads)
        if self.head_dim % 2:
            raise ValueError(f"{self.head_dim=} must be even: rotation takes pairs.")
        if not self.rope_theta > 0:
            raise ValueError(f"{self.rope_theta=} must be positive.")
        if self.is_rope_dynamic and self.head_dim == 2:
            raise ValueError("Dynamic rotary scaling takes head_dim above 2.")

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """Returns [in, out] of each linear weight of a layer, by its name."""
        hidden, inner = self.hidden_size, self.intermediate_size
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {
            "q_proj": (hidden, q),
            "k_proj": (hidden, kv),
            "v_proj": (hidden, kv),
            "o_proj": (q, hidden),
            "gate_proj": (hidden, inner),
            "up_proj": (hidden, inner),
            "down_proj": (inner, hidden),
        }

    def biased(self) -> tuple[str, ...]:
        """Returns the names of the linear weights that have a bias."""
        return (
            ATTENTION_WEIGHTS[:3] * self.qkv_bias
            + ATTENTION_WEIGHTS[3:] * self.o_bias
            + MLP_WEIGHTS * self.mlp_bias
        )

    @property
    def is_rope_dynamic(self) -> bool:
        """Whether the frequencies depend on the length, see `rope_exponents`."""
        return self.rope_scaling is not None and self.rope_scaling.kind == "dynamic"

    def rope_exponents(self) -> np.ndarray:
        """Returns how a document's length changes each frequency, if dynamic.

        With M = `rope_scaling.original_max_position` a document of L tokens has

            frequency[i] = rope_frequencies()[i] * stretch ** -exponent[i]
            stretch = factor * max(L, M) / M - (factor - 1)

        which is rope_theta times stretch ** (head_dim / (head_dim - 2)): the highest
        frequency stays, the lowest is divided by the stretch.

        Returns:
            float32 [head_dim / 2], from 0 to 1.
        """
        pairs = np.arange(self.head_dim // 2, dtype=np.float32)
        return 2 * pairs / np.float32(self.head_dim - 2)

    def rope_frequencies(self) -> np.ndarray:
        """Returns the angle by which each pair of dimensions turns a position.

            frequency[i] = rope_theta ** (-2 i / head_dim),  then stretched

        Returns:
            float32 [head_dim / 2], in radians; if `is_rope_dynamic`, those of a
            document that is no longer than the original context.
        """
        exponents = np.arange(0, self.head_dim, 2, dtype=np.float64) / self.head_dim
        frequencies = self.rope_theta**-exponents
        if self.rope_scaling is not None:
            scale = ROPE_SCALINGS[self.rope_scaling.kind]
            frequencies = scale(frequencies, self.rope_scaling)
        return frequencies.astype(np.float32)


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

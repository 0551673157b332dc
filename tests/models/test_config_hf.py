import pytest

from qlora_jax.models.config_hf import config_from_hf, config_to_hf
from tests.interop.folders import FAMILIES, LLAMA

SCALINGS = [
    {"rope_type": "linear", "factor": 2.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64},
    {"rope_type": "llama3", "factor": 8.0, "high_freq_factor": 4.0}
    | {"low_freq_factor": 1.0, "original_max_position_embeddings": 32},
]


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda s: s["rope_type"])
def test_forms_of_transformers_4_and_5_agree(scaling):
    kind = scaling["rope_type"]
    four = config_from_hf(LLAMA | {"rope_theta": 5e5, "rope_scaling": scaling})
    five = config_from_hf(LLAMA | {"rope_parameters": scaling | {"rope_theta": 5e5}})
    old = {"type": kind} | {k: v for k, v in scaling.items() if k != "rope_type"}
    oldest = config_from_hf(LLAMA | {"rope_theta": 5e5, "rope_scaling": old})
    assert four == five == oldest
    assert four.rope_theta == 5e5
    assert four.rope_scaling is not None
    assert (four.rope_scaling.kind, four.rope_scaling.factor) == (
        kind,
        scaling["factor"],
    )
    context = scaling.get("original_max_position_embeddings", 128)
    assert four.rope_scaling.original_max_position == context
    assert config_from_hf(config_to_hf(four)) == four


def test_families_are_data():
    qwen2, qwen3 = (config_from_hf(FAMILIES[name]) for name in ("qwen2", "qwen3"))
    assert qwen2.biased() == ("q_proj", "k_proj", "v_proj")
    assert qwen2.sliding_window is None
    assert qwen3.qk_norm and qwen3.head_dim == 24 and qwen3.biased() == ()
    assert config_from_hf(FAMILIES["mistral"]).sliding_window == 5
    assert len(config_from_hf(FAMILIES["llama-untied-bias"]).biased()) == 7


@pytest.mark.parametrize(
    "change, error, words",
    [
        (
            {"architectures": ["GPT2LMHeadModel"]},
            NotImplementedError,
            "'GPT2LMHeadModel' is not supported; supported are LlamaForCausalLM",
        ),
        ({"hidden_act": "gelu"}, NotImplementedError, "Activation 'gelu'"),
        (
            {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}},
            NotImplementedError,
            "'longrope' is not known; known are dynamic, factors, linear, llama3, yarn",
        ),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 0.0}},
            ValueError,
            "factor=0.0 must be positive",
        ),
        (
            {"rope_scaling": {"rope_type": "llama3", "low_freq_factor": 4.0}},
            ValueError,
            "low_freq_factor=4.0 must be positive and below high_freq_factor=4.0",
        ),
        (
            {"rope_parameters": {"partial_rotary_factor": 0.5}},
            NotImplementedError,
            "partial_rotary_factor=0.5",
        ),
        (
            {"architectures": None, "model_type": ["llama"]},
            ValueError,
            r"model_type=\['llama'\], which is no str",
        ),
        ({"vocab_size": None}, ValueError, "vocab_size=None must be a positive"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(change, error, words):
    with pytest.raises(error, match=words):
        config_from_hf(LLAMA | change)


def test_a_missing_field_is_named():
    with pytest.raises(ValueError, match="has no 'hidden_size'"):
        config_from_hf({k: v for k, v in LLAMA.items() if k != "hidden_size"})

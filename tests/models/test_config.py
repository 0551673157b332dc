import dataclasses

import numpy as np
import pytest

from qlora_jax.models import RopeScaling, config_from_hf
from qlora_jax.models.config import config_to_hf
from tests.interop.folders import FAMILIES, LLAMA


def test_llama3_scaling_of_the_frequencies():
    """Short wavelengths stay, long ones are divided, between them it goes smoothly."""
    plain = config_from_hf(LLAMA | {"head_dim": 64}).rope_frequencies()
    hf = FAMILIES["llama3"] | {"head_dim": 64}
    scaled = config_from_hf(hf).rope_frequencies()
    wavelengths = 2 * np.pi / plain
    ratio = scaled / plain
    np.testing.assert_allclose(ratio[wavelengths < 32 / 4], 1, rtol=1e-6)
    np.testing.assert_allclose(ratio[wavelengths > 32 / 1], 1 / 8, rtol=1e-6)
    middle = (wavelengths > 8) & (wavelengths < 32)
    assert middle.any()
    smooth = (32 / wavelengths[middle] - 1) / 3
    expected = (1 - smooth) / 8 + smooth
    np.testing.assert_allclose(ratio[middle], expected, rtol=1e-5)


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


def test_dynamic_scaling_is_that_of_the_length():
    """Up to the original context nothing changes; then as if theta were another."""
    hf = LLAMA | {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}
    config = config_from_hf(hf)
    plain = config_from_hf(LLAMA)
    np.testing.assert_array_equal(config.rope_frequencies(), plain.rope_frequencies())
    stretch = 4 * 200 / 128 - 3
    scaled = plain.rope_frequencies() * stretch ** -config.rope_exponents()
    theta = 10000.0 * stretch ** (16 / 14)
    expected = dataclasses.replace(plain, rope_theta=theta).rope_frequencies()
    np.testing.assert_allclose(scaled, expected, rtol=1e-5)


def test_yarn_keeps_fast_and_divides_slow_frequencies():
    scaling = {"rope_type": "yarn", "factor": 4.0, "beta_fast": 8}
    scaling |= {"original_max_position_embeddings": 128}
    config = config_from_hf(LLAMA | {"head_dim": 64, "rope_scaling": scaling})
    plain = config_from_hf(LLAMA | {"head_dim": 64}).rope_frequencies()
    ratio = config.rope_frequencies() / plain
    turns = plain * 128 / (2 * np.pi)
    np.testing.assert_allclose(ratio[turns > 8 * 1.4], 1, rtol=1e-6)
    np.testing.assert_allclose(ratio[turns < 1 / 1.4], 1 / 4, rtol=1e-6)
    assert np.all(np.diff(ratio) <= 0)
    assert config.rope_scaling is not None
    assert config.rope_scaling.attention_factor == pytest.approx(1 + 0.1 * np.log(4))
    explicit = scaling | {"mscale": 2.0, "mscale_all_dim": 1.0}
    config = config_from_hf(LLAMA | {"rope_scaling": explicit})
    assert config.rope_scaling is not None
    assert config.rope_scaling.attention_factor == pytest.approx(
        (1 + 0.2 * np.log(4)) / (1 + 0.1 * np.log(4))
    )


def test_families_are_data():
    qwen2, qwen3 = (config_from_hf(FAMILIES[name]) for name in ("qwen2", "qwen3"))
    assert qwen2.biased() == ("q_proj", "k_proj", "v_proj")
    assert qwen2.sliding_window is None
    assert qwen3.qk_norm and qwen3.head_dim == 24 and qwen3.biased() == ()
    assert config_from_hf(FAMILIES["mistral"]).sliding_window == 5
    assert len(config_from_hf(FAMILIES["llama-untied-bias"]).biased()) == 7


def test_factors_of_a_file():
    scaling = RopeScaling("factors", factors=tuple([2.0] * 8))
    hf = config_from_hf(LLAMA)
    halved = hf.rope_frequencies() / 2
    scaled = dataclasses.replace(hf, rope_scaling=scaling).rope_frequencies()
    np.testing.assert_allclose(scaled, halved, rtol=1e-6)
    wrong = dataclasses.replace(scaling, factors=(1.0,))
    with pytest.raises(ValueError, match="1 rotary factors for 8 frequencies"):
        dataclasses.replace(hf, rope_scaling=wrong).rope_frequencies()


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

import dataclasses

import numpy as np
import pytest

from qlora_jax.models import RopeScaling, config_from_hf
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


def test_forms_of_transformers_4_and_5_agree():
    four = config_from_hf(LLAMA | {"rope_theta": 5e5, "rope_scaling": {
        "rope_type": "linear", "factor": 2.0}})  # fmt: skip
    five = config_from_hf(LLAMA | {"rope_parameters": {
        "rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}})  # fmt: skip
    assert four == five
    assert four.rope_scaling == RopeScaling("linear", 2.0, original_max_position=128)


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
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
            NotImplementedError,
            "Rotary scaling 'yarn' is not known; known are factors, linear, llama3",
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

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


def test_factors_of_a_file():
    scaling = RopeScaling("factors", factors=tuple([2.0] * 8))
    hf = config_from_hf(LLAMA)
    halved = hf.rope_frequencies() / 2
    scaled = dataclasses.replace(hf, rope_scaling=scaling).rope_frequencies()
    np.testing.assert_allclose(scaled, halved, rtol=1e-6)
    wrong = dataclasses.replace(scaling, factors=(1.0,))
    with pytest.raises(ValueError, match="1 rotary factors for 8 frequencies"):
        dataclasses.replace(hf, rope_scaling=wrong).rope_frequencies()

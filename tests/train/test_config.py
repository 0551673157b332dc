import dataclasses

import numpy as np
import pytest

from qlora_jax.train import (
    TrainConfig,
)
from tests.train.tiny import (
    SMALL,
)


def test_schedules():
    def rates(**change):
        config = dataclasses.replace(SMALL, learning_rate=1.0, steps=10, **change)
        return [float(config.learning_rates()(i)) for i in range(10)]

    assert rates() == [1.0] * 10
    line = 1 - np.arange(10) / 10
    np.testing.assert_allclose(rates(schedule="linear"), line, atol=1e-6)
    half_wave = (1 + np.cos(np.pi * np.arange(10) / 10)) / 2
    np.testing.assert_allclose(rates(schedule="cosine"), half_wave, atol=1e-6)
    warm = rates(warmup_steps=4, schedule="linear")
    np.testing.assert_allclose(warm[:5], [0.25, 0.5, 0.75, 1, 1])
    np.testing.assert_allclose(warm[4:], 1 - np.arange(6) / 6, atol=1e-6)
    assert rates(warmup_steps=1)[0] == 1.0


@pytest.mark.parametrize(
    "change, words",
    [
        ({"rank": 0}, "rank=0 must be at least 1"),
        ({"learning_rate": 0.0}, "learning_rate=0.0 must be positive"),
        ({"batch_size": 6, "accumulate": 4}, "batch_size=6 must be a multiple of"),
        ({"warmup_steps": 9}, "warmup_steps=9 must be at most steps=6"),
    ],
)
def test_wrong_settings(change, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(SMALL, **change)


def test_the_paper_is_the_default():
    config = TrainConfig()
    assert (config.rank, config.alpha, config.learning_rate) == (64, 16, 2e-4)
    assert (config.b2, config.max_grad_norm, config.batch_size) == (0.999, 0.3, 16)
    assert (config.schedule, config.dropout, config.weight_decay) == (
        "constant",
        0.1,
        0,
    )

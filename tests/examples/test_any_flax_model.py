import pytest

from examples.any_flax_model import has_canvit, train_canvit, train_linen, train_nnx

pytestmark = [pytest.mark.unoptimized, pytest.mark.slow]


@pytest.mark.parametrize("train", [train_linen, train_nnx, train_canvit])
def test_models_not_written_for_adapters_learn(train):
    if train is train_canvit and not has_canvit():
        pytest.skip("canvit-nnx is not installed; pip install canvit-nnx")
    first, last = train()
    assert first > 1.2
    assert last < 0.1  # the loss that the example reaches

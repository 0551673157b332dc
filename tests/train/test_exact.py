"""The whole backward in bfloat16 through NF4 against float32 through plain weights."""

import jax
import jax.numpy as jnp
import pytest

from qlora_jax.models import LlamaConfig
from tests.tolerances import STEP_COSINE
from tests.train.exact import cosines, gradient, models

pytestmark = pytest.mark.unoptimized

CONFIG = LlamaConfig(
    vocab_size=256,
    hidden_size=128,
    intermediate_size=256,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
)


@pytest.mark.parametrize(
    "options", [{"remat": "full"}, {"remat": "none"}, {"remat": "offload"}], ids=str
)
def test_gradients_are_those_of_the_float32_model(options):
    trainable, frozen, exact = models(CONFIG, rank=8)
    tokens = jax.random.randint(jax.random.key(3), (2, 48), 0, 256)
    batch = {"tokens": tokens, "segment_ids": jnp.array([[1] * 20 + [2] * 28] * 2)}
    loss, found = gradient(trainable, frozen, batch, **options)
    with jax.default_matmul_precision("highest"):
        exact_loss, expected = gradient(trainable, exact, batch)
    assert abs(loss - exact_loss) < 0.01 * exact_loss
    for path, cosine in cosines(found, expected).items():
        assert cosine >= STEP_COSINE, path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qlora_jax.models import Llama, LlamaConfig
from qlora_jax.models.vocabulary import resize_vocabulary
from qlora_jax.quant import quantize

pytestmark = pytest.mark.unoptimized

TOKENS = jnp.arange(6)[None]


@pytest.mark.parametrize("tied", [True, False])
def test_new_tokens_are_the_mean_and_the_old_stay(tied):
    config = LlamaConfig(48, 32, 48, 2, 4, 2, tie_embeddings=tied)
    model = Llama(config, rngs=nnx.Rngs(0))
    more = resize_vocabulary(model, 51)
    assert more.config.vocab_size == 51 and model.config.vocab_size == 48
    before, after = model(TOKENS), more(TOKENS)
    assert after.shape == (1, 6, 51)
    np.testing.assert_allclose(after[..., :48], before, atol=1e-6)
    mean = np.repeat(before.mean(-1, keepdims=True), 3, -1)
    np.testing.assert_allclose(after[..., 48:], mean, atol=1e-5)
    np.testing.assert_allclose(
        more.embed[...][48:], np.tile(model.embed[...].mean(0), (3, 1)), rtol=1e-5
    )
    again = resize_vocabulary(more, 48)
    np.testing.assert_allclose(again(TOKENS), before, atol=1e-6)


def test_what_cannot_be_resized():
    config = LlamaConfig(64, 64, 48, 2, 4, 2)
    model = Llama(config, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="size=0 must be positive"):
        resize_vocabulary(model, 0)
    model.lm_head = nnx.Param(quantize(model.lm_head[...]))
    with pytest.raises(ValueError, match=r"lm_head is QuantizedTensor\(nf4"):
        resize_vocabulary(model, 65)

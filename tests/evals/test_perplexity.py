import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qlora_jax.evals import log_probs, next_log_probs, perplexity, read_text
from qlora_jax.interop.hub import load_model
from qlora_jax.interop.tokenizer import load_tokenizer
from qlora_jax.models import Llama
from tests.train.tiny import CONFIG

pytestmark = pytest.mark.unoptimized


@pytest.fixture(scope="module")
def model():
    return Llama(CONFIG, rngs=nnx.Rngs(0))


TOKENS = np.random.default_rng(0).integers(0, 96, 40).astype(np.int32)


def dense(model, tokens):
    logits = np.asarray(model(jnp.asarray(tokens)[None]), np.float64)[0]
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def test_log_probabilities_in_chunks(model):
    rows = np.stack([TOKENS[:20], TOKENS[20:]])
    found = log_probs(model, rows, chunk_size=7)
    for row, tokens in zip(found, rows, strict=True):
        expected = dense(model, tokens)[np.arange(19), tokens[1:]]
        np.testing.assert_allclose(row, expected, rtol=1e-5)
    following = next_log_probs(model, rows, np.array([20, 6]))
    np.testing.assert_allclose(following[0], dense(model, rows[0])[-1], rtol=1e-4)
    np.testing.assert_allclose(following[1], dense(model, rows[1][:6])[-1], rtol=1e-4)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_each_token_is_scored_once(model, batch_size):
    """Windows of 10 every 4: each token after the first, with 6 or more before it."""
    found = perplexity(model, TOKENS, window=10, stride=4, batch_size=batch_size)
    scores = []
    for start in range(0, 31, 4):
        lp = dense(model, TOKENS[start : start + 10])
        own = lp[np.arange(9), TOKENS[start + 1 : start + 10]]
        scores.append(own if start == 0 else own[-4:])
    assert len(found.windows) == 8 and found.tokens == 9 + 7 * 4
    expected = -np.concatenate(scores).mean()
    assert found.loss == pytest.approx(expected, rel=1e-5)
    assert found.perplexity == pytest.approx(np.exp(expected), rel=1e-5)


def test_a_text_shorter_than_a_window_is_one(model):
    found = perplexity(model, TOKENS[:5], window=10)
    assert found.tokens == 4 and len(found.windows) == 1
    with pytest.raises(ValueError, match="has 1 tokens: nothing can be predicted"):
        perplexity(model, TOKENS[:1], window=10)
    assert perplexity(model, TOKENS[:1], window=10, bos_id=1).tokens == 1
    with pytest.raises(ValueError, match=r"stride=11 in \[1, 10\]"):
        perplexity(model, TOKENS, window=10, stride=11)


def test_the_reference_of_stories260k(data_dir):
    """transformers' float32 losses, window by window (reference/losses.json)."""
    folder = data_dir("models/stories260K")
    model, tokenizer = load_model(folder, dtype=jnp.float32), load_tokenizer(folder)
    tokens = tokenizer.encode(read_text(data_dir("text/wikitext2_raw_test.txt"))[:9000])
    found = perplexity(model, tokens, window=512, bos_id=1, limit=4)
    expected = [4.805552, 4.744403, 5.447564, 5.023163]
    np.testing.assert_allclose(found.windows, expected, atol=1e-4)


def test_texts_keep_their_ends_of_line(tmp_path):
    (tmp_path / "a").write_bytes(b"x\r\ny\xe2\x80\xa8")
    assert read_text(tmp_path / "a") == "x\r\ny\u2028"
    (tmp_path / "b").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="is not UTF-8"):
        read_text(tmp_path / "b")
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        read_text(tmp_path / "c")

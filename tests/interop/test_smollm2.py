"""The real model of the main job, against what transformers and bitsandbytes give.

It is downloaded once (93 MB), as a user's first run does; without a network, or without
the reference files, these tests are skipped.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.generate import generate
from qlora_jax.interop.hub import find_model, load_model
from qlora_jax.interop.tokenizer import load_tokenizer
from qlora_jax.interop.weights import ModelFileError
from qlora_jax.train import evaluate

pytestmark = pytest.mark.slow
NAME = "SmolLM2-135M-Instruct"


@pytest.fixture(scope="module")
def path():
    try:
        return find_model(NAME)
    except ModelFileError as error:
        pytest.skip(f"{NAME} is not to be had: {error}")


@pytest.fixture(scope="module")
def tokenizer(path):
    return load_tokenizer(path)


@pytest.fixture(scope="module")
def golden(data_dir):
    text = data_dir("reference/smollm2_135m_float32.json").read_text(encoding="utf-8")
    return json.loads(text)["prompts"]


@pytest.fixture(scope="module")
def windows(data_dir, tokenizer):
    """The first four windows of 1,024 tokens of WikiText-2's test part."""
    file = data_dir("text/wikitext2_raw_test.txt")
    with open(file, encoding="utf-8", newline="") as lines:
        ids = tokenizer.encode(lines.read())
    assert len(ids) == 304_830
    return [{"tokens": np.array([ids[i : i + 1024]])} for i in range(0, 4096, 1024)]


def test_tokens_are_those_of_transformers(tokenizer, golden):
    for prompt in golden:
        # Two of the prompts are conversations, rendered: their control tokens count.
        assert tokenizer.encode(prompt["text"], special=True) == prompt["ids"]


def test_logits_and_greedy_tokens_are_those_of_transformers(path, golden):
    model = load_model(path, dtype=jnp.float32)
    new = generate(model, [prompt["ids"] for prompt in golden], max_new_tokens=24)
    for row, prompt in zip(new, golden, strict=True):
        expected = prompt["greedy_ids"]
        assert row == [i for i in expected if i not in model.config.eos_token_id]
        ids = prompt["ids"]
        log_probs = jax.nn.log_softmax(model(jnp.array([ids]))[0])
        found = log_probs[np.arange(len(ids) - 1), np.array(ids[1:])]
        assert np.abs(np.array(found) - prompt["token_logprobs"]).max() < 1e-3


@pytest.mark.parametrize(
    "quantize, double_quant, loss, tolerance",
    [
        (None, False, 3.134429, 0.0005),
        ("nf4", True, 3.352170, 0.003),
        ("nf4", False, 3.354043, 0.003),
        ("fp4", False, 3.504107, 0.003),
    ],
)
def test_loss_on_wikitext(path, windows, quantize, double_quant, loss, tolerance):
    model = load_model(path, quantize, double_quant=double_quant, dtype=jnp.float32)
    assert abs(evaluate(model, windows) - loss) < tolerance


def test_size_in_memory(path):
    model = load_model(path, "nf4")
    weights = [
        getattr(model.layers, name).get_value() for name in model.config.linear_shapes()
    ]
    parameters = sum(weight.size for weight in weights)
    assert parameters == 106_168_320
    bits = 8 * sum(weight.nbytes for weight in weights) / parameters
    assert bits == pytest.approx(4.127, abs=5e-4)

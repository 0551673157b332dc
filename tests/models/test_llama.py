import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

from qlora_jax.interop.hub import load_model
from qlora_jax.lora import add_lora, join_trainable, split_trainable
from qlora_jax.models import Llama, LlamaConfig, config_from_hf
from qlora_jax.quant import QuantizedTensor
from tests import tolerances
from tests.interop.folders import FAMILIES, LLAMA, write_folder
from tests.models import reference

pytestmark = pytest.mark.unoptimized

TOKENS = np.random.default_rng(1).integers(0, 259, (2, 13))


@pytest.fixture(scope="module")
def model():
    return Llama(config_from_hf(LLAMA), rngs=nnx.Rngs(0))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_formulas(family, tmp_path):
    weights = write_folder(tmp_path, FAMILIES[family])
    model = load_model(tmp_path, dtype=jnp.float32)
    logits = np.asarray(model(jnp.array(TOKENS)))
    assert logits.dtype == np.float32
    for row, tokens in zip(logits, TOKENS, strict=True):
        expected = reference.logits(model.config, weights, tokens)
        error = np.linalg.norm(row - expected) / np.linalg.norm(expected)
        assert error <= tolerances.LOGITS_RELATIVE["float32"]


def test_bfloat16_stays_near_float32(tmp_path):
    write_folder(tmp_path)
    exact = load_model(tmp_path, dtype=jnp.float32)(jnp.array(TOKENS))
    model = load_model(tmp_path)
    logits = model(jnp.array(TOKENS))
    assert model.embed[...].dtype == jnp.bfloat16
    assert logits.dtype == jnp.float32
    error = jnp.linalg.norm(logits - exact) / jnp.linalg.norm(exact)
    assert error <= tolerances.LOGITS_RELATIVE["bfloat16"]


@pytest.mark.parametrize("name", ["stories260K"])
def test_logits_are_those_of_transformers(data_dir, name):
    golden = json.loads(data_dir(f"reference/{name}_float32.json").read_text())
    model = load_model(data_dir(f"models/{name}"), dtype=jnp.float32)
    for prompt in golden["prompts"]:
        ids = prompt["ids"] + prompt["greedy_ids"]
        log_probs = np.asarray(jax.nn.log_softmax(model(jnp.array([ids]))[0]))
        known = len(prompt["ids"])
        found = [log_probs[i, ids[i + 1]] for i in range(known - 1)]
        assert np.abs(np.array(found) - prompt["token_logprobs"]).max() < 1e-4
        assert log_probs[known - 1 : -1].argmax(-1).tolist() == prompt["greedy_ids"]


def test_documents_of_a_row_do_not_see_each_other(model):
    segment_ids = jnp.array([[1] * 5 + [2] * 8, [7] * 12 + [8]])
    logits = model(jnp.array(TOKENS), segment_ids)
    for row, (start, end) in [(0, (0, 5)), (0, (5, 13)), (1, (0, 12)), (1, (12, 13))]:
        alone = model(jnp.array(TOKENS[row : row + 1, start:end]))
        np.testing.assert_allclose(logits[row, start:end], alone[0], atol=1e-5)


def test_positions_can_be_given(model):
    tokens = jnp.array(TOKENS)
    # Rotation is relative: the same shift everywhere changes nothing but rounding.
    shifted = model(tokens, positions=jnp.arange(13)[None] + jnp.array([[5], [9]]))
    np.testing.assert_allclose(shifted, model(tokens), atol=1e-4)
    stretched = model(tokens, positions=jnp.arange(13)[None] * jnp.array([[3], [3]]))
    assert jnp.abs(stretched - model(tokens)).max() > 1e-3


def test_padding_on_the_right_changes_nothing(model):
    padded = jnp.pad(jnp.array(TOKENS), [(0, 0), (0, 6)])
    logits = model(jnp.array(TOKENS))
    np.testing.assert_allclose(model(padded)[:, :13], logits, atol=1e-5)


def test_remat_changes_no_gradient(model):
    graph, state = nnx.split(model)

    def gradient(remat):
        def loss(state):
            hidden = nnx.merge(graph, state).hidden(jnp.array(TOKENS), remat=remat)
            return jnp.sum(jnp.sin(hidden))

        return jax.jit(jax.grad(loss))(state)

    plain = gradient("none")
    for remat in ("full", "attention", "offload"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
            plain,
            gradient(remat),
        )


def test_layers_are_compiled_once(model):
    """Twelve layers make no larger program than three."""

    def size(layers):
        config = dataclasses.replace(model.config, num_layers=layers)
        graph, state = nnx.split(
            nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0)))
        )
        call = jax.jit(lambda state: nnx.merge(graph, state)(jnp.array(TOKENS)))
        return len(call.lower(state).as_text().splitlines())

    assert size(3) == size(12)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_decoding_with_a_cache_is_the_same_as_without(family):
    model = Llama(config_from_hf(FAMILIES[family]), rngs=nnx.Rngs(1))
    cache = model.init_cache(2, 16)
    parts = []
    for start, end in [(0, 7), (7, 8), (8, 13)]:
        hidden, cache = model.decode(jnp.array(TOKENS[:, start:end]), cache)
        parts.append(hidden)
    assert cache.lengths.tolist() == [13, 13]
    logits = model.head(jnp.concatenate(parts, axis=1))
    np.testing.assert_allclose(logits, model(jnp.array(TOKENS)), atol=1e-5)


def test_a_quantized_model_needs_no_other_code(tmp_path):
    write_folder(tmp_path)
    dense = load_model(tmp_path, dtype=jnp.float32)
    model = load_model(tmp_path, quantize="nf4", dtype=jnp.float32)
    weight = model.layers.down_proj.get_value()
    assert isinstance(weight, QuantizedTensor)
    assert weight.shape == (3, 96, 64)
    exact = dense(jnp.array(TOKENS))
    error = jnp.linalg.norm(model(jnp.array(TOKENS)) - exact) / jnp.linalg.norm(exact)
    assert 0.01 < error < 0.3  # of random weights; 9 % error in each


@pytest.mark.parametrize("remat", ["none", "full"])
def test_scanned_layers_index_packed_weights(tmp_path, remat):
    """No layer's codes are sliced for a scan, nor kept by it for the gradient."""
    write_folder(tmp_path)
    model = load_model(tmp_path, quantize="nf4", dtype=jnp.float32)
    model = add_lora(model, rank=4, key=jax.random.key(0))
    trainable, frozen = split_trainable(model)

    def loss(trainable):
        model = join_trainable(trainable, frozen)
        return jnp.sum(model.hidden(jnp.array(TOKENS), remat=remat))

    def scans(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "scan":
                yield eqn
            for inner in jaxprs_in_params(eqn.params):
                yield from scans(inner)

    loops = list(scans(jax.make_jaxpr(jax.grad(loss))(trainable).jaxpr))
    over_layers = [e for e in loops if e.params["length"] == 3]
    assert len(over_layers) >= 2  # forward and backward
    whole = 0
    for eqn in over_layers:
        body = eqn.params["jaxpr"].jaxpr
        outside = [v.aval for v in (*eqn.invars, *eqn.outvars)]
        inside = [v.aval for v in (*body.invars, *body.outvars)]
        for out, one in zip(outside, inside, strict=True):
            if out.dtype == jnp.uint8:
                assert out.shape == one.shape  # else it is sliced, or kept by layer
                whole += 1
    assert whole >= 2 * 7 * 2  # codes and scales of seven weights, in both loops


def test_wrong_calls(model):
    with pytest.raises(ValueError, match=r"tokens.shape=\(13,\) must be \[batch"):
        model(jnp.array(TOKENS[0]))
    with pytest.raises(ValueError, match="remat='some' must be one of none, full"):
        model.hidden(jnp.array(TOKENS), remat="some")
    with pytest.raises(ValueError, match="num_heads=4 must be a multiple"):
        LlamaConfig(8, 64, 64, num_layers=1, num_heads=4, num_kv_heads=3)
    with pytest.raises(ValueError, match=r"hidden_size=66 is no multiple"):
        LlamaConfig(8, 66, 64, num_layers=1, num_heads=4, num_kv_heads=2)
    with pytest.raises(ValueError, match="num_layers=0 must be a positive integer"):
        LlamaConfig(8, 64, 64, num_layers=0, num_heads=4, num_kv_heads=2)

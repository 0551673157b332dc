"""Rows of new tokens trained: what they compute, their gradients, how they travel."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

from qlora_jax.lora import (
    LoRAParam,
    TrainedRows,
    add_lora,
    fold_rows,
    functions,
    join_trainable,
    linen,
    merge_lora,
    split_trainable,
    train_rows,
)
from qlora_jax.models import Llama, LlamaConfig
from qlora_jax.quant import quantize
from tests.lora.trees import perturbed
from tests.tolerances import MATMUL_RELATIVE

pytestmark = pytest.mark.unoptimized

KEY = jax.random.key(7)
NEW = [30, 5, 63]
TOKENS = jnp.array([[5, 1, 63, 2, 30, 9], [7, 30, 5, 5, 0, 62]], jnp.int32)


def llama(tied, dtype=jnp.float32):
    config = LlamaConfig(
        64, 64, 128, num_layers=2, num_heads=4, num_kv_heads=2, tie_embeddings=tied
    )
    return Llama(config, rngs=nnx.Rngs(0), dtype=dtype)


def relative(got, wanted):
    got, wanted = (np.asarray(v, np.float64) for v in (got, wanted))
    return np.linalg.norm(got - wanted) / np.linalg.norm(wanted)


def tables(tied):
    return "embed" if tied else "embed|lm_head"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_untrained_rows_change_nothing(tied, dtype):
    model = llama(tied, dtype)
    new = train_rows(model, {tables(tied): NEW})
    assert isinstance(new.embed, TrainedRows) and isinstance(model.embed, nnx.Param)
    # The table is not copied, and what is trained is no buffer of it.
    assert new.embed.w.get_value() is model.embed.get_value()
    assert isinstance(new.embed.rows, LoRAParam)
    assert new.embed.rows.get_value().dtype == jnp.float32
    call = nnx.jit(lambda model: (model.hidden(TOKENS), model(TOKENS)))
    (hidden, logits), (wanted_hidden, wanted) = call(new), call(model)
    np.testing.assert_array_equal(hidden, wanted_hidden)
    others = np.delete(np.arange(64), NEW)
    np.testing.assert_array_equal(logits[..., others], wanted[..., others])
    # Their own logits are a product of another shape, summed in another order.
    assert relative(logits, wanted) < 1e-6


@pytest.mark.parametrize("tied", [True, False])
def test_trained_rows_are_those_of_the_table(tied):
    model = train_rows(llama(tied), {tables(tied): NEW})
    trainable, frozen = split_trainable(model)
    assert len(jax.tree.leaves(trainable)) == (1 if tied else 2)
    trainable = perturbed(trainable)
    moved = join_trainable(trainable, frozen)
    folded = fold_rows(moved)
    assert isinstance(folded.embed, nnx.Param)
    changed = (folded.embed[...] != llama(tied).embed[...]).any(axis=1)
    assert np.flatnonzero(changed).tolist() == sorted(NEW)
    assert relative(moved(TOKENS), folded(TOKENS)) < MATMUL_RELATIVE["float32"]

    def loss(model):
        return (jnp.sin(model(TOKENS)) ** 2).sum()

    got = jax.jit(jax.grad(lambda t: loss(join_trainable(t, frozen))))(trainable)
    whole, rest = split_trainable(folded, also=tables(tied))
    wanted = jax.jit(jax.grad(lambda t: loss(join_trainable(t, rest))))(whole)
    at = jnp.array(sorted(NEW))
    np.testing.assert_allclose(
        got["embed"]["rows"].get_value(),
        wanted["embed"].get_value()[at],
        rtol=1e-4,
        atol=1e-5,
    )
    if not tied:
        np.testing.assert_allclose(
            got["lm_head"]["rows"].get_value(),
            wanted["lm_head"].get_value()[:, at],
            rtol=1e-4,
            atol=1e-5,
        )


def test_no_table_is_copied_and_none_has_a_gradient():
    """Of all that a step computes, nothing has the shape of the table."""
    model = train_rows(llama(tied=False), {"embed|lm_head": NEW})
    model.embed = TrainedRows(
        jnp.ones((4096, 64)), model.embed.rows[...], model.embed.at[...]
    )
    table = model.embed

    def loss(rows):
        one = TrainedRows(table.w, rows, table.at)
        return jnp.sin(one[TOKENS] @ one.T).sum()

    jaxpr = jax.make_jaxpr(jax.grad(loss))(table.rows)
    compiled = jax.jit(jax.grad(loss)).lower(table.rows).compile().as_text()
    assert "f32[4096,64]{1,0} scatter" not in compiled
    made = [v.aval.shape for e in jaxpr.eqns for v in e.outvars]
    assert (4096, 64) not in made


def test_rows_beside_adapters_train_and_merge():
    model = llama(tied=True)
    adapted = add_lora(model, rank=4, quantize="nf4", key=KEY)
    adapted = train_rows(adapted, {"embed": NEW})
    trainable, frozen = split_trainable(adapted, also="norm")
    tx = optax.adam(1e-2)

    @jax.jit
    def step(trainable, state, frozen):
        def loss_fn(t):
            logits = join_trainable(t, frozen)(TOKENS)
            return optax.softmax_cross_entropy_with_integer_labels(
                logits[:, :-1], TOKENS[:, 1:]
            ).mean()

        loss, grads = jax.value_and_grad(loss_fn)(trainable)
        updates, state = tx.update(grads, state, trainable)
        return optax.apply_updates(trainable, updates), state, loss

    state, losses = tx.init(trainable), []
    for _ in range(20):
        trainable, state, loss = step(trainable, state, frozen)
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0] and step._cache_size() == 1
    trained = join_trainable(trainable, frozen)
    changed = (fold_rows(trained).embed[...] != model.embed[...]).any(axis=1)
    assert np.flatnonzero(changed).tolist() == sorted(NEW)
    merged = merge_lora(trained, dtype=jnp.float32, report=None)
    assert isinstance(merged.embed, nnx.Param)
    assert relative(merged(TOKENS), trained(TOKENS)) < 1e-4


def test_plain_trees_and_functions():
    params = {"embed": jnp.eye(6, 4), "head": jnp.ones((4, 6))}
    new = train_rows(params, {"embed": [5], "head": [1, 5]})
    trainable, frozen = split_trainable(new)
    assert [x.shape for x in jax.tree.leaves(trainable)] == [(1, 4), (4, 2)]
    moved = join_trainable(perturbed(trainable), frozen)
    whole = fold_rows(moved)
    tokens = jnp.array([5, 0, 1, -1])
    np.testing.assert_array_equal(moved["embed"][tokens], whole["embed"][tokens])
    np.testing.assert_array_equal(moved["embed"][1:], whole["embed"][1:])
    x = jnp.linspace(0, 1, 8).reshape(2, 4)
    np.testing.assert_allclose(x @ moved["head"], x @ whole["head"], rtol=1e-6)
    np.testing.assert_allclose(x @ moved["embed"].T, x @ whole["embed"].T, rtol=1e-6)
    run = lambda p: jnp.take(p["embed"], jnp.array([5, 0]), axis=0) @ p["head"]
    np.testing.assert_allclose(functions.wrap(run)(moved), run(whole), rtol=1e-6)
    assert repr(moved["head"]) == "TrainedRows([4, 6], 2 trained)"


def test_layers_of_flax():
    class Model(nnx.Module):
        def __init__(self):
            self.embed = nnx.Embed(12, 8, rngs=nnx.Rngs(0))
            self.head = nnx.Linear(8, 12, rngs=nnx.Rngs(1))

        def __call__(self, tokens):
            x = self.embed(tokens)
            return self.head(x), self.embed.attend(x)

    class Linen(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            table = nn.Embed(12, 8, name="embed")
            x = table(tokens)
            return nn.Dense(12, name="head")(x), table.attend(x)

    tokens = jnp.array([[3, 11, 0], [11, 1, 2]])
    chosen = {"embed/embedding": [11, 3], "head/kernel": [11]}
    model = train_rows(Model(), chosen)
    trainable, frozen = split_trainable(model, also="bias")
    moved = join_trainable(perturbed(trainable), frozen)
    for got, wanted in zip(moved(tokens), fold_rows(moved)(tokens), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)
    assert type(fold_rows(moved).embed) is nnx.Embed
    params = train_rows(Linen().init(KEY, tokens)["params"], chosen)
    trainable, frozen = split_trainable(params)
    moved = join_trainable(perturbed(trainable), frozen)
    run = linen.apply(Linen())
    got = run({"params": moved}, tokens)
    for g, wanted in zip(got, run({"params": fold_rows(moved)}, tokens), strict=True):
        np.testing.assert_allclose(g, wanted, rtol=1e-5, atol=1e-6)


def test_wrong_calls():
    model = llama(tied=False)
    with pytest.raises(ValueError, match="rows 'wte' is found in the path of no"):
        train_rows(model, {"wte": NEW})
    for bad in ([], [64], [-1], [3, 3]):
        with pytest.raises(ValueError, match=r"different tokens in \[0, 64\)"):
            train_rows(model, {"embed": bad})
    new = train_rows(model, {"embed": NEW})
    with pytest.raises(ValueError, match="'embed' is TrainedRows: rows of plain"):
        train_rows(new, {"embed": NEW})
    with pytest.raises(ValueError, match="'embed' has trained rows: leave it out"):
        add_lora(new, rank=2, targets="embed", key=KEY)
    with pytest.raises(ValueError, match="'embed' is TrainedRows and cannot be"):
        split_trainable(new, also=lambda path, w: path == "embed")
    with pytest.raises(ValueError, match="is QuantizedTensor: rows of plain arrays"):
        train_rows({"head": quantize(jnp.ones((64, 64)))}, {"head": [1]})

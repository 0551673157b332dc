"""Splitting, joining, training and stacking adapters: trees and modules."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from qlora_jax.lora import (
    LoRAParam,
    add_lora,
    join_trainable,
    split_trainable,
    stack_adapters,
    train_rows,
)
from qlora_jax.models import Llama, LlamaConfig
from qlora_jax.quant import quantize
from tests.lora.models import HIDDEN, Model, tokens
from tests.lora.trees import perturbed, run_tree, tree

pytestmark = pytest.mark.unoptimized

KEY = jax.random.key(7)


def test_a_tree_splits_and_joins():
    adapted = add_lora(tree(), rank=4, key=KEY)
    trainable, frozen = split_trainable(adapted)
    assert [leaf.shape for leaf in jax.tree.leaves(trainable)] == [
        (3, 96, 4),
        (3, 4, 64),
        (3, 64, 4),
        (3, 4, 96),
    ]
    assert trainable["embed"] is None and frozen["layers"]["up"].a is None
    joined = join_trainable(trainable, frozen)
    assert jax.tree.structure(joined) == jax.tree.structure(adapted)
    for got, wanted in zip(*map(jax.tree.leaves, (joined, adapted)), strict=True):
        assert got is wanted


def test_dropout_at_a_join():
    adapted = add_lora(tree(), rank=4, dropout=0.5, key=KEY)
    trainable, frozen = split_trainable(adapted)
    trainable = perturbed(trainable)
    x = jax.random.normal(KEY, (5, 64))

    @jax.jit
    def run(key):
        return run_tree(join_trainable(trainable, frozen, key=key), x)

    first, again, other = (run(jax.random.key(i)) for i in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)
    assert not np.allclose(first, run(None))
    np.testing.assert_array_equal(run(jax.random.PRNGKey(0)), first)
    joined = join_trainable(trainable, frozen, key=KEY)["layers"]
    keys = [
        jax.random.key_data(key).tolist()
        for w in ("up", "down")
        for key in joined[w].key
    ]
    assert len({tuple(key) for key in keys}) == 6  # each weight and layer its own


@pytest.mark.parametrize("remat", [False, True])
def test_a_module_trains(remat):
    model = Model(format="nf4", remat="full")
    adapted = add_lora(model, rank=4, alpha=8, dropout=0.05, key=KEY)
    trainable, frozen = split_trainable(adapted)
    assert len(jax.tree.leaves(trainable)) == 6
    tx = optax.adam(1e-2)

    @jax.jit
    def step(trainable, state, frozen, key):
        def loss_fn(t):
            logits = join_trainable(t, frozen, key=key)(tokens())
            return optax.softmax_cross_entropy_with_integer_labels(
                logits[:, :-1], tokens()[:, 1:]
            ).mean()

        loss, grads = jax.value_and_grad(loss_fn)(trainable)
        updates, state = tx.update(grads, state, trainable)
        return optax.apply_updates(trainable, updates), state, loss

    state, losses = tx.init(trainable), []
    for i in range(30):
        trainable, state, loss = step(
            trainable, state, frozen, jax.random.fold_in(KEY, i)
        )
        losses.append(float(loss))
    assert losses[0] > 4 and losses[-1] < 0.1
    assert step._cache_size() == 1


def test_remat_gives_the_same_gradients_under_dropout():
    def gradients(remat):
        adapted = add_lora(Model(remat="full"), rank=4, dropout=0.3, key=KEY)
        trainable, frozen = split_trainable(adapted)

        def loss(t):
            return (join_trainable(t, frozen, key=KEY)(tokens()) ** 2).mean()

        return jax.jit(jax.grad(loss))(perturbed(trainable))

    for x, y in zip(*map(jax.tree.leaves, map(gradients, [False, True])), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)


def test_gradients_with_respect_to_the_module_state_are_those_of_the_tree():
    """A scanned module and the same weights in a dict give the same numbers."""
    adapted = add_lora(Model(), rank=4, targets="q_proj", key=KEY)
    trainable, frozen = split_trainable(adapted)
    trainable = perturbed(trainable)
    lt = join_trainable(trainable, frozen).layers.q_proj
    a, b = lt.a.get_value(), lt.b.get_value()

    def plain(a, b):
        model = Model()
        model.layers.q_proj = nnx.Param(
            model.layers.q_proj[...] + lt.scale * jnp.matmul(a, b)
        )
        return (model(tokens()) ** 2).mean()

    def adapted_loss(t):
        return (join_trainable(t, frozen)(tokens()) ** 2).mean()

    wanted = jax.grad(plain, (0, 1))(a, b)
    got = jax.tree.leaves(jax.grad(adapted_loss)(trainable))
    for x, y in zip(got, wanted, strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-4, atol=1e-6)


def test_nnx_optimizer_and_nnx_grad_take_it():
    model = add_lora(Model(format="nf4"), rank=4, key=KEY)
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=LoRAParam)

    def loss_fn(model):
        return (model(tokens()) ** 2).mean()

    before = float(loss_fn(model))
    codes = model.layers.q_proj.w.get_value().codes
    for _ in range(3):
        grads = nnx.grad(loss_fn, argnums=nnx.DiffState(0, LoRAParam))(model)
        optimizer.update(model, grads)
    assert float(loss_fn(model)) < 0.9 * before
    assert model.layers.q_proj.w.get_value().codes is codes


def test_nnx_scan_and_nnx_jit_take_it():
    model = add_lora(Model(format="nf4"), rank=4, key=KEY)
    x = jax.random.normal(KEY, (2, HIDDEN))

    @nnx.jit
    def run(layers, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def body(x, layer):
            return layer(x)

        return body(x, layers)

    graphdef, state = nnx.split(model.layers)
    wanted = jax.lax.scan(lambda x, s: (nnx.merge(graphdef, s)(x), None), x, state)[0]
    np.testing.assert_allclose(run(model.layers, x), wanted, rtol=1e-5, atol=1e-6)


def test_orbax_saves_and_restores_the_trainable_part(tmp_path):
    import orbax.checkpoint as ocp

    adapted = add_lora(Model(format="nf4"), rank=4, key=KEY)
    trainable, frozen = split_trainable(adapted)
    trainable = perturbed(trainable)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "adapter", trainable)
        checkpointer.wait_until_finished()
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, trainable)
        restored = checkpointer.restore(tmp_path / "adapter", abstract)
    for got, wanted in zip(*map(jax.tree.leaves, (restored, trainable)), strict=True):
        np.testing.assert_array_equal(got, wanted)
    assert join_trainable(restored, frozen)(tokens()).shape == (4, 6, 32)


def test_a_shared_weight_stays_shared():
    model = Model()
    model.again = model.layers
    model.layers.o_proj = model.layers.q_proj
    adapted = add_lora(model, rank=4, targets="[qo]_proj", key=KEY)
    assert adapted.again is adapted.layers
    assert adapted.layers.o_proj is adapted.layers.q_proj
    assert len(jax.tree.leaves(split_trainable(adapted)[0])) == 2


@pytest.mark.parametrize("module", [False, True])
def test_rows_of_a_batch_use_different_adapters(module):
    base = Model(format="nf4") if module else tree()
    adapted = add_lora(base, rank=4, key=KEY)
    first, frozen = split_trainable(adapted)
    adapters = [perturbed(first, seed) for seed in range(3)]
    ids = jnp.array([2, -1, 0, 2])
    batch = tokens() if module else jax.random.normal(KEY, (4, 5, 64))

    @jax.jit
    def run(trainable, ids, batch):
        model = join_trainable(trainable, frozen, adapter_ids=ids)
        return model(batch) if module else run_tree(model, batch)

    stacked = stack_adapters(adapters)
    got = run(stacked, ids, batch)
    for row, i in enumerate([2, None, 0, 2]):
        model = base if i is None else join_trainable(adapters[i], frozen)
        one = batch[row : row + 1]
        wanted = model(one) if module else run_tree(model, one)
        np.testing.assert_allclose(got[row], wanted[0], rtol=2e-3, atol=1e-4)
    run(stacked, ids[::-1], batch)
    assert run._cache_size() == 1  # other rows, no recompilation
    for i in range(3):
        model = join_trainable(adapters[i], frozen)
        wanted = model(batch) if module else run_tree(model, batch)
        got = run(stacked, jnp.int32(i), batch)
        np.testing.assert_allclose(got, wanted, rtol=2e-3, atol=1e-4)


def test_wrong_adapters():
    first, frozen = split_trainable(add_lora(tree(), rank=4, key=KEY))
    stacked = stack_adapters([first, first])
    with pytest.raises(ValueError, match="adapter_ids from 0 to 2 must lie in -1 to 1"):
        join_trainable(stacked, frozen, adapter_ids=[0, 2])
    with pytest.raises(ValueError, match=r"adapter_ids has shape \[1, 2\]"):
        join_trainable(stacked, frozen, adapter_ids=[[0, 1]])
    with pytest.raises(ValueError, match="'layers/down' holds one adapter"):
        join_trainable(first, frozen, adapter_ids=[0, 1])
    other, _ = split_trainable(add_lora(tree(), rank=2, key=KEY))
    with pytest.raises(ValueError, match="Adapters 0 and 1 differ in the shape"):
        stack_adapters([first, other])
    other, _ = split_trainable(add_lora(tree(), rank=4, alpha=1, key=KEY))
    with pytest.raises(ValueError, match="Adapters 0 and 1 differ in targets, alpha"):
        stack_adapters([first, other])
    with pytest.raises(ValueError, match="at least one adapter"):
        stack_adapters([])


def test_dropout_costs_no_activations():
    config = LlamaConfig(64, 64, 128, num_layers=2, num_heads=4, num_kv_heads=2)
    model = Llama(config, rngs=nnx.Rngs(0))

    def kept(dropout):
        trainable, frozen = split_trainable(
            add_lora(model, rank=4, dropout=dropout, key=KEY)
        )
        _, vjp = jax.vjp(
            lambda t: join_trainable(t, frozen, key=KEY).hidden(tokens()), trainable
        )
        shapes = [x.shape for x in jax.tree.leaves(vjp) if hasattr(x, "shape")]
        # Of all 4 x 6 tokens, as rows or not.
        return sum(
            np.prod(shape)
            for shape in shapes
            if shape[1:3] == (4, 6) or shape[1:2] == (24,)
        )

    assert kept(0.1) == kept(0.0) > 0


def _buffers(tree):
    return {x.unsafe_buffer_pointer(): x.nbytes for x in jax.tree.leaves(tree)}


@pytest.mark.parametrize("rows", [None, [3, 5]])
def test_no_base_weight_is_copied(rows):
    """Of a stacked, quantized model: by the pointers of its buffers."""
    config = LlamaConfig(64, 64, 128, num_layers=2, num_heads=4, num_kv_heads=2)
    model = Llama(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
    for name in config.linear_shapes():
        weight = getattr(model.layers, name)[...]
        setattr(model.layers, name, nnx.Param(quantize(weight)))
    base = _buffers(nnx.state(model))
    adapted = add_lora(model, rank=4, dropout=0.1, key=KEY)
    if rows is not None:
        adapted = train_rows(adapted, {"embed|lm_head": rows})
    trainable, frozen = split_trainable(adapted)
    joined = join_trainable(trainable, frozen, key=KEY)
    for one in (nnx.state(adapted), frozen[1], nnx.state(joined)):
        assert base.keys() <= _buffers(one).keys()
    # What the adapted model has beside them is what is trained, and which rows.
    more = (
        _buffers(nnx.state(adapted)).keys() - base.keys() - _buffers(trainable).keys()
    )
    assert len(more) == (0 if rows is None else 2)
    assert not base.keys() & _buffers(trainable).keys()  # nothing that is donated


def test_adapters_of_another_base():
    """Each part names what does not fit: targets, shapes, kinds of model."""
    first, frozen = split_trainable(add_lora(tree(), rank=4, key=KEY))
    x = jnp.ones((5, 64))
    wide = tree()
    wide["layers"]["up"] = quantize(jnp.ones((3, 64, 128)))
    other, _ = split_trainable(add_lora(wide, rank=4, key=KEY))
    with pytest.raises(
        ValueError, match=r"'layers/up': .*\[3, 4, 128\].*\[3, 64, 96\]"
    ):
        run_tree(join_trainable(other, frozen), x)
    deep = jax.tree.map(lambda a: jnp.concatenate([a, a]), first)
    with pytest.raises(ValueError, match=r"'layers/down': .*\[6, 96, 4\].*3, 96, 64"):
        join_trainable(deep, frozen)
    fewer, _ = split_trainable(add_lora(tree(), rank=4, targets="up", key=KEY))
    with pytest.raises(ValueError, match="'layers/down' was adapted and has no"):
        join_trainable(fewer, frozen)
    module, rest = split_trainable(add_lora(Model(), rank=4, key=KEY))
    with pytest.raises(ValueError, match="not of one model"):
        join_trainable(first, rest)
    with pytest.raises(ValueError, match="not of one model"):
        join_trainable(module, frozen)
    part, _ = split_trainable(add_lora(Model(), rank=4, targets="q_proj", key=KEY))
    with pytest.raises(ValueError, match=r"not of one model: .* \(layers/q_proj/a, "):
        join_trainable(part, rest)
    longer = jax.tree.map(lambda a: jnp.concatenate([a, a], -1), module)
    with pytest.raises(ValueError, match=r"'layers/down_proj': b .*\[3, 4, 128\]"):
        join_trainable(longer, rest)

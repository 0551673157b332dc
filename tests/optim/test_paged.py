"""`paged`: where the state is, that nothing else changes, and what it refuses."""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from qlora_jax.optim import adamw8bit, memory, paged, take_step, with_master
from tests.tolerances import ULP_SLICED_OPTIMIZER

PAGE = dict(page_size=2**14, min_size=1000)  # pages of one or two of the leaves below


def make_params():
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        "a": jax.random.normal(keys[0], (64, 32)),
        "b": {"c": jax.random.normal(keys[1], (32, 64)), "d": jnp.ones([3])},
        "e": jax.random.normal(keys[2], (4, 8, 128)),
    }


def gradients(params, i=0):
    return jax.tree.map(lambda x: jnp.sin(3 * x + i), params)


def train(tx, *, steps=3, jit=True, params=None, donate=(), whole=False):
    params = make_params() if params is None else params
    state = tx.init(params)

    def step(params, state, i):
        if whole:
            return take_step(tx, gradients(params, i), state, params)
        updates, state = tx.update(gradients(params, i), state, params)
        return optax.apply_updates(params, updates), state

    if jit:
        step = jax.jit(step, donate_argnums=donate)
    for i in range(steps):
        params, state = step(params, state, i)
    return params, state


def assert_same_bits(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def hosted(tree):
    return [x for x in jax.tree.leaves(tree) if x.sharding.memory_kind == "pinned_host"]


def clipped(inner):
    return optax.chain(optax.clip_by_global_norm(0.3), inner)


INNER = {
    "adam": lambda: optax.adam(1e-2),
    "adamw": lambda: optax.adamw(1e-2),
    "lion": lambda: optax.lion(1e-3),
    "sgd with momentum": lambda: optax.sgd(1e-2, momentum=0.9),
    "adafactor": lambda: optax.adafactor(1e-2, min_dim_size_to_factor=16),
    "lamb": lambda: optax.lamb(1e-2),
    "clip, adamw": lambda: clipped(optax.adamw(1e-2)),
    "adam, clip": lambda: optax.chain(
        optax.scale_by_adam(), optax.clip_by_global_norm(0.3)
    ),
    "MultiSteps": lambda: optax.MultiSteps(
        clipped(optax.adamw(1e-2)), 2
    ).gradient_transformation(),
    "masked": lambda: optax.masked(
        optax.adam(1e-2), {"a": True, "b": False, "e": True}
    ),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adamw)(
        optax.linear_schedule(1e-2, 1e-3, 3)
    ),
    "partition": lambda: optax.partition(
        {"x": optax.adam(1e-2), "y": optax.lion(1e-3)},
        {"a": "x", "b": "y", "e": "y"},
    ),
    "schedule": lambda: optax.adam(optax.cosine_decay_schedule(1e-2, 4)),
    "adamw8bit": lambda: adamw8bit(1e-2, min_8bit_size=1000),
    "with_master": lambda: with_master(optax.adamw(1e-2)),
}


@pytest.mark.parametrize("name", INNER)
def test_bit_equal_to_the_inner_optimizer(name):
    inner = INNER[name]()
    expected = train(inner, donate=(0, 1))
    found = train(paged(inner, **PAGE), donate=(0, 1))
    assert_same_bits(found, expected)
    large = [x for x in jax.tree.leaves(found[1]) if x.size >= 1000]
    assert len(hosted(found[1])) == len(large) > 0


@pytest.mark.parametrize("name", INNER)
def test_a_whole_step_is_an_update_and_its_application(name):
    inner = INNER[name]()
    expected = train(inner, donate=(0, 1))
    assert_same_bits(train(inner, donate=(0, 1), whole=True), expected)
    tx = paged(inner, **PAGE)
    assert_same_bits(train(tx, donate=(0, 1), whole=True), expected)
    # without its step it is an optax transformation as others are
    plain = tx._replace(update=tx.update)
    assert_same_bits(train(plain, donate=(0, 1), whole=True), expected)


@pytest.mark.parametrize("name", ["adamw", "clip, adamw", "MultiSteps"])
def test_bit_equal_outside_of_jit(name):
    inner = INNER[name]()
    found = train(paged(inner, **PAGE), jit=False)
    assert_same_bits(found, train(inner, jit=False))
    assert hosted(found[1])


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: optax.chain(optax.clip_by_global_norm(0.3), tx, optax.scale(0.5)),
        lambda tx: optax.masked(tx, {"a": True, "b": False, "e": True}),
        lambda tx: optax.partition(
            {"x": tx, "y": optax.sgd(1e-2)}, {"a": "x", "b": "x", "e": "y"}
        ),
        lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
        lambda tx: optax.inject_hyperparams(
            lambda rate: optax.chain(tx, optax.scale(rate))
        )(rate=0.5),
        lambda tx: paged(tx, **PAGE),
    ],
    ids=["chain", "masked", "partition", "MultiSteps", "inject_hyperparams", "paged"],
)
def test_bit_equal_inside_another_transformation(wrap):
    inner = optax.adam(1e-2)
    expected = train(wrap(inner))
    found = train(wrap(paged(inner, **PAGE)))
    assert_same_bits(found, expected)
    assert hosted(found[1])


def test_scan_over_steps_and_a_schedule():
    inner = optax.adamw(optax.cosine_decay_schedule(1e-2, 5))
    tx = paged(inner, **PAGE)
    params = make_params()

    def run(tx):
        def step(carry, i):
            params, state = carry
            updates, state = tx.update(gradients(params, i), state, params)
            return (optax.apply_updates(params, updates), state), optax.tree.norm(
                updates
            )

        return jax.jit(lambda c: jax.lax.scan(step, c, jnp.arange(5)))(
            (params, tx.init(params))
        )

    assert_same_bits(run(tx), run(inner))


def test_vmapped_over_models():
    tx, inner = paged(optax.adam(1e-2), **PAGE), optax.adam(1e-2)
    stacked = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), make_params())

    def run(tx):
        state = jax.vmap(tx.init)(stacked)
        return jax.jit(jax.vmap(tx.update))(gradients(stacked), state, stacked)

    assert_same_bits(run(tx), run(inner))


def test_state_is_the_inner_state_elsewhere():
    params = make_params()
    plain, state = (
        optax.adam(1e-2).init(params),
        paged(optax.adam(1e-2), **PAGE).init(params),
    )
    assert_same_bits(state, plain)
    assert len(hosted(state)) == 2 * 3  # both moments of a, c, e
    assert state[0].mu["b"]["d"].sharding.memory_kind == "device"
    # A plain state is taken too, and comes back in host memory.
    tx = paged(optax.adam(1e-2), **PAGE)
    _, after = jax.jit(tx.update)(gradients(params), plain, params)
    assert len(hosted(after)) == 6


def test_compiled_program_takes_and_returns_host_memory():
    tx = paged(optax.adam(1e-2), **PAGE)
    params = make_params()
    compiled = jax.jit(tx.update).lower(params, tx.init(params), params).compile()
    (_, state_in, _), _ = compiled.input_shardings
    _, state_out = compiled.output_shardings
    for shardings in (state_in, state_out):
        kinds = [s.memory_kind for s in jax.tree.leaves(shardings)]
        assert kinds.count("pinned_host") == 6, kinds


def test_device_budget_keeps_what_fits():
    params = make_params()
    sizes = [x.nbytes for x in jax.tree.leaves(optax.adam(1e-2).init(params))]
    everything = paged(optax.adam(1e-2), device_budget=sum(sizes), **PAGE)
    assert not hosted(everything.init(params))
    budget = sum(sizes) // 2
    half = paged(optax.adam(1e-2), device_budget=budget, **PAGE)
    state = half.init(params)
    small = sum(size for size in sizes if size < 4000)
    kept = sum(sizes) - small - sum(x.nbytes for x in hosted(state))
    assert 0.6 * budget <= kept <= budget
    assert_same_bits(train(half), train(optax.adam(1e-2)))


def test_no_recompilation_on_the_second_step():
    tx = paged(optax.adamw(1e-2), **PAGE)
    # Arrays in host memory are committed to their device and make the results so.
    params = jax.device_put(make_params(), jax.devices()[0])
    state = tx.init(params)
    traces = 0

    @jax.jit
    def step(params, state):
        nonlocal traces
        traces += 1
        updates, state = tx.update(gradients(params), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(3):
        params, state = step(params, state)
    assert traces == 1
    assert step._cache_size() == 1


@pytest.mark.parametrize("whole", [False, True])
def test_slices_of_a_leaf_within_two_ulp_a_step(whole):
    inner = optax.adamw(1e-2)
    tx = paged(inner, page_size=2**13, min_size=1000, slice_leaves=True)
    params, state = train(tx, whole=whole)
    expected, _ = train(inner)
    assert isinstance(state[0].mu["a"], tuple)  # 16 kB of moments, in slices of 8
    assert [x.shape for x in state[0].mu["a"]] == [(32, 32), (32, 32)]
    steps = 3
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_max_ulp(
            np.asarray(a), np.asarray(b), steps * ULP_SLICED_OPTIMIZER
        )


def test_masters_in_slices_are_those_of_whole_leaves():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), make_params())
    grads = gradients(params)  # outside of jit, where they are rounded
    inner = with_master(optax.adamw(1e-2))
    sliced = paged(inner, page_size=2**14, min_size=1000, slice_leaves=True)

    def step(tx):
        taken = jax.jit(lambda g, s, p: take_step(tx, g, s, p))
        return taken(grads, tx.init(params), params)

    (found, state), (_, expected) = step(sliced), step(inner)
    assert len(state.master["a"]) == 2  # 24 kB of a master and its moments
    masters = jnp.concatenate(state.master["a"])
    np.testing.assert_array_max_ulp(
        np.asarray(masters), np.asarray(expected.master["a"]), ULP_SLICED_OPTIMIZER
    )
    np.testing.assert_array_equal(found["a"], masters.astype(jnp.bfloat16))


@pytest.mark.parametrize("name, page_size", [("lamb", 2**13), ("adamw8bit", 2**11)])
def test_slices_are_refused_to_what_computes_over_a_leaf(name, page_size):
    tx = paged(INNER[name](), page_size=page_size, min_size=1000, slice_leaves=True)
    with pytest.raises(ValueError, match="treat every number alike"):
        train(tx)


def mesh_of(count):
    return Mesh(np.array(jax.devices()[:count]), ("x",))


def shard(params, mesh):
    specs = {"a": P("x"), "b": {"c": P(None, "x"), "d": P()}, "e": P("x")}
    if mesh.size == 8:
        specs["e"] = P(None, "x")
    return jax.device_put(params, jax.tree.map(lambda s: NamedSharding(mesh, s), specs))


def test_sharded_over_eight_devices():
    mesh = mesh_of(8)
    inner = clipped(optax.adamw(1e-2))
    params = shard(make_params(), mesh)
    tx = paged(inner, **PAGE)
    state = tx.init(params)
    moment = state[1][0].mu["a"]
    assert moment.sharding.spec == P("x")
    assert moment.sharding.memory_kind == "pinned_host"
    assert moment.addressable_shards[0].data.shape == (8, 32)
    found, state = train(tx, params=params, donate=(0, 1))
    expected, _ = train(inner, params=shard(make_params(), mesh))
    assert_same_bits(found, expected)
    moment = state[1][0].mu["a"]
    assert moment.addressable_shards[0].data.shape == (8, 32)
    assert moment.sharding.memory_kind == "pinned_host"


@pytest.mark.parametrize(
    "inner",
    [
        adamw8bit(1e-2, min_8bit_size=1000),
        optax.adafactor(1e-2, min_dim_size_to_factor=16),
    ],
    ids=["adamw8bit", "adafactor"],
)
def test_state_that_is_made_on_one_device_joins_the_mesh(inner):
    """Scales of blocks, factored moments and counts come from no parameter's array."""
    mesh, options = mesh_of(8), dict(page_size=2**14, min_size=16)

    def start():
        return shard(make_params(), mesh)

    tx = paged(inner, **options)
    state = tx.init(start())
    assert {len(x.sharding.device_set) for x in jax.tree.leaves(state)} == {8}
    found, state = train(tx, params=start(), donate=(0, 1))
    assert hosted(state)
    expected, _ = train(inner, params=start())
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_max_ulp(np.asarray(a), np.asarray(b), 2)


@pytest.mark.parametrize("saved_on, count", [(8, 8), (8, 4), (8, 1), (2, 8)], ids=str)
def test_saved_on_some_devices_restored_on_others(tmp_path, saved_on, count):
    import orbax.checkpoint as ocp

    tx = paged(optax.adamw(1e-2), **PAGE)
    params, state = train(tx, steps=2, params=shard(make_params(), mesh_of(saved_on)))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", {"params": params, "state": state})
        checkpointer.wait_until_finished()
        mesh = mesh_of(count)
        fresh = shard(make_params(), mesh)
        target = {"params": fresh, "state": tx.init(fresh)}
        restored = checkpointer.restore(
            tmp_path / "state", jax.tree.map(ocp.utils.to_shape_dtype_struct, target)
        )
    assert_same_bits(restored["state"], state)
    assert len(hosted(restored["state"])) == 6
    assert len(restored["state"][0].mu["a"].sharding.device_set) == count

    def resume(params, state):
        updates, state = jax.jit(tx.update)(gradients(params), state, params)
        return updates, state

    again = resume(restored["params"], restored["state"])
    first = resume(params, state)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(first), strict=True):
        np.testing.assert_array_max_ulp(np.asarray(a), np.asarray(b), 2)


DONATION = """
import sys
import jax, jax.numpy as jnp, optax
from qlora_jax.optim import paged

order, donated, own_shapes = sys.argv[1], eval(sys.argv[2]), sys.argv[3] == "own"
tx = paged(optax.adam(1e-3), min_size=0, own_shapes=own_shapes)
params = {"w": jnp.ones((64, 32))}
state = tx.init(params)

def step(params, state, grads):
    updates, state = tx.update(grads, state, params)
    params = optax.apply_updates(params, updates)
    return (params, state) if order == "params first" else (state, params)

out = jax.jit(step, donate_argnums=donated)(params, state, {"w": jnp.ones((64, 32))})
jax.block_until_ready(out)
kinds = {x.sharding.memory_kind for x in jax.tree.leaves(out)}
assert kinds == {"device", "pinned_host"}, kinds
print("stepped")
"""


def run_donation(order, donated, shapes):
    root = pathlib.Path(__file__).parents[2]
    return subprocess.Popen(
        [sys.executable, "-c", DONATION, order, donated, shapes],
        env=os.environ | {"PYTHONPATH": str(root)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_donation_in_the_order_promised_and_in_any_with_own_shapes():
    runs = {
        case: run_donation(*case)
        for case in [
            ("params first", "(0, 1)", "plain"),
            ("state first", "(0, 1)", "own"),
            ("params first", "(1,)", "own"),
        ]
    }
    for case, process in runs.items():
        out, errors = process.communicate(timeout=120)
        assert process.returncode == 0 and "stepped" in out, (case, errors[-500:])


def test_own_shapes_change_nothing_else():
    tx = paged(optax.adamw(1e-2), own_shapes=True, **PAGE)
    params, state = train(tx, donate=(0, 1))
    expected, plain = train(optax.adamw(1e-2))
    assert_same_bits(params, expected)
    assert state[0].mu["a"].shape == (1, 64, 32)
    np.testing.assert_array_equal(state[0].mu["a"][0], plain[0].mu["a"])


def test_without_host_memory_it_is_the_plain_optimizer_and_warns_once(monkeypatch):
    monkeypatch.setattr(memory, "HOST_KIND", "memory that this backend has not")
    memory._warn_without_host_memory.cache_clear()
    tx = paged(optax.adamw(1e-2), **PAGE)
    with pytest.warns(UserWarning, match="'cpu' backend has no .* plain optimizer"):
        state = tx.init(make_params())
    assert not hosted(state)
    # a second warning would be an error: the suite turns warnings into errors
    assert_same_bits(train(tx), train(optax.adamw(1e-2)))
    memory._warn_without_host_memory.cache_clear()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(page_size=0), "page_size=0 bytes must be positive"),
        (dict(device_budget=-1), "device_budget=-1 bytes must not be negative"),
        (dict(min_size=-1), "min_size=-1 numbers must not be negative"),
    ],
)
def test_impossible_sizes_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        paged(optax.adam(1e-3), **arguments)


@pytest.mark.parametrize("slice_leaves", [False, True])
def test_a_page_smaller_than_a_row_is_refused(slice_leaves):
    tx = paged(optax.adam(1e-3), page_size=100, min_size=0, slice_leaves=slice_leaves)
    with pytest.raises(
        ValueError, match=r"page_size=100 bytes is smaller than the \d+"
    ):
        tx.init(make_params())


def test_state_of_another_optimizer_is_refused():
    tx, params = paged(optax.adam(1e-3), **PAGE), make_params()
    with pytest.raises(ValueError, match="state is of another optimizer"):
        tx.update(params, optax.sgd(1e-3, momentum=0.9).init(params), params)
    other = tx.init(jax.tree.map(lambda x: x[:2], params))
    with pytest.raises(
        ValueError, match=r"has shape \(2, 32\), and this .* \(64, 32\)"
    ):
        tx.update(params, other, params)

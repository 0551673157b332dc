"""Kernels on the shards of a mesh of GPUs, against the float64 product."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import qlora_jax as ql
from benchmarks.models import random_model, spread
from pallas_kernels import quantized_matmul, quantized_matmul_dx
from qlora_jax.quant import dequantize, quantize
from qlora_jax.sharding import batch_sharding, make_mesh
from qlora_jax.train import committed, next_token_loss_sum, step_options
from tests.gpu.shapes import SMALL
from tests.tolerances import MATMUL_RELATIVE, MESH_LOSS_RELATIVE

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        jax.default_backend() == "gpu" and jax.device_count() < 2,
        reason="needs two GPUs",
    ),
]

OPS = {"matmul": quantized_matmul, "matmul_dx": quantized_matmul_dx}
K, N = 4096, 2048


@functools.cache
def weight():
    return quantize(jax.random.normal(jax.random.key(0), (K, N)) / K**0.5)


def place(array, *spec):
    mesh = jax.make_mesh((2,), ("a",), axis_types=(AxisType.Auto,))
    return jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))


def relative_error(y, op, x, added=0):
    exact = np.asarray(dequantize(weight(), jnp.float32), np.float64)
    expected = np.asarray(x, np.float64) @ (exact if op == "matmul" else exact.T)
    expected = expected + added
    return np.linalg.norm(np.asarray(y, np.float64) - expected) / np.linalg.norm(
        expected
    )


@pytest.mark.parametrize(
    "rows, n_axis, k_axis",
    [("a", None, None), (None, "a", None), (None, None, "a")],
    ids=["rows", "n", "k"],
)
@pytest.mark.parametrize(
    "implementation, op, m",
    [
        *((name, op, 512) for name in ("sm90", "two_pass", "sm80") for op in OPS),
        ("matvec", "matmul", 8),
        *((None, op, 512) for op in OPS),
    ],
)
def test_product_on_two_gpus(implementation, op, m, rows, n_axis, k_axis):
    w = weight()
    width = K if op == "matmul" else N
    x = jax.random.normal(jax.random.key(1), (m, width), jnp.bfloat16)

    def cut(leaf):
        axes = (n_axis, k_axis) if leaf.ndim == 2 else ()
        return place(leaf, *axes)

    multiply = jax.jit(
        lambda x, packed: OPS[op](x, packed, w.spec, implementation=implementation)
    )
    y = multiply(place(x, rows), jax.tree.map(cut, w.packed))
    assert len(y.sharding.device_set) == 2
    assert relative_error(y, op, x) < MATMUL_RELATIVE["bfloat16"]


@pytest.mark.parametrize(
    "rows, n_axis, k_axis",
    [("a", None, None), (None, "a", None), (None, None, "a")],
    ids=["rows", "n", "k"],
)
@pytest.mark.parametrize("op", OPS)
def test_what_a_product_is_added_to_on_two_gpus(op, rows, n_axis, k_axis):
    w = weight()
    width, features = (K, N) if op == "matmul" else (N, K)
    keys = jax.random.split(jax.random.key(1), 4)
    x = jax.random.normal(keys[0], (512, width), jnp.bfloat16)
    t = jax.random.normal(keys[1], (512, 16), jnp.bfloat16)
    # So that all three parts are of a size, and no error hides behind another's.
    u = jax.random.normal(keys[2], (features, 16), jnp.bfloat16) / 4
    onto = jax.random.normal(keys[3], (512, features), jnp.bfloat16)

    def cut(leaf):
        return place(leaf, *((n_axis, k_axis) if leaf.ndim == 2 else ()))

    @jax.jit
    def multiply(x, packed, t, u, onto):
        options = {"addend": (t, u), "onto": onto, "implementation": "sm90"}
        return OPS[op](x, packed, w.spec, **options)

    y = multiply(
        place(x, rows),
        jax.tree.map(cut, w.packed),
        place(t, rows),
        place(u),
        place(onto),
    )
    t, u, onto = (np.asarray(a, np.float64) for a in (t, u, onto))
    assert relative_error(y, op, x, t @ u.T + onto) < MATMUL_RELATIVE["bfloat16"]


def test_a_step_with_rows_and_paged_state_on_two_gpus():
    """Data parallel: rows of x are cut, the weight and the adapter are everywhere."""
    tree = ql.add_lora({"proj": weight()}, rank=16, alpha=16, key=jax.random.key(2))
    trainable, frozen = ql.split_trainable(tree)
    trainable, frozen = jax.tree.map(place, (trainable, frozen))
    x = jax.random.normal(jax.random.key(3), (512, K), jnp.bfloat16)
    tx = ql.paged(optax.adam(1e-3), min_size=1)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(trainable, state, frozen, x):
        def loss(trainable):
            y = x @ ql.join_trainable(trainable, frozen)["proj"]
            return jnp.mean(y.astype(jnp.float32) ** 2)

        value, grads = jax.value_and_grad(loss)(trainable)
        updates, state = tx.update(grads, state, trainable)
        return optax.apply_updates(trainable, updates), state, value

    def losses(x, trainable, frozen):
        trainable = jax.tree.map(jnp.copy, trainable)
        state, found = tx.init(trainable), []
        for _ in range(4):
            trainable, state, value = step(trainable, state, frozen, x)
            found.append(float(value))
        return found

    on_two = losses(place(x, "a"), trainable, frozen)
    first = jax.devices()[0]
    on_one = losses(*jax.device_put((x, trainable, frozen), first))
    assert on_two[-1] < on_two[0]
    np.testing.assert_allclose(on_two, on_one, rtol=1e-3)


def losses_of_a_model(mesh, remat, *, kept=True, steps=3):
    """With rows of the batch kept where they are, or left to the compiler."""
    model = random_model(SMALL)
    tokens = jax.random.randint(jax.random.key(3), (4, 512), 0, SMALL.vocab_size)
    if mesh is None:
        tokens = jax.device_put(tokens, jax.devices()[0])
    else:
        model = spread(model, mesh)
        tokens = jax.device_put(tokens, batch_sharding(mesh))
    model = ql.add_lora(model, rank=16, alpha=16, key=jax.random.key(0))
    trainable, frozen = committed(ql.split_trainable(model))
    tx = ql.paged(optax.adam(1e-3), min_size=1)
    state = committed(tx.init(trainable))

    rows = None if mesh is None or not kept else batch_sharding(mesh)
    loss_sum = functools.partial(next_token_loss_sum, remat=remat, rows=rows)
    step = ql.make_train_step(
        tx,
        loss_sum=loss_sum,
        compiler_options=step_options(tokens.size, remat=remat, tune=False),
        shardings=jax.tree.map(lambda x: x.sharding, trainable),
    )
    # Compiled once: what it returns lies as what it takes.
    arguments = (trainable, state, frozen, {"tokens": tokens})
    compiled = step.lower(*arguments).compile()
    assert "mosaic_gpu" in compiled.as_text()
    found = []
    for _ in range(steps):
        trainable, state, metrics = compiled(trainable, state, *arguments[2:])
        found.append((float(metrics["loss"]), float(metrics["grad_norm"])))
    moments = [x for x in jax.tree.leaves(state) if x.ndim > 1]
    assert {x.sharding.memory_kind for x in moments} == {"pinned_host"}
    return np.asarray(found)


@functools.cache
def losses_on_one(remat):
    return losses_of_a_model(None, remat)


@pytest.mark.parametrize("remat", ["none", "full", "offload"])
@pytest.mark.parametrize("axis", ["data", "fsdp", "model"])
def test_a_step_of_a_model_on_two_gpus(axis, remat):
    """By rows of the batch, by parts of the weights too, and tensor parallel."""
    found = losses_of_a_model(make_mesh(**{axis: 2}), remat)
    expected = losses_on_one(remat)
    assert expected[-1, 0] < expected[0, 0]
    np.testing.assert_allclose(found, expected, rtol=MESH_LOSS_RELATIVE["bfloat16"])


@pytest.mark.parametrize("axis", ["data", "fsdp", "model"])
def test_the_same_without_saying_where_rows_are(axis):
    found = losses_of_a_model(make_mesh(**{axis: 2}), "full", kept=False)
    expected = losses_on_one("full")
    np.testing.assert_allclose(found, expected, rtol=MESH_LOSS_RELATIVE["bfloat16"])


def test_a_process_can_take_one_of_two_gpus():
    code = "import jax, qlora_jax as ql; ql.use_one_gpu(); print(jax.device_count())"
    quiet = dict(os.environ, XLA_PYTHON_CLIENT_PREALLOCATE="false")
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=quiet,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["1"]

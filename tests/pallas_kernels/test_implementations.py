"""Products on each shard of a mesh, with the plain form standing in for a kernel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import pallas_kernels
from pallas_kernels import PackedSpec, implementations, reference

RAMP = tuple(float(x) for x in np.linspace(-1, 1, 16, dtype=np.float32))
SPEC = PackedSpec(RAMP, n=256, k=512)


def plus(y, addend=None, onto=None):
    if addend is not None:
        y = y + addend[0] @ addend[1].T
    return y if onto is None else y + onto


def random_adds(names, rows, features):
    t, u, onto = (
        jax.random.normal(jax.random.key(2 + i), shape)
        for i, shape in enumerate([(rows, 24), (features, 24), (rows, features)])
    )
    return {k: v for k, v in {"addend": (t, u), "onto": onto}.items() if k in names}


@pytest.fixture
def plain_form_as_kernel(monkeypatch):
    """What each shard was asked for, in `calls`; the plain form answers."""
    calls = []

    def run_kernel(name, op, x, packed, spec, **adds):
        shape = spec.n, spec.k
        calls.append((op, x.shape, packed.codes.shape, shape, tuple(adds)))
        return plus(getattr(reference, op)(x, packed, spec), **adds)

    monkeypatch.setattr(implementations, "run_kernel", run_kernel)
    return calls


@pytest.mark.parametrize(
    "rows, n_axis, k_axis, local",
    [
        (None, None, None, (256, 512)),
        ("a", None, None, (256, 512)),
        (None, "b", None, (64, 512)),
        (None, None, "b", (256, 128)),
        ("a", "b", None, (64, 512)),
        ("a", None, "b", (256, 128)),
        (None, "a", "b", (128, 128)),
        ("b", "b", "a", (256, 256)),  # the rows keep their axis, the weight is gathered
    ],
)
@pytest.mark.parametrize("op", ["matmul", "matmul_dx"])
@pytest.mark.parametrize("adds", [(), ("onto",), ("addend",), ("addend", "onto")])
def test_every_way_to_cut(plain_form_as_kernel, adds, op, rows, n_axis, k_axis, local):
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)

    def place(array, *spec):
        return jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))

    w = jax.random.normal(jax.random.key(0), (SPEC.n, SPEC.k))
    packed = pallas_kernels.quantize(w, SPEC)
    contracted = SPEC.k if op == "matmul" else SPEC.n
    x = jax.random.normal(jax.random.key(1), (32, contracted))
    expected = getattr(reference, op)(x, packed, SPEC)
    values = random_adds(adds, *expected.shape)
    expected = plus(expected, **values)
    f = jax.jit(
        lambda x, codes, absmax, adds: implementations.sharded_product(
            x, codes, absmax, adds, "sm90", op, SPEC
        )
    )
    y = f(
        place(x, rows),
        place(packed.codes, n_axis, k_axis),
        place(packed.absmax, n_axis, k_axis),
        jax.tree.map(place, values),
    )
    np.testing.assert_allclose(y, expected, rtol=2e-5, atol=2e-4)
    # The last call is the one on a shard; the first, on whole arrays, is the trace.
    assert plain_form_as_kernel[-1][3] == local
    assert plain_form_as_kernel[-1][1][0] == (
        32 // {"a": 2, "b": 4}[rows] if rows else 32
    )
    # A kernel adds where its product is whole, and once where it is a part of a sum.
    is_part = local[1 if op == "matmul" else 0] < contracted
    assert plain_form_as_kernel[-1][4] == (() if is_part else adds)


def test_what_a_kernel_cannot_add_on_a_shard_is_added_after(monkeypatch):
    asked = []

    def run_kernel(name, op, x, packed, spec, **adds):
        asked.append((spec.n, tuple(adds)))
        if adds and spec.n < SPEC.n:
            raise NotImplementedError
        return plus(reference.matmul(x, packed, spec), **adds)

    monkeypatch.setattr(implementations, "run_kernel", run_kernel)
    mesh = jax.make_mesh((8,), ("a",), axis_types=(AxisType.Auto,))
    cut = NamedSharding(mesh, PartitionSpec("a"))
    w = jax.random.normal(jax.random.key(0), (SPEC.n, SPEC.k))
    packed = pallas_kernels.quantize(w, SPEC)
    x = jax.random.normal(jax.random.key(1), (32, SPEC.k))
    adds = random_adds(("addend", "onto"), 32, SPEC.n)
    f = jax.jit(lambda x, p: implementations.run("sm90", "matmul", x, p, SPEC, **adds))
    y = f(x, jax.tree.map(lambda leaf: jax.device_put(leaf, cut), packed))
    expected = plus(reference.matmul(x, packed, SPEC), **adds)
    np.testing.assert_allclose(y, expected, rtol=2e-5, atol=2e-4)
    assert asked[-2:] == [(SPEC.n // 8, ("addend", "onto")), (SPEC.n // 8, ())]


def test_nested_scales_are_decoded_before_the_cut(plain_form_as_kernel):
    mesh = jax.make_mesh((8,), ("a",), axis_types=(AxisType.Auto,))
    nested = tuple(float(x) for x in np.linspace(-1, 1, 256, dtype=np.float32))
    spec = PackedSpec(RAMP, n=256, k=512, nested_codebook=nested)
    packed = pallas_kernels.quantize(
        jax.random.normal(jax.random.key(0), (spec.n, spec.k)), spec
    )
    x = jax.random.normal(jax.random.key(1), (32, spec.k))
    cut = NamedSharding(mesh, PartitionSpec("a"))
    placed = jax.tree.map(
        lambda leaf: jax.device_put(leaf, cut) if leaf.ndim == 2 else leaf, packed
    )
    y = jax.jit(lambda x, p: implementations.run("sm90", "matmul", x, p, spec))(
        x, placed
    )
    np.testing.assert_allclose(
        y, reference.matmul(x, packed, spec), rtol=2e-5, atol=2e-4
    )
    assert plain_form_as_kernel[-1][3] == (32, 512)


def test_blocks_that_cross_rows_are_left_to_the_plain_form():
    spec = PackedSpec(RAMP, n=64, k=96)
    packed = pallas_kernels.quantize(jnp.ones((64, 96)), spec)
    with pytest.raises(NotImplementedError, match=r"spec.k=96, spec.block_size=64"):
        implementations.run("sm90", "matmul", jnp.ones((4, 96)), packed, spec)

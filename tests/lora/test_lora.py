"""LoraTensor: the equation, bit-equality, dropout, stacks, adapters by row."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import tuning
from qlora_jax.lora import LoraTensor
from qlora_jax.lora.initial import with_magnitude
from qlora_jax.lora.lora import kaiming_uniform
from qlora_jax.lora.low_rank import dropout
from qlora_jax.quant import dequantize, quantize
from tests.tolerances import MATMUL_RELATIVE

pytestmark = pytest.mark.usefixtures("strict_dtypes")


def draw(seed, *shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def make(*stack, n_in=64, n_out=96, rank=8, dtype=jnp.float32, **options):
    return LoraTensor(
        draw(0, *stack, n_in, n_out, dtype=dtype) / 8,
        draw(1, *stack, n_in, rank),
        draw(2, *stack, rank, n_out),
        **options,
    )


def relative(got, wanted):
    got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    return np.linalg.norm(got - wanted) / np.linalg.norm(wanted)


def formula(x, lt, scale):
    """The equation in float64."""
    x, w, a, b = (np.asarray(v, np.float64) for v in (x, lt.w, lt.a, lt.b))
    return x @ w + x @ a @ b * scale


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rslora, scale", [(False, 2.0), (True, 16 / 8**0.5)])
def test_it_is_the_equation(dtype, rslora, scale):
    lt = make(alpha=16.0, rslora=rslora, dtype=dtype)
    x = draw(3, 5, 64, dtype=dtype)
    assert lt.scale == pytest.approx(scale)
    got = x @ lt
    assert got.dtype == dtype
    # Two matmuls in a row and a sum: three roundings to the type.
    assert relative(got, formula(x, lt, scale)) < 3 * MATMUL_RELATIVE[dtype]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("base", ["array", "nf4"])
def test_a_zero_adapter_is_bit_equal_to_the_base(dtype, jit, dora, base):
    lt = make(dtype=dtype)
    w = lt.w if base == "array" else quantize(lt.w)
    lt = dataclasses.replace(lt, w=w, b=jnp.zeros_like(lt.b))
    lt = with_magnitude(lt) if dora else lt
    x = draw(3, 5, 64, dtype=dtype)
    matmul = jax.jit(lambda x, w: x @ w) if jit else lambda x, w: x @ w
    np.testing.assert_array_equal(matmul(x, lt), matmul(x, w))


def test_a_numpy_array_on_the_left_reaches_it():
    lt = make()
    x = np.ones((2, 64), np.float32)
    np.testing.assert_array_equal(x @ lt, jnp.asarray(x) @ lt)


def test_what_it_says_of_itself():
    lt = make(3, rank=8, alpha=32.0, dropout=0.05)
    assert lt.shape == (3, 64, 96) and lt.ndim == 3 and lt.dtype == jnp.float32
    assert repr(lt) == (
        "LoraTensor([3, 64, 96], rank=8, alpha=32, dropout=0.05, w=ArrayImpl float32)"
    )
    assert repr(jax.tree.map(lambda _: None, lt)).startswith("LoraTensor(w=None")


def test_gradients_are_those_of_the_equation():
    lt, x = make(), draw(3, 5, 64)
    cotangent = np.asarray(draw(4, 5, 96), np.float64)

    def loss(x, a, b):
        return ((x @ dataclasses.replace(lt, a=a, b=b)) * cotangent.astype("f4")).sum()

    dx, da, db = jax.jit(jax.grad(loss, (0, 1, 2)))(x, lt.a, lt.b)
    x, w, a, b = (np.asarray(v, np.float64) for v in (x, lt.w, lt.a, lt.b))
    assert relative(dx, cotangent @ (w + 2 * a @ b).T) < 2e-6
    assert relative(da, 2 * x.T @ cotangent @ b.T) < 2e-6
    assert relative(db, 2 * (x @ a).T @ cotangent) < 2e-6


@pytest.mark.parametrize("shape", [(1000, 64), (7, 3, 13), (5,)])
@pytest.mark.parametrize("rate", [0.05, 0.5, 0.9])
def test_dropout_zeroes_at_its_rate_and_keeps_the_mean(shape, rate):
    keys = jax.random.split(jax.random.key(0), -(-64000 // int(np.prod(shape))))
    ones, kept = jax.vmap(lambda k: dropout(jnp.ones(shape), k, rate=rate))(keys)
    rounded = round(rate * 256) / 256
    deviation = (rounded * (1 - rounded) / ones.size) ** 0.5
    assert abs((ones == 0).mean() - rounded) < 5 * deviation
    assert set(np.unique(ones)) == {0.0, 1.0} and (kept == 1 - rounded).all()


def test_dropout_needs_a_key_and_is_a_function_of_it():
    lt, x = make(dropout=0.5), draw(3, 5, 64)
    plain = dataclasses.replace(lt, dropout=0.0)
    with_key = [dataclasses.replace(lt, key=jax.random.key(i)) for i in (0, 0, 1)]
    np.testing.assert_array_equal(x @ lt, x @ plain)
    first, again, other = (x @ w for w in with_key)
    np.testing.assert_array_equal(first, again)
    assert relative(first, other) > 0.1
    # Only the adapter's input is dropped.
    kept, _ = dropout(x, jax.random.key(0), rate=0.5)
    wanted = formula(x, lt, 0) + formula(kept, lt, 4) - formula(kept, lt, 0)
    assert relative(first, wanted) < 2e-6


@pytest.mark.parametrize("rate", [0.0, 0.25])
def test_the_backward_pass_keeps_x_the_product_and_the_masters(rate):
    """Neither a mask, nor the dropped x, nor rounded copies of a and b."""
    lt = make(dropout=rate, key=jax.random.key(0), dtype=jnp.bfloat16)
    x = draw(3, 5, 64, dtype=jnp.bfloat16)

    def matmul(x, a, b):
        return x @ dataclasses.replace(lt, a=a, b=b)

    _, vjp = jax.vjp(matmul, x, lt.a, lt.b)
    kept = [leaf for leaf in jax.tree.leaves(vjp) if hasattr(leaf, "shape")]
    own = [(64, 8), (8, 96), (5, 64), (5, 8)]  # a, b, x, dropout(x) @ a
    own = [leaf for leaf in kept if leaf.shape in own]
    assert sum(leaf.nbytes for leaf in own) <= 4 * (64 + 96) * 8 + 2 * 5 * (64 + 8)
    assert not [leaf for leaf in kept if leaf.dtype in (bool, jnp.uint8)]
    for leaf in own:
        if leaf.shape == x.shape:
            np.testing.assert_array_equal(leaf, x)


@pytest.mark.parametrize("remat", [False, True])
def test_the_mask_of_the_backward_pass_is_that_of_the_forward(remat):
    lt, x = make(dropout=0.25, key=jax.random.key(0)), draw(3, 5, 64)
    matmul = lambda x: x @ lt
    y, vjp = jax.vjp(jax.checkpoint(matmul) if remat else matmul, x)
    (dx,) = vjp(jnp.ones_like(y))
    # Linear in x for a given mask, so that y = dx . x.
    assert float(y.sum()) == pytest.approx(float((dx * x).sum()), rel=1e-4)


def test_a_scan_over_layers_equals_a_loop():
    lt = make(3, n_out=64, dropout=0.3)
    lt = dataclasses.replace(lt, key=jax.random.split(jax.random.key(5), 3))
    x = draw(3, 5, 64)
    scanned, _ = jax.jit(lambda x, lt: jax.lax.scan(lambda x, w: (x @ w, None), x, lt))(
        x, lt
    )
    looped = viewed = x
    for i in range(3):
        looped, viewed = looped @ lt[i], viewed @ lt.at_layer(i)
    assert relative(scanned, looped) < 2e-6
    np.testing.assert_array_equal(looped, viewed)


def test_at_layer_does_not_slice_a_quantized_base():
    lt = make(3)
    lt = dataclasses.replace(lt, w=quantize(lt.w))
    view = lt.at_layer(2)
    assert view.w.codes is lt.w.codes and view.shape == (64, 96)
    x = draw(3, 5, 64)
    np.testing.assert_array_equal(x @ view, x @ lt[2])


def test_a_stack_of_inputs_goes_through_a_stack_of_weights():
    lt, x = make(3), draw(3, 3, 5, 64)
    wanted = np.stack([x[i] @ lt[i] for i in range(3)])
    assert relative(x @ lt, wanted) < 2e-6
    with pytest.raises(ValueError, match=r"must begin with the stack axes \[3\]"):
        x[0] @ lt


def several(n=3, **options):
    lt = make(**options)
    a, b = draw(5, n, 64, 8), draw(6, n, 8, 96)
    return dataclasses.replace(lt, a=a, b=b), [
        dataclasses.replace(lt, a=a[i], b=b[i]) for i in range(n)
    ]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_use_their_own_adapters(dtype):
    lt, singles = several(dtype=dtype)
    ids = jnp.array([2, 0, -1, 2])
    x = draw(3, 4, 7, 64, dtype=dtype)
    got = jax.jit(lambda x, lt: x @ lt)(x, dataclasses.replace(lt, ids=ids))
    assert lt.num_adapters == 3
    for row, i in enumerate([2, 0, None, 2]):
        wanted = x[row] @ (lt.w if i is None else singles[i])
        assert relative(got[row], wanted) < 2 * MATMUL_RELATIVE[dtype]
    np.testing.assert_array_equal(got[2], jax.jit(lambda x, w: x @ w)(x, lt.w)[2])


def test_one_id_chooses_for_all_rows_without_recompiling():
    lt, singles = several()
    x = draw(3, 4, 64)
    matmul = jax.jit(lambda x, lt: x @ lt)
    for i in range(3):
        got = matmul(x, dataclasses.replace(lt, ids=jnp.int32(i)))
        assert relative(got, x @ singles[i]) < 2e-6
    assert matmul._cache_size() == 1
    base = matmul(x, dataclasses.replace(lt, ids=jnp.int32(-1)))
    assert relative(base, x @ lt.w) < 1e-6


def test_an_id_that_does_not_exist_is_nan():
    lt, _ = several()
    got = draw(3, 2, 64) @ dataclasses.replace(lt, ids=jnp.array([3, 1]))
    assert np.isnan(got[0]).all() and np.isfinite(got[1]).all()


def test_gradients_of_rows_reach_their_adapter_only():
    lt, _ = several()
    x, ids = draw(3, 2, 64), jnp.array([2, 0])
    grad = jax.grad(lambda a: (x @ dataclasses.replace(lt, a=a, ids=ids)).sum())(lt.a)
    assert [bool((grad[i] != 0).any()) for i in range(3)] == [True, False, True]


@pytest.mark.parametrize("base", ["array", "nf4"])
def test_dora_is_its_formula(base):
    lt = make(alpha=4.0)
    w = lt.w if base == "array" else quantize(lt.w)
    whole = np.asarray(lt.w if base == "array" else dequantize(w), np.float64)
    lt = with_magnitude(dataclasses.replace(lt, w=w, b=jnp.zeros_like(lt.b)))
    assert relative(lt.magnitude, np.linalg.norm(whole, axis=0)) < 1e-6
    lt = dataclasses.replace(lt, b=draw(2, 8, 96), magnitude=lt.magnitude * 1.5)
    x = draw(3, 5, 64)
    m, a, b = (np.asarray(v, np.float64) for v in (lt.magnitude, lt.a, lt.b))
    adapted = whole + 0.5 * a @ b
    wanted = np.asarray(x) @ (adapted * m / np.linalg.norm(adapted, axis=0))
    assert relative(x @ lt, wanted) < 2e-6
    # The norm is a constant to differentiation: d/dm is linear, d/db is rescaled only.
    db = jax.grad(lambda b: (x @ dataclasses.replace(lt, b=b)).sum())(lt.b)
    ratio = m / np.linalg.norm(adapted, axis=0)
    assert relative(db, 0.5 * (np.asarray(x) @ a).sum(0)[:, None] * ratio) < 2e-5


def test_kaiming_uniform_is_the_bound_of_peft():
    a = np.asarray(kaiming_uniform(jax.random.key(0), (4, 256, 64)))
    assert np.abs(a).max() <= 1 / 16 and np.abs(a).max() > 0.0624
    assert a.std() == pytest.approx(1 / 16 / 3**0.5, rel=0.01)


def test_wrong_calls():
    lt = make()
    x = draw(3, 2, 64)
    many, _ = several()
    with pytest.raises(ValueError, match=r"last axis of x, of shape \[2, 63\].*64, 96"):
        x[:, :63] @ lt
    with pytest.raises(ValueError, match="x is int32 and the adapter computes"):
        jnp.ones((2, 64), jnp.int32) @ lt
    with pytest.raises(ValueError, match="holds 3 adapters and no ids"):
        x @ many
    with pytest.raises(ValueError, match="the weight holds one adapter"):
        x @ dataclasses.replace(lt, ids=jnp.array([0, 0]))
    with pytest.raises(ValueError, match=r"There are 3 adapter ids and x has shape"):
        x @ dataclasses.replace(many, ids=jnp.array([0, 0, 0]))
    with pytest.raises(IndexError, match="Only stack axes can be indexed"):
        lt[0]
    with pytest.raises(ValueError, match="one stack axis"):
        lt.at_layer(0)
    dora = dataclasses.replace(many, magnitude=jnp.ones((3, 96)), ids=jnp.array([0, 0]))
    with pytest.raises(NotImplementedError, match="Several DoRA adapters"):
        x @ dora


def test_sharded_weights_and_rows():
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    place = lambda leaf, *spec: jax.device_put(leaf, NamedSharding(mesh, P(*spec)))
    lt = make(dropout=0.25, key=jax.random.key(0))
    x = draw(3, 8, 6, 64)
    sharded = dataclasses.replace(
        lt, w=place(lt.w, None, "model"), a=place(lt.a), b=place(lt.b, None, "model")
    )
    matmul = jax.jit(lambda x, lt: x @ lt)
    got = matmul(place(x, "data"), sharded)
    assert got.sharding.spec == P("data", None, "model")
    assert relative(got, matmul(x, lt)) < 2e-6


def test_on_hopper_the_adapter_is_part_of_the_kernel(monkeypatch):
    monkeypatch.setattr(tuning, "compute_capability", lambda: 9.0)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    shape = jax.ShapeDtypeStruct
    w = jax.eval_shape(lambda: quantize(jnp.zeros((4096, 14336))))
    leaves = shape((4096, 64), jnp.float32), shape((64, 14336), jnp.float32)

    def loss(x, a, b, w):
        return jnp.sum((x @ LoraTensor(w, a, b)).astype(jnp.float32) ** 2)

    f = jax.jit(jax.grad(loss, (0, 1, 2)))
    traced = f.trace(shape((1024, 4096), jnp.bfloat16), *leaves, w)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    # One kernel forward and one backward; x @ a, and the gradients of x @ a, a, b and
    # of x through a: nothing is computed twice.
    assert text.count("@mosaic_gpu") == 2
    assert text.count("stablehlo.dot_general") == 5

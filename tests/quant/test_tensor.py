import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.quant import (
    FORMATS,
    QuantizedTensor,
    dequantize,
    quantize,
    quantized_matmul,
)
from tests.tolerances import MATMUL_RELATIVE

pytestmark = [pytest.mark.unoptimized, pytest.mark.usefixtures("strict_dtypes")]


def normal(*shape, seed=0, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def relative(out, reference):
    out = np.asarray(out, np.float64)
    return np.linalg.norm(out - reference) / np.linalg.norm(reference)


def test_nf4_costs_4127_millibits_a_parameter():
    qt = quantize(normal(1024, 512))
    assert qt.nbytes == sum(leaf.nbytes for leaf in jax.tree.leaves(qt))
    assert qt.bits_per_parameter == pytest.approx(4.127, abs=5e-4)
    without = quantize(normal(1024, 512), double_quant=False)
    assert without.bits_per_parameter == 4.5


def test_it_tells_what_it_is():
    qt = quantize(normal(3, 128, 256, dtype=jnp.bfloat16))
    assert qt.shape == (3, 128, 256) and qt.ndim == 3 and qt.size == 3 * 128 * 256
    assert qt.dtype == jnp.bfloat16
    assert repr(qt) == (
        "QuantizedTensor(nf4, [3, 128, 256], blocks of 64, double quantization, "
        "4.128 bits a parameter, 0.05 MB)"
    )


@pytest.mark.parametrize(
    "format, dtype, k, n",
    [(format, "float32", 172, 64) for format in FORMATS]
    + [
        ("nf4", "bfloat16", 128, 96),
        ("nf4", "float16", 128, 96),
        ("nf4", "float32", 90, 7),
        ("nf4", "bfloat16", 13, 5),
        ("int8", "bfloat16", 13, 5),
    ],
)
def test_product_equals_the_dequantized_one(format, dtype, k, n):
    w = normal(k, n, dtype=jnp.dtype(dtype))
    if format == "dynamic8-unsigned":
        w = jnp.abs(w)
    qt = quantize(w, format)
    x = normal(6, k, seed=1, dtype=jnp.dtype(dtype))
    y = x @ qt
    weight = np.asarray(dequantize(qt, jnp.float32), np.float64)
    assert y.dtype == x.dtype and y.shape == (6, n)
    assert relative(y, np.asarray(x, np.float64) @ weight) < MATMUL_RELATIVE[dtype]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradient_equals_the_dequantized_one(dtype):
    qt = quantize(normal(128, 96))
    x = normal(6, 128, seed=1, dtype=jnp.dtype(dtype))
    dy = normal(6, 96, seed=2, dtype=jnp.dtype(dtype))
    _, vjp = jax.vjp(lambda x: x @ qt, x)
    (dx,) = vjp(dy)
    weight = np.asarray(dequantize(qt, jnp.float32), np.float64)
    assert dx.dtype == x.dtype
    assert relative(dx, np.asarray(dy, np.float64) @ weight.T) < MATMUL_RELATIVE[dtype]


def test_gradient_keeps_no_dequantized_weight():
    qt = quantize(normal(256, 128))
    _, vjp = jax.vjp(lambda x: jnp.sin(x @ qt), normal(4, 256))
    kept = sum(leaf.nbytes for leaf in jax.tree.leaves(vjp))
    # The codes and scales, and the cosine of [4, 128]; the weight would be 131,072.
    assert kept == qt.nbytes + 4 * 128 * 4
    sizes = {leaf.size for leaf in jax.tree.leaves(vjp)}
    assert 256 * 128 not in sizes


def test_the_frozen_weight_gets_no_gradient():
    qt = quantize(normal(64, 32))
    gradient = jax.grad(lambda w: (normal(2, 64) @ w).sum(), allow_int=True)(qt)
    assert float(jnp.abs(gradient.offset)) == 0
    assert float(jnp.abs(gradient.nested_absmax).max()) == 0
    assert gradient.codes.dtype == jax.dtypes.float0


def test_works_under_scan_vmap_and_remat():
    stack = quantize(normal(5, 64, 64) / 8)
    x = normal(2, 64)

    def body(x, w):
        return x @ w, None

    scanned, _ = jax.lax.scan(jax.checkpoint(body), x, stack)
    by_hand = x
    for i in range(5):
        by_hand = by_hand @ stack[i]
    np.testing.assert_allclose(scanned, by_hand, rtol=1e-5)
    batched = jnp.stack([x] * 5) @ stack
    np.testing.assert_allclose(batched[3], x @ stack[3], rtol=1e-5)
    gradient = jax.jit(jax.grad(lambda x: jax.lax.scan(body, x, stack)[0].sum()))(x)
    assert gradient.shape == x.shape and bool(jnp.isfinite(gradient).all())


@pytest.mark.optimized
def test_view_of_a_layer_equals_the_slice():
    stack = quantize(normal(3, 128, 64))
    x = normal(2, 128)

    @jax.jit
    def at(i):
        return x @ stack.at_layer(i)

    for i in range(3):
        np.testing.assert_array_equal(at(i), jax.jit(lambda w: x @ w)(stack[i]))
    assert stack.at_layer(1).shape == (128, 64)
    assert stack.at_layer(1).nbytes == stack[1].nbytes


def test_numpy_on_the_left():
    qt = quantize(normal(64, 32))
    x = np.asarray(normal(2, 64))
    np.testing.assert_array_equal(x @ qt, jnp.asarray(x) @ qt)


def test_second_call_does_not_compile():
    qt = quantize(normal(64, 32))
    f = jax.jit(lambda x, w: x @ w)
    f(normal(2, 64), qt)
    f(normal(2, 64, seed=3), quantize(normal(64, 32, seed=4)))
    assert f._cache_size() == 1


@pytest.mark.optimized
@pytest.mark.parametrize("double_quant", [True, False])
def test_quantizing_takes_little_memory(double_quant):
    size = 1024 * 2048
    w = jax.ShapeDtypeStruct((1024, 2048), jnp.bfloat16)
    compiled = jax.jit(lambda w: quantize(w, double_quant=double_quant)).lower(w)
    temporaries = compiled.compile().memory_analysis().temp_size_in_bytes
    assert temporaries / size <= 6  # bytes a parameter


def test_sharded_product_is_right():
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=auto)
    sharding = lambda *axes: jax.sharding.NamedSharding(
        mesh, jax.sharding.PartitionSpec(*axes)
    )
    qt = quantize(normal(512, 256))
    x = normal(8, 512, seed=1)
    expected = x @ qt
    for n_axis, k_axis in (("b", None), (None, "b"), ("a", "b")):
        placed = QuantizedTensor(
            **{
                **{f: getattr(qt, f) for f in qt.__dataclass_fields__},
                "codes": jax.device_put(qt.codes, sharding(n_axis, k_axis)),
                "absmax": jax.device_put(qt.absmax, sharding(n_axis, k_axis)),
                "nested_absmax": jax.device_put(qt.nested_absmax, sharding()),
                "offset": jax.device_put(qt.offset, sharding()),
            }
        )
        y = jax.jit(lambda x, w: x @ w)(jax.device_put(x, sharding("a")), placed)
        assert relative(y, np.asarray(expected, np.float64)) < 1e-6


def test_naming_the_implementation():
    qt = quantize(normal(64, 32))
    x = normal(2, 64)
    np.testing.assert_array_equal(quantized_matmul(x, qt, implementation="xla"), x @ qt)
    with pytest.raises(ValueError, match=r"Unknown implementation='cuda'"):
        quantized_matmul(x, qt, implementation="cuda")


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_are_refused(bad, double_quant):
    w = normal(64, 64).at[3, 5].set(bad)
    with pytest.raises(ValueError, match=r"shape \(64, 64\) holds NaN or infinity"):
        quantize(w, double_quant=double_quant)


def test_bad_calls_say_what_is_wrong():
    w = normal(64, 32)
    with pytest.raises(ValueError, match=r"block_size=48 must be one of \(32, 64"):
        quantize(w, block_size=48)
    with pytest.raises(ValueError, match="Unknown format 'nf3'"):
        quantize(w, "nf3")
    with pytest.raises(ValueError, match=r"at least two axes.*got shape \(64,\)"):
        quantize(w[:, 0])
    with pytest.raises(ValueError, match="floating point is quantized, got int32"):
        quantize(jnp.ones((64, 64), jnp.int32))
    qt = quantize(w)
    with pytest.raises(ValueError, match=r"must be k=64 of the weight; x.shape=\(2, 9"):
        jnp.ones((2, 96)) @ qt
    with pytest.raises(ValueError, match="x must be float32, bfloat16 or float16, got"):
        jnp.ones((2, 64), jnp.int32) @ qt
    stack = quantize(normal(3, 64, 32))
    with pytest.raises(ValueError, match="for one x through all layers, scan over"):
        jnp.ones((2, 64)) @ stack
    with pytest.raises(ValueError, match="at_layer takes a weight with one stack axis"):
        qt.at_layer(0)
    with pytest.raises(IndexError, match="Only stack axes can be indexed"):
        qt[0]

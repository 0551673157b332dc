"""The Hopper matmuls against the float64 product, every configuration and pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import matmul_sm90
from pallas_kernels.matmul_sm90 import Config
from qlora_jax.quant import dequantize, quantize
from tests.tolerances import MATMUL_RELATIVE

PASSES = {"forward": matmul_sm90.matmul, "backward": matmul_sm90.matmul_dx}
CONFIGS = [
    Config(),
    Config(permuted=0),
    Config(cluster=2),
    Config(cluster=2, permuted=0, raster="features"),
    Config(tile_m=192, stages=5),
    Config(tile_m=128, stages=6),
    Config(tile_m=128, stages=6, permuted=0, raster_width=4),
    Config(tile_m=64, stages=8),
    Config(permuted=0, divided=True),
    Config(tile_m=64, stages=8, permuted=0, divided=True),
]


def is_hopper():
    device = jax.devices()[0]
    return device.platform == "gpu" and device.compute_capability == "9.0"


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not is_hopper(), reason="needs compute capability 9.0"),
]


def operands(direction, m, n, k, dtype="bfloat16", format="nf4", **options):
    """x of the pass, the weight and the float64 product."""
    key = jax.random.key(n + k)
    w = quantize(jax.random.normal(key, (k, n)) * 0.02, format, **options)
    width = k if direction == "forward" else n
    x = jax.random.normal(jax.random.key(m), (m, width)).astype(dtype)
    exact = np.asarray(dequantize(w, jnp.float32), np.float64)
    exact = exact if direction == "forward" else exact.T
    return x, w, np.asarray(x, np.float64) @ exact


def run(direction, x, w, config=None, addend=None, onto=None):
    f = PASSES[direction]
    call = jax.jit(lambda x, p, a, o: f(x, p, w.spec, config=config, addend=a, onto=o))
    return call(x, w.packed, addend, onto)


def relative_error(y, expected):
    y = np.asarray(y, np.float64)
    return np.linalg.norm(y - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("direction", PASSES)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_configuration(config, direction):
    x, w, expected = operands(direction, 600, 1536, 1024)
    y = run(direction, x, w, config)
    assert relative_error(y, expected) < MATMUL_RELATIVE["bfloat16"]
    np.testing.assert_array_equal(y, run(direction, x, w, config))


@pytest.mark.parametrize("direction", PASSES)
@pytest.mark.parametrize("permuted", [0, 4])
@pytest.mark.parametrize("format", ["nf4", "fp4", "int4"])
def test_formats(format, permuted, direction):
    x, w, expected = operands(direction, 256, 512, 768, format=format)
    y = run(direction, x, w, Config(permuted=permuted))
    assert relative_error(y, expected) < MATMUL_RELATIVE["bfloat16"]


@pytest.mark.parametrize("direction", PASSES)
@pytest.mark.parametrize(
    "m, n, k, options",
    [
        (1, 256, 256, {}),
        (77, 1000, 576, {}),
        (130, 456, 896, {"double_quant": False}),
        (64, 1024, 1024, {"block_size": 128}),
        (300, 1024, 1024, {"dtype": "float16"}),
        (2049, 4096, 1024, {}),  # more tiles than multiprocessors
    ],
)
def test_shapes(m, n, k, options, direction):
    x, w, expected = operands(direction, m, n, k, **options)
    y = run(direction, x, w)
    assert y.shape == expected.shape and y.dtype == x.dtype
    assert relative_error(y, expected) < MATMUL_RELATIVE[y.dtype.name]


# Tiles of 256 rows by 128 features, on 132 multiprocessors.
DIVIDED = {
    "two pieces each": (512, 4096),
    "four pieces each": (256, 4096),
    "end to end": (512, 5120),
    "four pieces each, after a round": (1024, 5120),
}


@pytest.mark.parametrize("direction", PASSES)
@pytest.mark.parametrize("m, width", DIVIDED.values(), ids=DIVIDED)
def test_divided_tiles(m, width, direction):
    x, w, expected = operands(direction, m, width, width)
    config = Config(divided=True)
    y = run(direction, x, w, config)
    assert relative_error(y, expected) < MATMUL_RELATIVE["bfloat16"]
    np.testing.assert_array_equal(y, run(direction, x, w, config))


def addend(x, features, rank):
    t, u = (
        jax.random.normal(jax.random.key(rows), (rows, rank)).astype(x.dtype)
        for rows in (x.shape[0], features)
    )
    return (t, u), np.asarray(t, np.float64) @ np.asarray(u, np.float64).T


@pytest.mark.parametrize("direction", PASSES)
@pytest.mark.parametrize(
    "m, rank, config",
    [
        (1000, 64, Config()),
        (1000, 16, Config()),
        (1000, 128, Config(cluster=2)),
        (1000, 256, Config()),
        (1000, 64, Config(tile_m=64, stages=8)),
        (1000, 64, Config(divided=True)),  # 40 tiles: two pieces each
        (512, 128, Config(tile_m=64, stages=8, divided=True)),  # 80: end to end
        (1408, 64, Config(tile_m=64, stages=8, divided=True)),  # 88 after a round
    ],
    ids=str,
)
def test_an_addend(m, rank, config, direction):
    x, w, expected = operands(direction, m, 1280, 1280)
    pair, added = addend(x, 1280, rank)
    y = run(direction, x, w, config, pair)
    assert relative_error(y, expected + added) < MATMUL_RELATIVE["bfloat16"]
    np.testing.assert_array_equal(y, run(direction, x, w, config, pair))


@pytest.mark.parametrize("direction", PASSES)
@pytest.mark.parametrize("rank", [64, 256])
@pytest.mark.parametrize("k", [128, 320])
def test_an_addend_of_a_short_contraction(k, rank, direction):
    shape = (256, k) if direction == "forward" else (k, 256)
    x, w, expected = operands(direction, 300, *shape)
    pair, added = addend(x, 256, rank)
    y = run(direction, x, w, Config(), pair)
    assert relative_error(y, expected + added) < MATMUL_RELATIVE["bfloat16"]


@pytest.mark.parametrize("direction", PASSES)
@pytest.mark.parametrize("rank", [None, 64])
@pytest.mark.parametrize(
    "m, width, config, dtype",
    [
        (1024, 1536, Config(), "bfloat16"),  # tiles end where results do
        (1000, 1280, Config(), "bfloat16"),
        (1001, 1344, Config(cluster=2), "float16"),  # 10.5 tiles of features
        (600, 1280, Config(tile_m=192, stages=5), "bfloat16"),
        (1000, 1280, Config(tile_m=64, stages=8), "bfloat16"),
        (2049, 4096, None, "bfloat16"),  # more tiles than multiprocessors
        (1000, 1280, Config(divided=True), "bfloat16"),  # two pieces each
        (512, 5120, Config(divided=True), "float16"),  # end to end
        (1408, 1280, Config(tile_m=64, stages=8, divided=True), "bfloat16"),
    ],
    ids=str,
)
def test_what_results_are_added_to(m, width, config, dtype, rank, direction):
    x, w, expected = operands(direction, m, width, width, dtype)
    onto = jax.random.normal(jax.random.key(7), (m, width), x.dtype)
    expected = expected + np.asarray(onto, np.float64)
    pair = None
    if rank:
        pair, added = addend(x, width, rank)
        expected += added
    y = run(direction, x, w, config, pair, onto)
    assert y.shape == expected.shape and y.dtype == x.dtype
    assert relative_error(y, expected) < MATMUL_RELATIVE[dtype]
    np.testing.assert_array_equal(y, run(direction, x, w, config, pair, onto))


@pytest.mark.parametrize("direction", PASSES)
def test_layers_of_a_stack_under_scan(direction):
    k = n = 1024
    stack = quantize(jax.random.normal(jax.random.key(0), (3, k, n)) / k**0.5)
    x = jax.random.normal(jax.random.key(1), (256, k), jnp.bfloat16)
    f = PASSES[direction]

    @jax.jit
    def by_index(x, stack):
        def body(x, i):
            w = stack.at_layer(i)
            return f(x, w.packed, w.spec), None

        return jax.lax.scan(body, x, jnp.arange(3))[0]

    y = x
    for i in range(3):
        w = jax.tree.map(lambda leaf, i=i: leaf[i], stack)
        y = f(y, w.packed, w.spec)
    np.testing.assert_array_equal(by_index(x, stack), y)

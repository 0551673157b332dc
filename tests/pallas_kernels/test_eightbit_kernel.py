"""The step of 8-bit Adam and Lion: bit for bit on numpy, and lowered for CUDA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import eightbit_body as body
from pallas_kernels import eightbit_kernel as kernels
from pallas_kernels import tuning, words
from qlora_jax.quant.formats import dynamic_map
from tests.pallas_kernels.emulator import Emulator

BLOCK = 256
SIGNED, UNSIGNED = dynamic_map(True), dynamic_map(False)
DTYPES = [jnp.bfloat16, jnp.float16, jnp.float32]
ADAM = [0.9, 0.1, 0.999, 0.001, 1 / 0.271, 1 / 0.003, 1e-8]
LION = [0.9, 0.1, 0.99, 0.01]


def nearest(x, codebook):
    """The nearest code, the lower of two, and no negative number at that of zero."""
    table = np.asarray(codebook, np.float32)
    codes = np.searchsorted((table[1:] + table[:-1]) / np.float32(2), x, side="left")
    return np.where((x < 0) & (table[codes] == 0), codes - 1, codes)


def encode(x, codebook):
    blocks = np.pad(x, (0, -x.size % BLOCK)).reshape(-1, BLOCK)
    absmax = np.abs(blocks).max(1)
    empty = (absmax < np.float32(1e-38))[:, None]
    inverse = np.float32(1) / np.where(empty, np.float32(1), absmax[:, None])
    codes = nearest(np.where(empty, np.float32(0), blocks * inverse), codebook)
    return codes.reshape(-1)[: x.size].astype(np.uint8), absmax


def decode(codes, absmax, codebook):
    return (
        np.asarray(codebook, np.float32)[codes] * np.repeat(absmax, BLOCK)[: codes.size]
    )


def fused(a, b, c):
    """a * b + c, rounded once."""
    return (np.asarray(a, np.float64) * b + c).astype(np.float32)


def adam_by_rule(g, moments, factors=ADAM):
    b1, w1, b2, w2, inverse1, inverse2, eps = map(np.float32, factors)
    finite = np.isfinite(g)
    with np.errstate(all="ignore"):
        m = fused(b1, decode(*moments[0], SIGNED), w1 * g)
        v = fused(b2, decode(*moments[1], UNSIGNED), w2 * g * g)
        m, v = np.where(finite, m, np.float32(0)), np.where(finite, v, np.float32(0))
        update = m * inverse1 * (np.float32(1) / (np.sqrt(v * inverse2) + eps))
    return update, [encode(m, SIGNED), encode(v, UNSIGNED)]


def lion_by_rule(g, moments, factors=LION):
    b1, w1, b2, w2 = map(np.float32, factors)
    finite = np.isfinite(g)
    m = decode(*moments[0], SIGNED)
    with np.errstate(all="ignore"):
        update = np.where(finite, np.sign(fused(b1, m, w1 * g)), np.float32(0))
        m = np.where(finite, fused(b2, m, w2 * g), np.float32(0))
    return update, [encode(m, SIGNED)]


RULES = {
    "adam": (body.Adam, adam_by_rule, ADAM, (SIGNED, UNSIGNED)),
    "lion": (body.Lion, lion_by_rule, LION, (SIGNED,)),
}


def gradients_with_edges(rng, size, dtype):
    """Wide magnitudes, a block of zeros, one tiny, and numbers that are none."""
    g = rng.normal(size=size) * 10.0 ** rng.uniform(-4, 1, size)
    g[BLOCK : 2 * BLOCK] = 0.0
    g[2 * BLOCK : 3 * BLOCK] *= 1e-17  # its second moment nears float32's end
    g[[3, 300, 900, 901]] = np.nan, np.inf, -np.inf, np.nan
    g[[4, 5]] = 0.0, -0.0
    return g.astype(dtype)


def zeros(size, books):
    blocks = -(-size // BLOCK)
    return [
        (np.full(size, nearest(0.0, book), np.uint8), np.zeros(blocks, np.float32))
        for book in books
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", RULES)
def test_steps_equal_the_rule(name, dtype, monkeypatch):
    emitter, rule, factors, books = RULES[name]
    size = 256 * 9 + 100  # a ragged last block
    rng = np.random.default_rng(0)
    moments = expected = zeros(size, books)
    monkeypatch.setattr(body, "THREADS", 128)  # four warps, five blocks each
    for step in range(3):
        g = gradients_with_edges(rng, size, dtype)
        if step == 2:  # a block that was empty fills, the last, ragged one empties
            g[BLOCK : 2 * BLOCK] = 1.0
            g[-100:] = np.nan
        refs = {
            "g": g,
            "factors": np.asarray(factors, np.float32),
            "table": body.table_operand(books),
            "update": np.full(size, 7, dtype),
        }
        for i, (codes, absmax) in enumerate(moments):
            refs |= {f"codes{i}": codes.copy(), f"absmax{i}": absmax.copy()}
        bytes_of_smem = body.smem_bytes(books)
        buffers = {}
        for block in range(2):
            # Both blocks write into the same arrays, as on the device.
            emulator = Emulator(128, block, {"smem": bytes_of_smem, **refs})
            monkeypatch.setattr(body, "emit", emulator)
            monkeypatch.setattr(words, "emit", emulator)
            emitter(books, size, dtype, 2, emulator.refs).build()
            buffers = emulator.refs
        update, expected = rule(g.astype(np.float32), moments)
        moments = [
            (buffers[f"codes{i}"].bytes, buffers[f"absmax{i}"].bytes.view(np.float32))
            for i in range(len(books))
        ]
        found = buffers["update"].bytes.view(dtype)
        np.testing.assert_array_equal(found, update.astype(dtype))
        for one, other in zip(moments, expected, strict=True):
            np.testing.assert_array_equal(one[1], other[1])
            np.testing.assert_array_equal(one[0], other[0])


@pytest.mark.parametrize("codebook", [SIGNED, UNSIGNED], ids=["signed", "unsigned"])
def test_the_table_of_codes_decides_every_edge(codebook):
    """At each limit between codes, at its float neighbours, and in between."""
    table = body.code_table(codebook)
    values = np.asarray(codebook, np.float32)
    middles = (values[1:] + values[:-1]) / np.float32(2)
    spread = 10 ** np.random.default_rng(0).uniform(-9, 0, 20_000)
    x = np.concatenate(
        [
            values,
            middles,
            np.nextafter(middles, np.float32(-2)),
            np.nextafter(middles, np.float32(2)),
            spread,
            -spread,
            [0.0, -0.0],
        ]
    ).astype(np.float32)
    x = x if table.signed else np.abs(x)
    smallest = np.uint32(table.base).view(np.float32)
    bits = np.maximum(np.abs(x), smallest).view(np.uint32)
    interval = (bits >> table.shift) - (table.base >> table.shift)
    negative = x < 0
    entry = table.entries[interval + negative * table.intervals]
    above = (bits << np.uint32(32 - table.shift)) > entry
    codes = (entry & 255) + above * np.where(negative, -1, 1)
    np.testing.assert_array_equal(codes, nearest(x, codebook))


def test_codes_too_near_for_the_table_are_refused():
    near = 0.5 + np.arange(255) * 2.0**-24
    with pytest.raises(NotImplementedError, match=r"nearer than 2\*\*-15"):
        body.code_table((0.0, *map(float, near)))


def arguments(name, shape=(64, 130), dtype=jnp.float32):
    """Shapes of a call: gradient, factors, moments."""
    *_, factors, books = RULES[name]
    g = jax.ShapeDtypeStruct(shape, dtype)
    moment = (
        jax.ShapeDtypeStruct(shape, jnp.uint8),
        jax.ShapeDtypeStruct((-(-g.size // BLOCK),), jnp.float32),
    )
    return g, jax.ShapeDtypeStruct((len(factors),), jnp.float32), [moment] * len(books)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", RULES)
def test_both_lower_for_cuda_and_write_in_place(name, dtype):
    books = RULES[name][-1]
    step = jax.jit(lambda *args: getattr(kernels, name)(*args, books))
    traced = step.trace(*arguments(name, dtype=dtype))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 1
    assert text.count("#stablehlo.output_operand_alias<") == 2 * len(books)
    # Without them XLA would have the kernel read a slice of a stack where it lies.
    assert text.count("stablehlo.optimization_barrier") == 2


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize(
    "shape, dtype, message",
    [
        ((41, 101), jnp.float32, r"g.size=4141 must be a multiple of 4"),
        ((0,), jnp.float32, r"g.size=0 must be a multiple of 4"),
        ((64, 64), jnp.int32, r"must be bfloat16, float16 or float32"),
    ],
)
def test_what_it_cannot_is_said(name, shape, dtype, message):
    books = RULES[name][-1]
    with pytest.raises(NotImplementedError, match=message):
        getattr(kernels, name)(*arguments(name, shape, dtype), books)


def test_scales_of_other_blocks_are_refused():
    g, factors, [(codes, _)] = arguments("lion")
    absmax = jax.ShapeDtypeStruct((65,), jnp.float32)  # of blocks of 128
    with pytest.raises(NotImplementedError, match=r"must be \(64, 130\) and \(33,\)"):
        kernels.lion(g, factors, [(codes, absmax)], (SIGNED,))


def test_an_old_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(tuning, "compute_capability", lambda: 8.9)
    with pytest.raises(
        NotImplementedError, match=r"capability=8\.9: it was run from 9\.0 on only"
    ):
        kernels.lion(*arguments("lion"), (SIGNED,))

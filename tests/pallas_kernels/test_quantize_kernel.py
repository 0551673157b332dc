"""The quantize and dequantize kernels: bit for bit on numpy, and lowered for CUDA."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import quantize_kernel as kernels
from pallas_kernels.packed import PackedSpec, PackedWeight
from qlora_jax.quant import FORMATS
from tests.pallas_kernels.emulator import Emulator

NF4 = FORMATS["nf4"].codebook
_FP4 = (0.0, 0.0625 / 12, 8 / 12, 1.0, 4 / 12, 6 / 12, 2 / 12, 3 / 12)
FP4 = (*_FP4, *(-x for x in _FP4))
INT4 = tuple(i / 8 for i in range(-8, 8))  # midpoints on the edges of intervals
CODEBOOKS = {"nf4": NF4, "fp4": FP4, "int4": INT4}
NESTED = tuple(float(v) for v in np.linspace(-1, 1, 256, dtype=np.float32))
DTYPES = [jnp.bfloat16, jnp.float16, jnp.float32]


def quantize_by_rule(w, spec):
    """The definition: float32 reciprocal, product, midpoints, ties to the lower."""
    first = {}
    for code, number in enumerate(spec.codebook):
        first.setdefault(number + 0.0, code)
    ascending = sorted(first)
    values = np.asarray(ascending, np.float32)
    midpoints = (values[1:] + values[:-1]) / np.float32(2)
    blocks = w.astype(np.float32).reshape(-1, spec.block_size)
    absmax = np.abs(blocks).max(axis=1)
    is_zero = absmax < 2.0**-126
    inverse = np.float32(1) / np.where(is_zero, np.float32(1), absmax)
    inverse = np.where(is_zero, np.float32(0), inverse)
    rank = np.searchsorted(midpoints, blocks * inverse[:, None], side="left")
    codes = np.asarray([first[v] for v in ascending], np.uint8)[rank]
    codes = codes.reshape(spec.n, spec.k)
    return codes[:, 0::2] << 4 | codes[:, 1::2], absmax


def dequantize_by_rule(packed, spec, dtype):
    """The definition: two roundings of a scale, one of the product, one to `dtype`."""
    scales = packed.absmax.reshape(-1)
    if spec.nested_codebook is not None:
        nested = np.repeat(packed.nested_absmax, spec.nested_block_size)[: scales.size]
        product = np.asarray(spec.nested_codebook, np.float32)[scales] * nested
        scales = product + packed.offset
    codes = np.stack([packed.codes >> 4, packed.codes & 15], -1).reshape(-1)
    numbers = np.asarray(spec.codebook, np.float32)[codes]
    numbers = numbers.reshape(-1, spec.block_size) * scales[:, None]
    return numbers.reshape(spec.n, spec.k).astype(dtype)


@pytest.fixture
def run(monkeypatch):
    """Runs an emitter over a grid of two blocks on numpy; returns its buffers."""
    monkeypatch.setattr(kernels, "_BLOCKS_OF_THREADS", 2)

    def run(emitter, refs, smem_bytes):
        for block in range(2):
            emulator = Emulator(256, block, {"smem": smem_bytes, **refs})
            monkeypatch.setattr(kernels, "emit", emulator)
            emitter(emulator.refs).build()
        return emulator.refs

    return run


def weight_with_edges(rng, n, k, dtype):
    """Random numbers, all-zero blocks, both zeros, and many exact ties."""
    w = rng.normal(size=(n, k)).astype(np.float32)
    w[0, :64] = 0.0
    w[1, :64] = -0.0
    w[2, 5] = -0.0
    w[3] = rng.integers(-24, 25, k) / 24  # fp4's midpoints among them
    w[4] = rng.integers(-16, 17, k) / 16  # int4's
    return w.astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CODEBOOKS)
def test_quantize_equals_the_rule(run, name, dtype):
    spec = PackedSpec(CODEBOOKS[name], 8, 512)
    w = weight_with_edges(np.random.default_rng(0), spec.n, spec.k, dtype)
    codes = np.full((spec.n, spec.k // 2), 0xAA, np.uint8)
    absmax = np.full(spec.num_blocks, np.nan, np.float32)
    refs = {
        "w": w,
        "table": kernels._interval_table(spec.codebook),
        "codes": codes,
        "absmax": absmax,
    }
    emitter = lambda refs: kernels._Quantize(spec, dtype, refs)
    out = run(emitter, refs, kernels._TABLE_ROWS * 128)
    expected_codes, expected_absmax = quantize_by_rule(w, spec)
    np.testing.assert_array_equal(
        out["codes"].bytes.reshape(codes.shape), expected_codes
    )
    np.testing.assert_array_equal(out["absmax"].bytes.view(np.float32), expected_absmax)


@pytest.mark.parametrize("block_size", [8, 32, 128, 256])
def test_blocks_of_other_sizes_quantize(run, block_size):
    spec = PackedSpec(NF4, 4, 512, block_size)
    w = np.random.default_rng(0).normal(size=(4, 512)).astype(np.float32)
    refs = {
        "w": w,
        "table": kernels._interval_table(NF4),
        "codes": np.zeros((4, 256), np.uint8),
        "absmax": np.zeros(spec.num_blocks, np.float32),
    }
    emitter = lambda refs: kernels._Quantize(spec, jnp.float32, refs)
    out = run(emitter, refs, kernels._TABLE_ROWS * 128)
    codes, absmax = quantize_by_rule(w, spec)
    np.testing.assert_array_equal(out["codes"].bytes.reshape(4, 256), codes)
    np.testing.assert_array_equal(out["absmax"].bytes.view(np.float32), absmax)


def test_a_block_of_zeros_gets_the_code_of_zero(run):
    spec = PackedSpec(NF4, 1, 64)
    refs = {
        "w": np.zeros((1, 64), np.float32),
        "table": kernels._interval_table(NF4),
        "codes": np.zeros((1, 32), np.uint8),
        "absmax": np.ones(1, np.float32),
    }
    emitter = lambda refs: kernels._Quantize(spec, jnp.float32, refs)
    out = run(emitter, refs, kernels._TABLE_ROWS * 128)
    assert set(out["codes"].bytes.tolist()) == {0x77}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size, nested", [(64, True), (32, True), (128, False)])
def test_dequantize_equals_the_rule(run, block_size, nested, dtype):
    rng = np.random.default_rng(1)
    n, k, layers = 6, 256, 2
    blocks = n * k // block_size
    spec = PackedSpec(FP4, n, k, block_size, NESTED if nested else None, 8)
    codes = rng.integers(0, 256, (layers, n, k // 2), dtype=np.uint8)
    table = np.asarray(FP4, np.float32)
    if nested:
        packed = PackedWeight(
            codes,
            rng.integers(0, 256, (layers, blocks), dtype=np.uint8),
            rng.uniform(0.1, 0.2, (layers, -(-blocks // 8))).astype(np.float32),
            rng.uniform(0.5, 0.6, layers).astype(np.float32),
        )
        table = np.concatenate([table, np.asarray(NESTED, np.float32)])
    else:
        packed = PackedWeight(codes, rng.uniform(size=(layers, blocks)).astype("f4"))
    leaves = {f.name: getattr(packed, f.name) for f in dataclasses.fields(packed)}
    refs = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    refs |= {"table": table, "layer": np.asarray([1], np.int32)}
    refs["y"] = np.full((n, k), np.nan, dtype)
    emitter = lambda refs: kernels._Dequantize(spec, jnp.dtype(dtype), refs)
    out = run(emitter, refs, 16 * 128 + 1024)
    expected = dequantize_by_rule(jax.tree.map(lambda a: a[1], packed), spec, dtype)
    assert out["y"].bytes.tobytes() == expected.tobytes()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_both_lower_for_cuda(dtype):
    n, k = 4096, 1024
    spec = PackedSpec(NF4, n, k, 64, NESTED)
    packed = PackedWeight(
        jax.ShapeDtypeStruct((n, k // 2), jnp.uint8),
        jax.ShapeDtypeStruct((n, k // 64), jnp.uint8),
        jax.ShapeDtypeStruct((n * k // 64 // 256,), jnp.float32),
        jax.ShapeDtypeStruct((), jnp.float32),
    )
    dequantize = jax.jit(lambda p: kernels.dequantize(p, spec, dtype)).trace(packed)
    w = jax.ShapeDtypeStruct((n, k), dtype)
    quantize = jax.jit(lambda w: kernels.quantize(w, spec)).trace(w)
    for traced in (dequantize, quantize):
        assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_the_interval_table_decides_every_edge():
    """At each midpoint and the numbers next to it, for each codebook."""
    for codebook in CODEBOOKS.values():
        table = kernels._interval_table(codebook)
        values = np.unique(np.asarray(codebook, np.float32) + np.float32(0))
        midpoints = (values[1:] + values[:-1]) / np.float32(2)
        x = np.concatenate(
            [
                midpoints,
                values,
                np.nextafter(midpoints, np.float32(-2)),
                np.nextafter(midpoints, np.float32(2)),
            ]
        )
        interval = np.floor(x.astype(np.float64) * 128 + 128).astype(int)
        above = x > table[interval, 0].view(np.float32)
        codes = np.where(above, table[interval, 1] >> 8, table[interval, 1] & 255)
        nearest = np.searchsorted(midpoints, x, side="left")
        np.testing.assert_array_equal(np.float32(codebook)[codes], values[nearest])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"k": 12}, "k=12 must be a multiple of 8"),
        ({"block_size": 48}, "block_size=48 must be a power of two"),
        ({"block_size": 512}, "block_size=512 must be at most 256"),
        ({"codebook": NESTED}, "codes of 8 bits must have 4"),
        ({"codebook": tuple(i / 1000 for i in range(16))}, "nearer than 0.0078125"),
    ],
)
def test_what_quantize_cannot_is_said(change, message):
    spec = dataclasses.replace(PackedSpec(NF4, 8, 512), **change)
    with pytest.raises(NotImplementedError, match=message):
        kernels.quantize(jnp.ones((spec.n, spec.k), jnp.bfloat16), spec)

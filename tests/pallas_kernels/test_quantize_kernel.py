"""The quantize and dequantize kernels: bit for bit on numpy, and lowered for CUDA."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import (
    dequantize_body,
    nearest,
    quantize_body,
    quantize_scales_body,
    stream,
    words,
)
from pallas_kernels import quantize_kernel as kernels
from pallas_kernels.packed import PackedSpec, PackedWeight
from qlora_jax.quant import FORMATS
from qlora_jax.quant.formats import DYNAMIC8
from tests.pallas_kernels.emulator import Emulator
from tests.tolerances import ULP_NESTED_OFFSET

NF4 = FORMATS["nf4"].codebook
_FP4 = (0.0, 0.0625 / 12, 8 / 12, 1.0, 4 / 12, 6 / 12, 2 / 12, 3 / 12)
FP4 = (*_FP4, *(-x for x in _FP4))
INT4 = tuple(i / 8 for i in range(-8, 8))  # midpoints on the edges of intervals
CODEBOOKS = {"nf4": NF4, "fp4": FP4, "int4": INT4}
NESTED = tuple(float(v) for v in np.linspace(-1, 1, 256, dtype=np.float32))
BODIES = (dequantize_body, quantize_body, quantize_scales_body, stream, words)
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


def quantize_scales_by_rule(absmax, offset, spec):
    """The definition: what is left of the offset, by blocks, nearest codes."""
    numbers = np.asarray(spec.nested_codebook, np.float32)
    midpoints = (numbers[1:] + numbers[:-1]) / np.float32(2)
    blocks = absmax - offset
    blocks = np.pad(blocks, (0, -absmax.size % spec.nested_block_size))
    blocks = blocks.reshape(-1, spec.nested_block_size)
    nested_absmax = np.abs(blocks).max(axis=1)
    inverse = np.float32(1) / nested_absmax
    codes = np.searchsorted(midpoints, blocks * inverse[:, None], side="left")
    return codes.astype(np.uint8).reshape(-1)[: absmax.size], nested_absmax


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
    monkeypatch.setattr(dequantize_body, "BLOCKS_OF_THREADS", 2)
    monkeypatch.setattr(quantize_body, "BLOCKS_OF_THREADS", 2)

    def run(emitter, refs, smem_bytes, threads=256):
        for block in range(2):
            emulator = Emulator(threads, block, {"smem": smem_bytes, **refs})
            for module in BODIES:
                monkeypatch.setattr(module, "emit", emulator)
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
        "table": nearest.even_cells(spec.codebook),
        "codes": codes,
        "absmax": absmax,
    }
    emitter = lambda refs: quantize_body.Quantize(spec, dtype, refs)
    out = run(emitter, refs, quantize_body.smem_bytes(), quantize_body.THREADS)
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
        "table": nearest.even_cells(NF4),
        "codes": np.zeros((4, 256), np.uint8),
        "absmax": np.zeros(spec.num_blocks, np.float32),
    }
    emitter = lambda refs: quantize_body.Quantize(spec, jnp.float32, refs)
    out = run(emitter, refs, quantize_body.smem_bytes(), quantize_body.THREADS)
    codes, absmax = quantize_by_rule(w, spec)
    np.testing.assert_array_equal(out["codes"].bytes.reshape(4, 256), codes)
    np.testing.assert_array_equal(out["absmax"].bytes.view(np.float32), absmax)


# A midpoint a little below the edge of a cell, 1 / 128.
_LOW = (-1.0, -0.9, -0.75, -0.6, -0.5, -0.4, -0.3, -0.2, 0.0)
NEAR_EDGE = (*_LOW, 2.0**-6 - 2.0**-16, 0.2, 0.3, 0.45, 0.6, 0.8, 1.0)


@pytest.mark.parametrize("codebook", [*CODEBOOKS.values(), NEAR_EDGE])
def test_numbers_next_to_midpoints(run, codebook):
    """Each midpoint and the float32 numbers on both sides, at an absmax of 1."""
    midpoints, _ = nearest.neighbours(codebook)
    sides = [np.nextafter(midpoints, np.float32(to)) for to in (-2, 2)]
    w = np.concatenate([midpoints, *sides, np.zeros(1, np.float32)])
    w = np.pad(w, (0, 64 - w.size), constant_values=1).reshape(1, 64)
    spec = PackedSpec(codebook, 1, 64)
    refs = {
        "w": w,
        "table": nearest.even_cells(codebook),
        "codes": np.zeros((1, 32), np.uint8),
        "absmax": np.zeros(1, np.float32),
    }
    emitter = lambda refs: quantize_body.Quantize(spec, jnp.float32, refs)
    out = run(emitter, refs, quantize_body.smem_bytes(), quantize_body.THREADS)
    np.testing.assert_array_equal(
        out["codes"].bytes.reshape(1, 32), quantize_by_rule(w, spec)[0]
    )


def test_a_block_of_zeros_gets_the_code_of_zero(run):
    spec = PackedSpec(NF4, 1, 64)
    refs = {
        "w": np.zeros((1, 64), np.float32),
        "table": nearest.even_cells(NF4),
        "codes": np.zeros((1, 32), np.uint8),
        "absmax": np.ones(1, np.float32),
    }
    emitter = lambda refs: quantize_body.Quantize(spec, jnp.float32, refs)
    out = run(emitter, refs, quantize_body.smem_bytes(), quantize_body.THREADS)
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
    emitter = lambda refs: dequantize_body.Dequantize(spec, jnp.dtype(dtype), refs)
    out = run(emitter, refs, dequantize_body.smem_bytes(spec))
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


@pytest.mark.parametrize("num_blocks", [1024, 8 * 13])
def test_scales_are_quantized_by_the_rule(run, num_blocks):
    """Double quantization of a first pass' scales, whole blocks of 256 and not."""
    spec = PackedSpec(NF4, num_blocks // 8, 512, 64, DYNAMIC8.codebook)
    rng = np.random.default_rng(2)
    w = (rng.normal(size=(spec.n, spec.k)) * 0.02).astype(jnp.bfloat16)
    refs = {
        "w": w,
        "table": nearest.even_cells(NF4),
        "codes": np.zeros((spec.n, spec.k // 2), np.uint8),
        "absmax": np.full(spec.num_blocks, np.nan, np.float32),
        "sums": np.full(2, np.nan, np.float32),
    }
    emitter = lambda refs: quantize_body.Quantize(spec, jnp.bfloat16, refs)
    first = run(emitter, refs, quantize_body.smem_bytes(), quantize_body.THREADS)
    absmax, sums = (first[name].bytes.view(np.float32) for name in ("absmax", "sums"))
    _, expected_absmax = quantize_by_rule(w, spec)
    np.testing.assert_array_equal(absmax, expected_absmax)
    cells = nearest.float_cells(spec.nested_codebook)
    num_nested = quantize_scales_body.num_nested(spec)
    refs = {
        "absmax": absmax,
        "sums": sums,
        "table": cells.entries,
        "codes": np.full(spec.num_blocks, 0xAA, np.uint8),
        "nested_absmax": np.full(num_nested, np.nan, np.float32),
        "offset": np.full(1, np.nan, np.float32),
    }
    emitter = lambda refs: quantize_scales_body.QuantizeScales(spec, 2, refs)
    smem_bytes = quantize_scales_body.smem_bytes(cells)
    out = run(emitter, refs, smem_bytes, quantize_scales_body.THREADS)
    (offset,) = out["offset"].bytes.view(np.float32)
    exact = np.float32(absmax.astype(np.float64).mean())
    assert abs(offset - exact) <= ULP_NESTED_OFFSET * np.spacing(exact)
    q, nested_absmax = quantize_scales_by_rule(absmax, offset, spec)
    np.testing.assert_array_equal(out["codes"].bytes, q)
    np.testing.assert_array_equal(
        out["nested_absmax"].bytes.view(np.float32), nested_absmax
    )


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


def test_quantize_is_refused_where_its_instructions_are_not(monkeypatch):
    monkeypatch.setattr(kernels.tuning, "compute_capability", lambda: 8.0)
    with pytest.raises(NotImplementedError, match=r"capability=8\.0: max\.xorsign"):
        kernels.quantize(jnp.ones((8, 512), jnp.bfloat16), PackedSpec(NF4, 8, 512))


@pytest.mark.parametrize("nested_block_size, by_kernel", [(256, True), (128, False)])
def test_who_quantizes_the_scales(nested_block_size, by_kernel):
    """The second kernel, or the plain form, by the size of nested blocks."""
    spec = PackedSpec(NF4, 64, 512, 64, DYNAMIC8.codebook, nested_block_size)
    w = jax.ShapeDtypeStruct((64, 512), jnp.bfloat16)
    traced = jax.jit(lambda w: kernels.quantize(w, spec)).trace(w)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert ("quantize_scales" in text) == by_kernel
    q, nested_absmax = traced.out_info.absmax, traced.out_info.nested_absmax
    assert (q.shape, q.dtype) == ((64, 8), jnp.uint8)
    assert nested_absmax.shape == (512 // nested_block_size,)
    assert traced.out_info.offset.shape == ()

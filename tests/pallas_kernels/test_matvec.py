"""The decoding kernel: computed on numpy, and lowered for CUDA, without a GPU."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import emit, matvec, matvec_body, matvec_slices
from pallas_kernels.matvec_plan import TABLE_BYTES, Tile
from pallas_kernels.matvec_slices_plan import SlicePlan, Slices
from pallas_kernels.packed import PackedSpec, PackedWeight
from tests.pallas_kernels.emulator import Emulator
from tests.tolerances import MATMUL_RELATIVE

CODEBOOK = tuple(float(v) for v in np.linspace(-1, 1, 16))
NESTED = tuple(float(v) for v in np.linspace(-1, 1, 256, dtype=np.float32))


def make_weight(n, k, block_size=64, nested=True, layers=None, nested_block_size=256):
    rng = np.random.default_rng(n + k)
    stack = () if layers is None else (layers,)
    blocks = -(-n * k // block_size)
    codes = rng.integers(0, 256, (*stack, n, k // 2), dtype=np.uint8)
    spec = PackedSpec(CODEBOOK, n, k, block_size)
    if not nested:
        absmax = rng.uniform(0.5, 1.0, (*stack, blocks)).astype(np.float32)
        return PackedWeight(codes, absmax), spec
    spec = dataclasses.replace(
        spec, nested_codebook=NESTED, nested_block_size=nested_block_size
    )
    absmax = rng.integers(0, 256, (*stack, blocks), dtype=np.uint8)
    size = -(-blocks // nested_block_size)
    nested_absmax = rng.uniform(0.1, 0.2, (*stack, size)).astype(np.float32)
    offset = rng.uniform(0.5, 0.6, stack).astype(np.float32)
    return PackedWeight(codes, absmax, nested_absmax, offset), spec


def decoded(packed, spec):
    """The weight in float64."""
    pairs = np.stack([packed.codes >> 4, packed.codes & 15], -1).reshape(-1)
    numbers = np.asarray(spec.codebook, np.float64)[pairs]
    scales = packed.absmax
    if spec.nested_codebook is not None:
        nested = np.repeat(packed.nested_absmax, spec.nested_block_size)
        numbers_of_scales = np.asarray(spec.nested_codebook, np.float64)
        scales = numbers_of_scales[scales] * nested[: scales.size] + packed.offset
    return (numbers * np.repeat(scales, spec.block_size)).reshape(spec.n, spec.k)


def emulate(monkeypatch, x, packed, spec, tile=None, grid=None, lazy=False):
    """`matvec.matmul` block by block on numpy."""
    plan = matvec.make_plan(x.shape[0], x.dtype, packed, spec, tile)
    if grid is not None:
        plan = dataclasses.replace(plan, grid=grid)
    y = np.full((plan.m, plan.n), np.nan, x.dtype)
    operands = {
        "x": x,
        "codes": packed.codes,
        "absmax": packed.absmax,
        "table": matvec.lookup_table(spec, x.dtype),
        "nested_absmax": packed.nested_absmax,
        "offset": packed.offset,
        "layer": packed.layer,
    }
    operands = {k: np.array(v) for k, v in operands.items() if v is not None}
    module: Any = matvec_slices if isinstance(plan, SlicePlan) else matvec_body
    for block in range(plan.grid):
        emulator = Emulator(
            plan.threads,
            block,
            {
                "table_smem": TABLE_BYTES,
                "ring": plan.ring_bytes,
                "smem": plan.smem_offsets["end"],
                **operands,
                "y": y,
            },
            lazy,
        )
        monkeypatch.setattr(module, "emit", emulator)
        monkeypatch.setattr(emit, "ptx", emulator.ptx)
        module.Body(plan, None, emulator.refs).run()
        y = emulator.refs["y"].bytes.view(x.dtype).reshape(y.shape)
    return y


def relative_error(y, expected):
    y = np.asarray(y, np.float64)
    return np.linalg.norm(y - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize(
    "m, n, k, tile",
    [
        (1, 64, 512, Tile(2, 1, 4, 2)),
        (2, 32, 1024, Tile(1, 2, 2, 3)),
        (3, 48, 512, Tile(2, 2, 2, 2)),
        (8, 32, 512, Tile(1, 1, 4, 2)),
        (9, 64, 1024, Tile(2, 2, 2, 2, phases=2)),
        (17, 32, 512, Tile(1, 2, 2, 2, phases=2)),
        (2, 192, 1280, Tile(1, 4, 1, 2)),  # rings wrap, within a tile and across
        (9, 160, 1280, Tile(1, 2, 2, 3, phases=3)),
        (5, 72, 320, None),  # the last rows and the last columns fill no tile
        (1, 96, 1024, Slices(4, 1, 1, 2)),
        (1, 96, 1024, Slices(4, 1, 2, 4)),
        (2, 80, 1024, Slices(4, 1, 1, 1)),
        (3, 64, 2048, Slices(4, 2, 2, 2)),
        (4, 48, 1536, Slices(3, 2, 3, 4)),  # a warp that idles
        (8, 96, 1280, Slices(3, 2, 2, 1)),  # a slice past the last column
        (5, 40, 1024, Slices(4, 1, 2, 2)),  # rows that fill no group
        (16, 64, 2048, Slices(4, 2, 2, 1)),
        (11, 160, 1024, Slices(4, 1, 2, 2)),
        (9, 48, 1024, Slices(2, 2, 1, 1)),  # blocks of threads with 1 and 2 batches
    ],
)
@pytest.mark.parametrize("lazy", [False, True], ids=["eager", "lazy"])
def test_every_number_is_computed(monkeypatch, m, n, k, tile, lazy):
    packed, spec = make_weight(n, k)
    x = np.random.default_rng(m).normal(size=(m, k)).astype(jnp.bfloat16)
    y = emulate(monkeypatch, x, packed, spec, tile, 2, lazy)
    expected = x.astype(np.float64) @ decoded(packed, spec).T
    assert relative_error(y, expected) <= MATMUL_RELATIVE["bfloat16"]


@pytest.mark.parametrize(
    "block_size, nested, tile",
    [
        (64, False, Tile(1, 1, 4)),
        (128, True, Tile(1, 1, 4)),
        (256, False, Tile(1, 1, 4)),
        (64, True, Slices(2)),
        (64, False, Slices(2)),
    ],
)
@pytest.mark.parametrize("m", [2, 5])
def test_every_kind_of_scale_is_read(monkeypatch, m, block_size, nested, tile):
    packed, spec = make_weight(32, 512, block_size, nested, nested_block_size=4)
    x = np.random.default_rng(0).normal(size=(m, 512)).astype(np.float16)
    y = emulate(monkeypatch, x, packed, spec, tile, grid=1)
    expected = x.astype(np.float64) @ decoded(packed, spec).T
    assert relative_error(y, expected) <= MATMUL_RELATIVE["float16"]


@pytest.mark.parametrize("tile", [Tile(1, 1, 4), Slices(2)], ids=str)
def test_a_layer_of_a_stack_is_read_in_place(monkeypatch, tile):
    packed, spec = make_weight(32, 512, layers=3)
    x = np.random.default_rng(0).normal(size=(1, 512)).astype(jnp.bfloat16)
    indexed = dataclasses.replace(packed, layer=np.asarray([2], np.int32))
    y = emulate(monkeypatch, x, indexed, spec, tile, grid=2)
    one = jax.tree.map(lambda leaf: leaf[2], packed)
    expected = x.astype(np.float64) @ decoded(one, spec).T
    assert relative_error(y, expected) <= MATMUL_RELATIVE["bfloat16"]


@pytest.mark.parametrize("m", [1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize(
    "n, k",
    [
        (4096, 4096),
        (14336, 4096),
        (4096, 14336),
        (5120, 13824),
        (28672, 8192),
        (8192, 28672),
        (1000, 1088),
    ],
)
def test_lowers_for_cuda(m, n, k):
    packed, spec = make_weight(16, 64)
    blocks = n * k // 64

    def like(leaf, *shape):
        return jax.ShapeDtypeStruct(shape, leaf.dtype)

    packed = PackedWeight(
        like(packed.codes, n, k // 2),
        like(packed.absmax, n, k // 64),
        like(packed.nested_absmax, -(-blocks // 256)),
        like(packed.offset),
    )
    spec = dataclasses.replace(spec, n=n, k=k)
    x = jax.ShapeDtypeStruct((m, k), jnp.bfloat16)
    traced = jax.jit(lambda x, packed: matvec.matmul(x, packed, spec)).trace(x, packed)
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_lookup_table_has_the_even_column_low():
    _, spec = make_weight(16, 64)
    table = matvec.lookup_table(spec, jnp.bfloat16)
    pairs = table[:256].view(np.uint16).view(jnp.bfloat16).reshape(256, 2)
    numbers = np.asarray(CODEBOOK, np.float32).astype(jnp.bfloat16)
    np.testing.assert_array_equal(pairs[0x3C], numbers[[3, 12]])
    np.testing.assert_array_equal(table[256:].view(np.float32), np.float32(NESTED))


@pytest.mark.parametrize(
    "m, change, message",
    [
        (33, {}, "m=33 rows of x must be 1 to 32"),
        (1, {"k": 96}, "k=96 must be a multiple of 64"),
        (1, {"block_size": 32}, "block_size=32 must be a power of two from 64"),
        (1, {"codebook": NESTED}, "codes of 8 bits must have 4"),
    ],
)
def test_what_it_cannot_is_said(m, change, message):
    packed, spec = make_weight(16, 64)
    spec = dataclasses.replace(spec, **change)
    with pytest.raises(NotImplementedError, match=message):
        matvec.matmul(jnp.ones((m, spec.k), jnp.bfloat16), packed, spec)


def test_a_tile_has_whole_warpgroups():
    with pytest.raises(ValueError, match="must have 4, 8, 12 or 16 warps"):
        Tile(2, 1, 5)


@pytest.mark.parametrize("phases", [1, 3])
def test_slices_have_phases_for_all_columns(phases):
    packed, spec = make_weight(16, 2048)
    with pytest.raises(ValueError, match="must have phases=2 for k=2048"):
        matvec.make_plan(1, jnp.bfloat16, packed, spec, Slices(4, phases))

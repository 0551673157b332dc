"""The kernel for tens of rows: computed on numpy, and lowered for CUDA."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import (
    emit,
    skinny,
    skinny_body,
    skinny_copies,
    skinny_operand,
    skinny_parts,
    skinny_thread,
)
from pallas_kernels.matvec_plan import TABLE_BYTES
from pallas_kernels.packed import PackedWeight
from pallas_kernels.skinny_plan import Cut
from tests.pallas_kernels.emulator import Emulator
from tests.pallas_kernels.test_matvec import (
    NESTED,
    decoded,
    make_weight,
    relative_error,
)
from tests.tolerances import MATMUL_RELATIVE

MODULES = skinny_body, skinny_copies, skinny_operand, skinny_parts, skinny_thread


class Announcing(Emulator):
    """An emulator in which nothing is announced before it is there."""

    def _reduce(self, operands, mask, read):
        super()._reduce(operands, mask, read)
        parts = self.refs["parts"]
        part = parts.bytes.view(np.float32).reshape(parts.shape)[self.block]
        assert not np.isnan(part).any(), "a part that has not been left"


def emulate(monkeypatch, x, packed, spec, cut=None, grid=2, lazy=False):
    """`skinny.matmul` block by block on numpy: who leaves parts before who collects."""
    plan = skinny.make_plan(x.shape[0], x.dtype, packed, spec, cut)
    plan = dataclasses.replace(plan, grid=min(grid, plan.units))
    memory = {
        "x": x,
        "codes": packed.codes,
        "absmax": packed.absmax,
        "counters": np.zeros(plan.num_counters, np.int32),
        "nested_absmax": packed.nested_absmax,
        "nested_codebook": spec.nested_codebook,
        "offset": packed.offset,
        "layer": packed.layer,
        "y": np.full((plan.m, plan.n), np.nan, x.dtype),
        "parts": np.full((plan.grid, plan.part_floats), np.nan, np.float32),
    }
    memory = {k: np.array(v) for k, v in memory.items() if v is not None}
    if "nested_codebook" in memory:
        memory["nested_codebook"] = memory["nested_codebook"].astype(np.float32)
    shared = {"smem": plan.smem_offsets["end"], "table_smem": TABLE_BYTES}
    for block in reversed(range(plan.grid)):
        emulator = Announcing(plan.cut.threads, block, {**shared, **memory}, lazy)
        for module in MODULES:
            monkeypatch.setattr(module, "emit", emulator)
        monkeypatch.setattr(emit, "ptx", emulator.ptx)
        skinny_body.Body(plan, None, emulator.refs).run()
        for name in ("y", "parts", "counters"):
            octets = emulator.refs[name].bytes
            memory[name] = octets.view(memory[name].dtype).reshape(memory[name].shape)
    assert not memory["counters"].any()
    return memory["y"]


@pytest.mark.parametrize(
    "m, n, k, cut, grid",
    [
        (17, 64, 512, Cut(2, 3, 2), 1),
        (5, 192, 768, Cut(2, 4, 2), 3),  # runs that begin and end inside of tiles
        (33, 256, 1088, Cut(2, 3, 3), 5),  # tiles of several runs, a short chunk
        (64, 80, 512, Cut(2, 4, 2), 2),  # the last rows fill no tile
        (100, 64, 320, Cut(2, 3, 2), 1),
        (24, 320, 1024, Cut(4, 6, 2), 3),
        (40, 192, 1024, Cut(2, 3, 2, lead=3), 3),
        (16, 200, 2048, Cut(2, 3, 2), 5),  # scales of several units at once
        (8, 64, 4096, Cut(2, 3, 2), 1),  # and several times
        (72, 128, 1024, Cut(2, 3, 2), 4),  # parts that are not read ahead
        (104, 128, 1024, Cut(2, 3, 3), 4),  # nor fetched: there is no room
    ],
)
@pytest.mark.parametrize("lazy", [False, True], ids=["eager", "lazy"])
def test_every_number_is_computed(monkeypatch, m, n, k, cut, grid, lazy):
    packed, spec = make_weight(n, k)
    x = np.random.default_rng(m).normal(size=(m, k)).astype(jnp.bfloat16)
    y = emulate(monkeypatch, x, packed, spec, cut, grid, lazy)
    expected = x.astype(np.float64) @ decoded(packed, spec).T
    assert relative_error(y, expected) <= MATMUL_RELATIVE["bfloat16"]


@pytest.mark.parametrize(
    "block_size, nested, dtype",
    [
        (64, True, np.float16),
        (64, False, np.float16),
        (128, True, jnp.bfloat16),
        (256, False, np.float16),
    ],
)
def test_every_kind_of_scale_is_read(monkeypatch, block_size, nested, dtype):
    packed, spec = make_weight(48, 512, block_size, nested, nested_block_size=12)
    x = np.random.default_rng(0).normal(size=(9, 512)).astype(dtype)
    y = emulate(monkeypatch, x, packed, spec, Cut(2, 3, 2), grid=2)
    expected = x.astype(np.float64) @ decoded(packed, spec).T
    assert relative_error(y, expected) <= MATMUL_RELATIVE[np.dtype(dtype).name]


def test_a_layer_of_a_stack_is_read_in_place(monkeypatch):
    packed, spec = make_weight(64, 512, layers=3)
    x = np.random.default_rng(0).normal(size=(8, 512)).astype(jnp.bfloat16)
    indexed = dataclasses.replace(packed, layer=np.asarray([2], np.int32))
    y = emulate(monkeypatch, x, indexed, spec, Cut(2, 3, 2), grid=2)
    one: PackedWeight = jax.tree.map(lambda leaf: leaf[2], packed)
    expected = x.astype(np.float64) @ decoded(one, spec).T
    assert relative_error(y, expected) <= MATMUL_RELATIVE["bfloat16"]


@pytest.mark.parametrize("m", [17, 32, 64, 128])
@pytest.mark.parametrize("n, k", [(14336, 4096), (8192, 28672), (1000, 1088)])
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
    traced = jax.jit(lambda x, packed: skinny.matmul(x, packed, spec)).trace(x, packed)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert f"wgmma.mma_async.sync.aligned.m64n{-(-m // 8) * 8}k16" in text


@pytest.mark.parametrize(
    "m, change, message",
    [
        (129, {}, "m=129 rows of x must be 1 to 128"),
        (20, {"k": 96}, "k=96 must be a multiple of 64"),
        (20, {"n": 15}, "n=15 must be even"),
        (20, {"block_size": 32}, "block_size=32 must be a multiple of 64"),
        (20, {"codebook": NESTED}, "codes of 8 bits must have 4"),
    ],
)
def test_what_it_cannot_is_said(m, change, message):
    packed, spec = make_weight(16, 64)
    spec = dataclasses.replace(spec, **change)
    with pytest.raises(NotImplementedError, match=message):
        skinny.matmul(jnp.ones((m, spec.k), jnp.bfloat16), packed, spec)


@pytest.mark.parametrize(
    "cut, message",
    [
        ((5, 8, 2), "must have 2 to 4 consumers"),
        ((4, 1, 2), "must have 2 stages and 2 slots"),
        ((4, 8, 1), "must have 2 stages and 2 slots"),
        ((4, 4, 2, 5), "must have a lead of 0 to 4"),
        ((4, 4, 2, 0, 3), "must ask for one slot at once, or up to all"),
    ],
)
def test_a_cut_has_room(cut, message):
    with pytest.raises(ValueError, match=message):
        Cut(*cut)


@pytest.mark.parametrize("consumers", [2, 3, 4])
def test_registers_are_those_that_the_block_has(consumers):
    cut = Cut(consumers)
    many, few = cut.registers
    at_start = 65536 // cut.threads // 8 * 8
    assert many * cut.workers + few * 128 <= at_start * cut.threads
    assert many % 8 == 0 and many >= at_start


@pytest.mark.parametrize("n, k, leads", [(14336, 4096, True), (28672, 8192, False)])
def test_runs_that_end_a_tile_are_longer(n, k, leads):
    packed, spec = make_weight(16, 64)
    spec = dataclasses.replace(spec, n=n, k=k)
    plan = skinny.make_plan(64, jnp.bfloat16, packed, spec, Cut(3, lead=2))
    plan = dataclasses.replace(plan, grid=132)
    starts = np.array([plan.first(block) for block in range(133)])
    assert (starts[0], starts[-1]) == (0, plan.halves)
    tile, lengths = starts // (2 * plan.chunks), np.diff(starts)
    ends = (tile[:-1] < tile[1:]) & (starts[1:] % (2 * plan.chunks) > 0)
    if leads:
        inside = lengths[~ends & (starts[:-1] % (2 * plan.chunks) > 0)]
        assert lengths[ends].min() > inside.min()
        assert lengths[ends].mean() - inside.mean() == pytest.approx(2, abs=0.5)
    else:  # every run ends a tile
        assert lengths.max() - lengths.min() <= 1


@pytest.mark.parametrize("lead", [0, 1, 4])
@pytest.mark.parametrize("n, k", [(14336, 4096), (13824, 5120), (320, 1088)])
def test_every_part_is_left_once_and_has_an_owner(n, k, lead):
    packed, spec = make_weight(n, k)
    plan = skinny.make_plan(64, jnp.bfloat16, packed, spec, Cut(3, lead=lead))
    parts = set()
    for block in range(plan.grid):
        first, end = plan.first(block), plan.first(block + 1)
        length = 2 * plan.chunks
        for tile in range(first // length, (end - 1) // length + 1):
            owner, last = plan.sharers(tile)
            assert owner <= block <= last
            assert (first <= tile * length) == (owner == block)
            if owner < block:
                parts.add(block)
                assert tile == first // length  # its first tile: one part a block
    assert len(parts) == sum(
        last - owner for owner, last in map(plan.sharers, range(plan.tiles))
    )

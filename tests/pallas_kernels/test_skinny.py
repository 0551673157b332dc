"""The kernel for tens of rows: computed on numpy, and lowered for CUDA."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import emit, skinny, skinny_body
from pallas_kernels.matvec_plan import TABLE_BYTES
from pallas_kernels.packed import PackedWeight
from pallas_kernels.skinny_plan import Cut
from tests.pallas_kernels.emulator import Emulator
from tests.pallas_kernels.test_matvec import decoded, make_weight, relative_error
from tests.tolerances import MATMUL_RELATIVE


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
        emulator = Emulator(plan.cut.threads, block, {**shared, **memory}, lazy)
        monkeypatch.setattr(skinny_body, "emit", emulator)
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
        (17, 64, 512, Cut(1, 3, 2), 1),
        (5, 192, 768, Cut(2, 4, 2), 3),  # runs that begin and end inside of tiles
        (33, 256, 1088, Cut(2, 3, 3), 5),  # tiles of several runs, a short chunk
        (64, 80, 512, Cut(1, 4, 2), 2),  # the last rows fill no tile
        (100, 64, 320, Cut(1, 5, 2), 1),
        (24, 320, 1024, Cut(4, 6, 2), 3),
    ],
)
@pytest.mark.parametrize("lazy", [False, True], ids=["eager", "lazy"])
def test_every_number_is_computed(monkeypatch, m, n, k, cut, grid, lazy):
    packed, spec = make_weight(n, k)
    x = np.random.default_rng(m).normal(size=(m, k)).astype(jnp.bfloat16)
    y = emulate(monkeypatch, x, packed, spec, cut, grid, lazy)
    expected = x.astype(np.float64) @ decoded(packed, spec).T
    assert relative_error(y, expected) <= MATMUL_RELATIVE["bfloat16"]

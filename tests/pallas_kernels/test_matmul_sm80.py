"""The Ampere kernels: computed on numpy, and lowered for CUDA, without a GPU."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import matmul_sm80, matmul_sm80_body, matmul_sm80_copies
from pallas_kernels.decode import pair_table
from pallas_kernels.matmul_sm80_copies import THREADS
from pallas_kernels.packed import PackedWeight
from tests.pallas_kernels.emulator import Emulator
from tests.pallas_kernels.test_matvec import decoded, make_weight, relative_error
from tests.tolerances import MATMUL_RELATIVE


def emulate(monkeypatch, x, packed, spec, transposed, lazy=False):
    """One of the products, block by block on numpy."""
    name = np.dtype(x.dtype).name
    plan = matmul_sm80.Plan(x.shape[0], spec, name, transposed)
    y = np.full((plan.m, plan.columns), np.nan, x.dtype)
    operands = {
        "x": x,
        "codes": packed.codes,
        "scales": matmul_sm80.make_scales(packed, plan),
        "layer": packed.layer,
        "pairs": pair_table(spec.codebook, name),
    }
    operands = {k: np.atleast_1d(v) for k, v in operands.items() if v is not None}
    for block in range(plan.tiles_m * plan.tiles_n):
        refs = {"smem": plan.smem_bytes, **operands, "y": y}
        emulator = Emulator(THREADS, block, refs, lazy)
        monkeypatch.setattr(matmul_sm80_copies, "emit", emulator)
        monkeypatch.setattr(matmul_sm80_body, "emit", emulator)
        matmul_sm80_body.Body(plan, emulator.refs).run()
        y = emulator.refs["y"].bytes.view(x.dtype).reshape(y.shape)
    return y


@pytest.mark.parametrize("transposed", [False, True], ids=["matmul", "matmul_dx"])
@pytest.mark.parametrize(
    "m, n, k, block_size, nested, dtype",
    [
        (128, 128, 256, 64, True, jnp.bfloat16),
        (5, 72, 192, 64, True, jnp.bfloat16),  # no side fills its tile
        (136, 136, 64, 32, False, jnp.float16),
        (64, 256, 128, 128, True, jnp.float16),
    ],
)
@pytest.mark.parametrize("lazy", [False, True], ids=["eager", "lazy"])
def test_equals_the_product(
    monkeypatch, m, n, k, block_size, nested, dtype, transposed, lazy
):
    packed, spec = make_weight(n, k, block_size, nested, nested_block_size=8)
    x = np.random.default_rng(m).normal(size=(m, n if transposed else k)).astype(dtype)
    y = emulate(monkeypatch, x, packed, spec, transposed, lazy)
    weight = decoded(packed, spec)
    expected = x.astype(np.float64) @ (weight if transposed else weight.T)
    assert relative_error(y, expected) <= MATMUL_RELATIVE[np.dtype(dtype).name]


@pytest.mark.parametrize("transposed", [False, True], ids=["matmul", "matmul_dx"])
def test_a_layer_of_a_stack_is_read_in_place(monkeypatch, transposed):
    packed, spec = make_weight(64, 128, layers=3)
    x = np.random.default_rng(0).normal(size=(8, 64 if transposed else 128))
    x = x.astype(jnp.bfloat16)
    indexed = dataclasses.replace(packed, layer=np.int32(1))
    y = emulate(monkeypatch, x, indexed, spec, transposed)
    weight = decoded(jax.tree.map(lambda leaf: leaf[1], packed), spec)
    expected = x.astype(np.float64) @ (weight if transposed else weight.T)
    assert relative_error(y, expected) <= MATMUL_RELATIVE["bfloat16"]


def test_every_tile_of_the_result_is_one_block(monkeypatch):
    """With more tiles along m than a group holds, and a last group that is short."""
    monkeypatch.setattr(matmul_sm80_copies, "GROUP", 2)
    packed, spec = make_weight(136, 64)
    x = np.random.default_rng(0).normal(size=(300, 64)).astype(jnp.bfloat16)
    y = emulate(monkeypatch, x, packed, spec, transposed=False)
    expected = x.astype(np.float64) @ decoded(packed, spec).T
    assert relative_error(y, expected) <= MATMUL_RELATIVE["bfloat16"]


@pytest.mark.parametrize("op", ["matmul", "matmul_dx"])
@pytest.mark.parametrize("m, n, k", [(1, 1024, 4096), (2048, 4096, 14336)])
def test_lowers_for_cuda(op, m, n, k):
    _, spec = make_weight(16, 64)
    spec = dataclasses.replace(spec, n=n, k=k)
    packed = PackedWeight(
        jax.ShapeDtypeStruct((n, k // 2), jnp.uint8),
        jax.ShapeDtypeStruct((n, k // 64), jnp.uint8),
        jax.ShapeDtypeStruct((n * k // 64 // 256,), jnp.float32),
        jax.ShapeDtypeStruct((), jnp.float32),
    )
    x = jax.ShapeDtypeStruct((m, k if op == "matmul" else n), jnp.bfloat16)
    function = getattr(matmul_sm80, op)
    traced = jax.jit(lambda x, p: function(x, p, spec)).trace(x, packed)
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"k": 96}, "k=96 must be a multiple of 64 and n=16 of 8"),
        ({"n": 12}, "k=64 must be a multiple of 64 and n=12 of 8"),
        ({"block_size": 16}, "block_size=16 must be a power of two from 32 on"),
    ],
)
def test_what_it_cannot_is_said(change, message):
    packed, spec = make_weight(16, 64)
    spec = dataclasses.replace(spec, **change)
    with pytest.raises(NotImplementedError, match=message):
        matmul_sm80.matmul(jnp.ones((1, spec.k), jnp.bfloat16), packed, spec)


def test_float32_activations_are_refused():
    packed, spec = make_weight(16, 64)
    with pytest.raises(NotImplementedError, match="must be bfloat16 or float16"):
        matmul_sm80.matmul(jnp.ones((1, 64)), packed, spec)

"""The Ampere kernels: computed on numpy, and lowered for CUDA, without a GPU."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.mosaic.gpu import utils as mgpu_utils

from pallas_kernels import matmul_sm80, matmul_sm80_body, matmul_sm80_copies, tuning
from pallas_kernels.decode import pair_table
from pallas_kernels.matmul_sm80 import CONFIGS
from pallas_kernels.matmul_sm80_copies import THREADS
from pallas_kernels.packed import PackedWeight
from tests.pallas_kernels.emulator import Emulator
from tests.pallas_kernels.test_matvec import decoded, make_weight, relative_error
from tests.tolerances import MATMUL_RELATIVE


def emulate(
    monkeypatch,
    x,
    packed,
    spec,
    transposed,
    lazy=False,
    config=CONFIGS[0],
    blocks=2,
    kind=Emulator,
):
    """One of the products, block by block on numpy."""
    name = np.dtype(x.dtype).name
    plan = matmul_sm80.Plan(x.shape[0], spec, name, transposed, config, blocks)
    y = np.full((plan.m, plan.columns), np.nan, x.dtype)
    operands = {
        "x": x,
        "codes": packed.codes,
        "scales": matmul_sm80.make_scales(packed, plan),
        "layer": packed.layer,
        "pairs": pair_table(spec.codebook, name),
    }
    operands = {k: np.atleast_1d(v) for k, v in operands.items() if v is not None}
    for block in range(plan.blocks):
        refs = {"smem": plan.smem_bytes, **operands, "y": y}
        emulator = kind(THREADS, block, refs, lazy)
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
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("lazy", [False, True], ids=["eager", "lazy"])
def test_blocks_take_tile_after_tile(monkeypatch, config, transposed, lazy):
    """Six tiles (three transposed) that end where the weight does, of two blocks."""
    packed, spec = make_weight(512, 256)
    m = 300
    x = np.random.default_rng(0).normal(size=(m, 512 if transposed else 256))
    x = x.astype(jnp.bfloat16)
    y = emulate(monkeypatch, x, packed, spec, transposed, lazy, config)
    weight = decoded(packed, spec)
    expected = x.astype(np.float64) @ (weight if transposed else weight.T)
    assert relative_error(y, expected) <= MATMUL_RELATIVE["bfloat16"]


class Banks(Emulator):
    """Checks that what lanes read of shared memory at once meets in no bank."""

    loads = 0

    def meet(self, addresses, size):
        """128 bytes are read at once, by as many lanes as that is."""
        for at in np.asarray(addresses, np.int64).reshape(-1, 128 // size):
            at = np.unique(at)
            assert len(np.unique(at // size % (128 // size))) == len(at), (at, size)
        Banks.loads += 1

    def _access(self, op, operands, mask, read, write):
        if op[:2] == ["ld", "shared"]:
            base, _, offset = operands[1].strip("[]").partition("+")
            size = 4 * len(operands[0].strip("{}").split(","))
            self.meet(read(base).astype(np.int64) + int(offset or 0), size)
        super()._access(op, operands, mask, read, write)

    def _load_matrices(self, op, operands, mask, read, write):
        self.meet(read(operands[1].strip("[]")), 16)
        super()._load_matrices(op, operands, mask, read, write)


@pytest.mark.parametrize("transposed", [False, True], ids=["matmul", "matmul_dx"])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_reads_meet_in_no_bank(monkeypatch, config, transposed):
    packed, spec = make_weight(256, 256)
    x = np.ones((128, 256), jnp.bfloat16)
    monkeypatch.setattr(Banks, "loads", 0)
    emulate(monkeypatch, x, packed, spec, transposed, config=config, kind=Banks)
    assert Banks.loads > 100


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


def test_every_tile_of_the_result_is_computed(monkeypatch):
    """With more tiles along m than a group holds, and a last group that is short."""
    monkeypatch.setattr(matmul_sm80_copies, "GROUP", 2)
    packed, spec = make_weight(136, 64)
    x = np.random.default_rng(0).normal(size=(300, 64)).astype(jnp.bfloat16)
    y = emulate(monkeypatch, x, packed, spec, transposed=False)
    expected = x.astype(np.float64) @ decoded(packed, spec).T
    assert relative_error(y, expected) <= MATMUL_RELATIVE["bfloat16"]


def lowered(op, m, n, k) -> str:
    """The text of one of the products, lowered for CUDA."""
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
    return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("op", ["matmul", "matmul_dx"])
@pytest.mark.parametrize("m, n, k", [(1, 1024, 4096), (2048, 4096, 14336)])
def test_lowers_for_cuda(op, m, n, k):
    assert "mosaic_gpu" in lowered(op, m, n, k)


@pytest.mark.parametrize("op", ["matmul", "matmul_dx"])
@pytest.mark.parametrize("arch, hopper", [((8, 0), False), ((9, 0), True)])
def test_pallas_puts_hopper_instructions_into_kernels_for_hopper_alone(
    monkeypatch, op, arch, hopper
):
    """It asks the device for its architecture; without one it takes 9.0."""
    monkeypatch.setattr(mgpu_utils, "_infer_arch", lambda: arch)
    matmul_sm80._kernel.cache_clear()
    text = lowered(op, 128, 1024, 4096)
    matmul_sm80._kernel.cache_clear()
    assert ("nvvm.elect" in text) == hopper
    assert ("fence.mbarrier_init" in text) == hopper


@pytest.mark.parametrize(
    "available, config",
    [(232448, CONFIGS[0]), (166912, CONFIGS[1]), (101376, CONFIGS[2])],
    ids=["9.0", "8.0", "8.6"],
)
def test_stages_are_those_that_fit(monkeypatch, available, config):
    monkeypatch.setattr(tuning, "shared_memory", lambda: available)
    _, spec = make_weight(16, 64)
    for block_size in (32, 64):
        spec = dataclasses.replace(spec, block_size=block_size)
        plan = matmul_sm80.make_plan(1, jnp.bfloat16, spec, transposed=False)
        assert plan.config == config and plan.smem_bytes <= available


def test_too_little_shared_memory_is_said(monkeypatch):
    monkeypatch.setattr(tuning, "shared_memory", lambda: 65536)
    packed, spec = make_weight(16, 64)
    message = "needs 84000 bytes of shared memory; there are 65536"
    with pytest.raises(NotImplementedError, match=message):
        matmul_sm80.matmul(jnp.ones((1, spec.k), jnp.bfloat16), packed, spec)


def test_older_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(tuning, "compute_capability", lambda: 7.5)
    packed, spec = make_weight(16, 64)
    with pytest.raises(NotImplementedError, match=r"capability=7\.5: cp.async"):
        matmul_sm80.matmul(jnp.ones((1, spec.k), jnp.bfloat16), packed, spec)


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

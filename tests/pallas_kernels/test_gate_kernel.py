"""The backward of the gate: its numbers on numpy, and lowered for CUDA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import gate_body as body
from pallas_kernels import gate_kernel as kernels
from pallas_kernels import stream, tuning, words
from tests.pallas_kernels.emulator import Emulator
from tests.tolerances import ROUNDED_ONCE_ABSOLUTE, ROUNDED_ONCE_RELATIVE

DTYPES = [jnp.bfloat16, jnp.float16]
EDGES = [0.0, -0.0, 1e-3, -1e-3, 9.5, -9.5, 90.0, -90.0, 300.0, -300.0]


def by_rule(gate, up, d):
    gate, up, d = (x.astype(np.float64) for x in (gate, up, d))
    with np.errstate(over="ignore"):
        s = 1 / (1 + np.exp(-gate))
    h = gate * s
    return d * up * (s + h * (1 - s)), d * h, h * up


def arrays(size, dtype):
    rng = np.random.default_rng(0)
    gate, up, d = rng.normal(size=(3, size)) * np.array([[4.0], [1.0], [0.1]])
    gate[: len(EDGES)] = EDGES
    return [x.astype(dtype) for x in (gate, up, d)]


def assert_follows_the_rule(found, given):
    relative = ROUNDED_ONCE_RELATIVE[given[0].dtype.name]
    least = ROUNDED_ONCE_ABSOLUTE[given[0].dtype.name]
    for one, expected in zip(found, by_rule(*given), strict=True):
        one = np.asarray(one).astype(np.float64)
        np.testing.assert_allclose(one, expected, rtol=relative, atol=least)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_result_is_the_rule_rounded_where_its_operand_was(dtype, monkeypatch):
    monkeypatch.setattr(body, "THREADS", 64)
    size, grid = 8 * 64 * 2 * 3 + 8 * 5, 2  # rounds, and a ragged last one
    given = arrays(size, dtype)
    buffers = dict(zip(body.ARRAYS, (x.copy() for x in given), strict=True))
    for block in range(grid):
        emulator = Emulator(64, block, buffers)
        for module in (body, stream, words):
            monkeypatch.setattr(module, "emit", emulator)
        body.GateBackward(size, dtype, grid, emulator.refs).build()
        buffers = {name: ref.bytes.view(dtype) for name, ref in emulator.refs.items()}
    assert_follows_the_rule([buffers[name] for name in body.ARRAYS], given)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_lowers_for_cuda_and_writes_in_place(dtype):
    x = jax.ShapeDtypeStruct((4, 2048, 1408), dtype)
    traced = jax.jit(kernels.gate_backward).trace(x, x, x)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 1
    assert text.count("#stablehlo.output_operand_alias<") == 3
    # Without them XLA would have the kernel read a slice of a stack where it lies.
    assert text.count("stablehlo.optimization_barrier") == 2


@pytest.mark.parametrize(
    "shape, dtype, message",
    [
        ((41, 3), jnp.bfloat16, r"gate.size=123 must be a multiple of 8"),
        ((0,), jnp.bfloat16, r"gate.size=0 must be a multiple of 8"),
        ((64, 64), jnp.float32, r"must be one shape of bfloat16 or of float16"),
    ],
)
def test_what_it_cannot_is_said(shape, dtype, message):
    x = jax.ShapeDtypeStruct(shape, dtype)
    with pytest.raises(NotImplementedError, match=message):
        kernels.gate_backward(x, x, x)


def test_operands_of_different_shapes_are_refused():
    x, y = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((8, 64), (4, 128)))
    with pytest.raises(NotImplementedError, match="one shape"):
        kernels.gate_backward(x, x, y)


def test_an_old_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(tuning, "compute_capability", lambda: 8.9)
    x = jax.ShapeDtypeStruct((64, 64), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match=r"capability=8\.9"):
        kernels.gate_backward(x, x, x)

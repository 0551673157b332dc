"""The backward of an MLP's gate in one pass over memory, written where it was read.

XLA computes the same in one pass, to three new arrays: it writes a result over an
operand only where no other result needs that operand. Of the widest arrays of a model
six are in memory then, which is where a step that recomputes its activations needs
most. `gate_body` has what a thread does.
"""

from typing import TYPE_CHECKING, Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels import tuning
from pallas_kernels.gate_body import (
    ARRAYS,
    BLOCKS_A_MULTIPROCESSOR,
    PIECE,
    THREADS,
    GateBackward,
)
from pallas_kernels.whole import whole

if TYPE_CHECKING:
    from jaxtyping import Array, Float


def gate_backward(
    gate: "Float[Array, '*shape']",
    up: "Float[Array, '*shape']",
    d: "Float[Array, '*shape']",
) -> "tuple[Float[Array, '*shape'], Float[Array, '*shape'], Float[Array, '*shape']]":
    """Returns the gradients of y = silu(gate) · up, and y.

        s = 1 / (1 + exp(-gate)),  h = gate · s
        dgate, dup, y = d · up · (s + h (1 - s)),  d · h,  h · up

    All in float32, rounded once; s to about 3 units in its last place.

    Args:
        gate: bfloat16 or float16, of a multiple of 8 numbers.
        up: the same.
        d: the gradient of y, the same.

    Returns:
        The gradients of gate and of up, and y. Each has the memory of an argument
        where no one else needs that.

    Raises:
        NotImplementedError: if this kernel cannot: a GPU before 9.0, other types or
            shapes.
    """
    tuning.require(9, "it was run from 9.0 on only")
    shapes = [(x.shape, x.dtype) for x in (gate, up, d)]
    if gate.dtype not in (jnp.bfloat16, jnp.float16) or len(set(shapes)) > 1:
        raise NotImplementedError(
            f"{shapes} must be one shape of bfloat16 or of float16."
        )
    if not 0 < gate.size < 2**31 or gate.size % PIECE:
        raise NotImplementedError(
            f"{gate.size=} must be a multiple of {PIECE} below 2**31."
        )
    flat = _flat(*(x.reshape(-1) for x in (gate, up, d)))
    return tuple(x.reshape(gate.shape) for x in flat)


@jax.jit
def _flat(gate, up, d):
    """Runs the kernel on flat arrays."""
    size, dtype = gate.size, gate.dtype
    most = tuning.multiprocessors() * BLOCKS_A_MULTIPROCESSOR
    grid = min(-(-size // (PIECE * THREADS)), most)

    def body(*refs):
        named = dict(zip(ARRAYS, refs, strict=True))

        @plgpu.inline_mgpu(arg_types=({key: plgpu.RefType() for key in named},))
        def run(_, refs):
            GateBackward(size, dtype, grid, refs).build()

        run(named)  # pyright: ignore[reportCallIssue]

    kernel: Any = pl.kernel(
        body,
        out_type=(),
        mesh=plgpu.Mesh(
            grid=(grid,),
            grid_names=("i",),
            num_threads=THREADS // 128,
            thread_name="wg",
        ),
        name="gate_backward",
    )

    # A batch, which the kernel has no axis for, is computed one after another.
    @jax.custom_batching.sequential_vmap
    def run(*arrays):
        return whole(pl.run_state(lambda refs: kernel(*refs))(whole(arrays)))

    return run(gate, up, d)

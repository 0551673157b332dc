"""A step of Adam or Lion with moments in 8 bits, in one pass over memory.

Codes and scales are written where they were read; `eightbit_body` has what a thread
does.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels import tuning
from pallas_kernels.eightbit_body import (
    BLOCK_SIZE,
    QUAD,
    THREADS,
    Adam,
    Codebooks,
    Lion,
    smem_bytes,
    table_operand,
)
from pallas_kernels.whole import whole

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Float32

Moment = tuple[jax.Array, jax.Array]  # codes and absmax


def adam(
    g: "Float[Array, '*shape']",
    factors: "Float32[Array, '7']",
    moments: "Sequence[Moment]",
    codebooks: Codebooks,
) -> "tuple[Float[Array, '*shape'], list[Moment]]":
    """Does a step of Adam for one parameter.

        m, v = b1 * decode(m) + w1 * g, b2 * decode(v) + w2 * g * g
        update = (m * inverse1) / (sqrt(v * inverse2) + eps)
        m, v = encode(m), encode(v)

    The sums of the moments are rounded once, the update is of the moments before they
    are encoded, and where `g` is not finite all three are zero.

    Args:
        g: the gradient, bfloat16, float16 or float32.
        factors: b1, w1, b2, w2, inverse1, inverse2, eps.
        moments: for m and for v the codes in the shape of `g`, and an absmax for each
            256 numbers.
        codebooks: the map of m, and that of v.

    Returns:
        The update, in the type of `g`, and the moments.

    Raises:
        NotImplementedError: if this kernel cannot: other types or shapes, a size that
            is no multiple of 4.
    """
    return _step(Adam, g, factors, moments, codebooks)


def lion(
    g: "Float[Array, '*shape']",
    factors: "Float32[Array, '4']",
    moments: "Sequence[Moment]",
    codebooks: Codebooks,
) -> "tuple[Float[Array, '*shape'], list[Moment]]":
    """Does a step of Lion for one parameter.

        update = sign(b1 * decode(m) + w1 * g)
        m = encode(b2 * decode(m) + w2 * g)

    Args:
        g: the gradient, bfloat16, float16 or float32.
        factors: b1, w1, b2, w2.
        moments: the one, as in `adam`.
        codebooks: its map.

    Returns:
        The update, in the type of `g`, and the moment.

    Raises:
        NotImplementedError: as in `adam`.
    """
    return _step(Lion, g, factors, moments, codebooks)


def _step(emitter, g, factors, moments, codebooks):
    tuning.require(9, "it was run from 9.0 on only")
    if g.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise NotImplementedError(f"{g.dtype=} must be bfloat16, float16 or float32.")
    if not 0 < g.size < 2**31 or g.size % QUAD:
        raise NotImplementedError(
            f"{g.size=} must be a multiple of {QUAD} below 2**31."
        )
    blocks = -(-g.size // BLOCK_SIZE)
    for codes, absmax in moments:
        if codes.shape != g.shape or absmax.shape != (blocks,):
            raise NotImplementedError(
                f"{codes.shape=} and {absmax.shape=} must be {g.shape} and ({blocks},)."
            )
    # Flat, so that parameters of one size share a kernel.
    flat = [leaf.reshape(-1) for moment in moments for leaf in moment]
    update, *flat = _flat_step(emitter, codebooks, g.reshape(-1), factors, *flat)
    pairs = itertools.batched(flat, 2)
    return update.reshape(g.shape), [
        (codes.reshape(g.shape), absmax) for codes, absmax in pairs
    ]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _flat_step(emitter, codebooks, g, factors, *state):
    """Runs the kernel, which writes the new state where it read the old."""
    warps = THREADS // 32
    grid = min(-(-g.size // (BLOCK_SIZE * warps)), tuning.multiprocessors())
    names = ["g", "factors", "table"]
    for i in range(len(codebooks)):
        names += [f"codes{i}", f"absmax{i}"]
    names += ["update"]

    def body(*refs):
        def with_scratch(smem):
            named = dict(zip(names, refs, strict=True)) | {"smem": smem}

            @plgpu.inline_mgpu(arg_types=({key: plgpu.RefType() for key in named},))
            def run(_, refs):
                emitter(codebooks, g.size, g.dtype, grid, refs).build()

            run(named)  # pyright: ignore[reportCallIssue]

        scratch = plgpu.SMEM((smem_bytes(codebooks),), jnp.uint8)
        pl.run_scoped(with_scratch, scratch, collective_axes="wg")

    kernel: Any = pl.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(g.shape, g.dtype),
        mesh=plgpu.Mesh(
            grid=(grid,),
            grid_names=("i",),
            num_threads=THREADS // 128,
            thread_name="wg",
        ),
        name=emitter.name,
    )

    # A batch, which the kernel has no axis for, is computed one after another.
    @jax.custom_batching.sequential_vmap
    def run(g, factors, *state):
        table = jnp.asarray(table_operand(codebooks))
        state = whole(state)

        def in_place(refs):
            update, *state = refs
            update[...] = kernel(g, factors, table, *state)

        results = pl.run_state(in_place)((jax.lax.empty(g.shape, g.dtype), *state))
        return whole(results)

    return run(g, factors, *state)

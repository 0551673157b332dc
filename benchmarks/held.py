"""Times short programs on a device that never waits for the host."""

import functools
import math
import statistics
import time
from collections.abc import Callable

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels import emit

_HELD_NS = 14_000_000  # as a rule longer than the host takes to queue the programs
_CALLS = 192  # that are timed, if so many fit into the programs of one queue
# JAX lets a device have 32 programs waiting; the host would wait for the next one, and
# that for the held device.
_QUEUE = 30
_LONG = 10e-3  # seconds of programs that need not be more: their results take memory


@functools.cache
def _hold(ns: int):
    """A program that keeps the device busy for so long and does nothing."""

    def body(out):
        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
        def spin(ctx, out):
            del ctx
            emit.ptx(
                "{.reg .u64 now, end; .reg .pred p; mov.u64 end, %globaltimer; "
                f"add.u64 end, end, {ns}; "
                "SPIN_${:uid}: nanosleep.u32 2000; mov.u64 now, %globaltimer; "
                "setp.lt.u64 p, now, end; @p bra SPIN_${:uid}; "
                "st.global.b32 [$0], 0;}",
                emit.address(out).value,
            )

        spin(out)  # pyright: ignore[reportCallIssue]

    spinning = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((1,), jnp.int32),
        grid=(1,),
        grid_names=("i",),
        num_threads=1,
        thread_name="wg",
    )
    return jax.jit(spinning)


def _burst(run, times: int, ns: int) -> float | None:
    """Seconds of so many runs behind a held device; None if the host was too slow."""
    start = time.perf_counter()
    out: object = _hold(ns)()
    for _ in range(times):
        out = run()  # results of the one before are given back: they may be large
    queued = time.perf_counter() - start
    jax.block_until_ready(out)
    return time.perf_counter() - start if queued < ns * 1e-9 else None


def seconds(run: Callable[[], list], calls: int) -> float:
    """The time of one of the calls of a program, on the device.

    Programs are queued while the device is held, so that it never waits for the host;
    the time of holding it drops out of the difference between many programs and few.
    """
    start = time.perf_counter()
    jax.block_until_ready(run())
    long_enough = math.ceil(_LONG / (time.perf_counter() - start))
    few, more = 2, min(2 + -(-_CALLS // calls), 2 + max(long_enough, 4), _QUEUE)
    for ns in (_HELD_NS, 4 * _HELD_NS, 16 * _HELD_NS):
        jax.block_until_ready((_hold(ns)(), run()))
        times = []
        for _ in range(10):
            long, short = _burst(run, more, ns), _burst(run, few, ns)
            if long is not None and short is not None:
                times.append(long - short)
            if len(times) == 5:
                return statistics.median(times) / (more - few) / calls
    raise RuntimeError(f"The host takes longer than {ns / 1e6} ms to queue programs.")

"""Where an array lives: the device's own memory, or pinned memory of its host."""

import functools
import warnings
from typing import Any

import jax
from jax.core import Tracer

HOST_KIND = "pinned_host"


def on_host(x: Any) -> bool:
    """Whether the array, concrete or traced, is typed as host memory."""
    return jax.typeof(x).memory_space == jax.memory.Space.Host


def to_host(x: Any) -> jax.Array:
    """Moves an array to the pinned memory of its host; a no-op if it is there."""
    # A device_put of what is in place already is a program of its own: left out.
    return x if on_host(x) else jax.device_put(x, jax.memory.Space.Host)


def to_device(x: Any) -> jax.Array:
    """Moves an array to its device's memory; a no-op if it is there."""
    return jax.device_put(x, jax.memory.Space.Device) if on_host(x) else x


def has_host_memory(tree: Any) -> bool:
    """Whether the devices of the tree's arrays can address pinned host memory.

    A tree without concrete arrays (under jit) asks the default backend. Warns, once a
    platform, when the answer is no.
    """
    devices = {
        device
        for x in jax.tree.leaves(tree)
        if isinstance(x, jax.Array) and not isinstance(x, Tracer)
        for device in x.sharding.device_set
    }
    device = next(iter(devices)) if devices else jax.local_devices()[0]
    found = HOST_KIND in {memory.kind for memory in device.addressable_memories()}
    if not found:
        _warn_without_host_memory(device.platform)
    return found


@functools.cache
def _warn_without_host_memory(platform: str) -> None:
    warnings.warn(
        f"The {platform!r} backend has no {HOST_KIND!r} memory: `paged` works as the "
        "plain optimizer, with all of its state on the device.",
        stacklevel=2,
    )

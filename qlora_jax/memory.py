"""What a run takes."""

import resource
import sys

import jax


def peak_rss_gb() -> float:
    """Returns the largest resident memory of this process so far, in 1e9 bytes."""
    # In kilobytes on Linux, in bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def device_peak_gb() -> float | None:
    """Returns the peak of the device's allocator in 1e9 bytes, None if it has none."""
    stats = jax.local_devices()[0].memory_stats() or {}
    peak = stats.get("peak_bytes_in_use")
    return None if peak is None else peak / 1e9


def peak_gb() -> float:
    """Returns the peak of the device's allocator, or of the process on a CPU, in GB."""
    peak = device_peak_gb()
    return peak_rss_gb() if peak is None else peak

"""What a run takes."""

import resource
import sys

import jax


def peak_rss_gb() -> float:
    """Returns the largest resident memory of this process so far, in 1e9 bytes."""
    # In kilobytes on Linux, in bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def peak_gb() -> float:
    """Returns the peak of the device's allocator, or of the process on a CPU, in GB."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"] / 1e9
    return peak_rss_gb()

"""What a run was computed with: versions, device, settings of the compiler."""

import datetime
import importlib.metadata
import os
import platform
import sys
from typing import Any

import jax

_PACKAGES = (
    "qlora-jax", "jax", "jaxlib", "flax", "optax", "numpy", "orbax-checkpoint",
    "tokenizers", "grain",
)  # fmt: skip
# Variables of the environment that may change a number.
_VARIABLES = ("XLA_FLAGS", "JAX_ENABLE_X64", "JAX_DEFAULT_MATMUL_PRECISION")


def environment() -> dict[str, Any]:
    """Returns what a result depends on beside settings and data, for JSON."""
    device = jax.local_devices()[0]
    return {
        "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "platform": platform.platform(),
        "device": device.device_kind,
        "backend": device.client.platform_version.split("\n")[0],
        "devices": jax.device_count(),
        "variables": {v: os.environ[v] for v in _VARIABLES if v in os.environ},
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None

"""Settings of the whole suite: 8 host devices, strict markers, optional test data."""

import os
import pathlib

# Before jax starts: the CPU backend shows 8 devices, so that sharded code is tested.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from tests.signatures import import_checked

SIGNATURES_ARE_CHECKED = import_checked()

ROOT = pathlib.Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden"
DATA = pathlib.Path(
    os.environ.get("QLORA_JAX_TEST_DATA", ROOT.parent / "shared" / "data")
)


def pytest_collection_modifyitems(config, items):
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items or jax.default_backend() == "gpu":
        return
    skip = pytest.mark.skip(
        reason=f"needs an NVIDIA GPU, the default backend is {jax.default_backend()!r}"
    )
    for item in gpu_items:
        item.add_marker(skip)


@pytest.fixture(scope="session")
def data_dir():
    """Returns a function from a relative path to a file of the optional test data."""

    def path(relative: str) -> pathlib.Path:
        full = DATA / relative
        if not full.exists():
            pytest.skip(
                f"{full} is absent; QLORA_JAX_TEST_DATA names the folder of test data"
            )
        return full

    return path


@pytest.fixture
def strict_dtypes():
    """No silent dtype promotion inside the test."""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(scope="session")
def golden_bitsandbytes():
    """Bytes and numbers that bitsandbytes 0.50.2 made (tests/golden)."""
    with np.load(GOLDEN / "bitsandbytes.npz") as archive:
        yield archive


@pytest.fixture(scope="module")
def compiled_once(tmp_path_factory):
    """The same program is compiled once in a module, however often it is jitted."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = [getattr(jax.config, name) for name in names]
    folder = tmp_path_factory.mktemp("compiled")
    for name, value in zip(names, (str(folder), 0), strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in zip(names, before, strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()

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
    modules: dict[str, list] = {}
    for item in items:
        modules.setdefault(item.nodeid.partition("::")[0], []).append(item)
    for name, own in modules.items():
        modules[name] = sorted(own, key=_is_unoptimized)
    ordered = list(modules.values())
    if hasattr(config, "workerinput"):
        # Processes that share the modules end together if the last ones are short.
        ordered.sort(key=lambda own: (not any(map(_is_slow, own)), -len(own)))
    items[:] = [item for own in ordered for item in own]
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items or jax.default_backend() == "gpu":
        return
    skip = pytest.mark.skip(
        reason=f"needs an NVIDIA GPU, the default backend is {jax.default_backend()!r}"
    )
    for item in gpu_items:
        item.add_marker(skip)


def _is_slow(item) -> bool:
    return item.get_closest_marker("slow") is not None


def _is_unoptimized(item) -> bool:
    """The nearest of both marks counts: a test's own, or its module's."""
    both = [m.name for m in item.iter_markers() if m.name.endswith("optimized")]
    return both[:1] == ["unoptimized"]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Has XLA optimize the programs of a test little, if it is marked so.

    Most of the suite's time is compilation. Programs that were compiled the other way
    are forgotten, so that what a test runs does not hang on what ran before it.
    """
    little = _is_unoptimized(item)
    if little != jax.config.read("jax_disable_most_optimizations"):
        jax.clear_caches()
        jax.config.update("jax_disable_most_optimizations", little)


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

"""Imports point one way; importing the library is light and touches no device."""

import ast
import pathlib
import subprocess
import sys

import pytest

from tests.conftest import ROOT

# Who may import whom, inside the project; a part may always import itself.
ALLOWED = {
    "pallas_kernels": set(),
    "qlora_jax.quant": {"pallas_kernels"},
    "qlora_jax.atomic": set(),
    "qlora_jax.over_rows": set(),
    "qlora_jax.lora": {
        "pallas_kernels",
        "qlora_jax.over_rows",
        "qlora_jax.quant",
        "qlora_jax.sharding",
    },
    "qlora_jax.optim": {
        "pallas_kernels",
        "qlora_jax.quant",
        "qlora_jax.sharding",
    },
    "qlora_jax.sharding": set(),
    "qlora_jax.models": {
        "pallas_kernels",
        "qlora_jax.over_rows",
        "qlora_jax.sharding",
    },
    "qlora_jax.interop": {
        "qlora_jax.atomic",
        "qlora_jax.lora",
        "qlora_jax.models",
        "qlora_jax.quant",
        "qlora_jax.sharding",
    },
    "qlora_jax.data": set(),
    "qlora_jax.checkpoint": set(),
    "qlora_jax.memory": set(),
    "qlora_jax.environment": set(),
    "qlora_jax.one_gpu": set(),
    "qlora_jax.report": {"qlora_jax.atomic"},
    "qlora_jax.throughput": {"qlora_jax.lora", "qlora_jax.quant"},
    "qlora_jax.callbacks": {"qlora_jax.atomic", "qlora_jax.memory"},
    "qlora_jax.run": {
        "qlora_jax.atomic",
        "qlora_jax.callbacks",
        "qlora_jax.checkpoint",
        "qlora_jax.environment",
        "qlora_jax.memory",
        "qlora_jax.report",
    },
    "qlora_jax.train": {
        "qlora_jax.atomic",
        "qlora_jax.callbacks",
        "qlora_jax.checkpoint",
        "qlora_jax.lora",
        "qlora_jax.one_gpu",
        "qlora_jax.optim",
        "qlora_jax.run",
        "qlora_jax.sharding",
        "qlora_jax.throughput",
    },
    "qlora_jax.plan": {
        "qlora_jax.models",
        "qlora_jax.optim",
        "qlora_jax.quant",
        "qlora_jax.train",
    },
    "qlora_jax.generate": {"qlora_jax.models", "qlora_jax.sharding"},
    "qlora_jax.evals": {
        "qlora_jax.data",
        "qlora_jax.generate",
        "qlora_jax.sharding",
    },
}
# What `pallas_kernels` may import from outside, beside the standard library.
KERNEL_DEPENDENCIES = {"jax", "jaxlib", "jaxtyping", "numpy"}


def part_of(module: str) -> str | None:
    """Returns the part of the project a module belongs to, or None if it is foreign."""
    names = module.split(".")
    if names[0] == "pallas_kernels":
        return "pallas_kernels"
    if names[0] == "qlora_jax" and len(names) > 1:
        return ".".join(names[:2])
    return None


def imports_of(source: str) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def violations(module: str, source: str) -> list[str]:
    part = part_of(module)
    assert part is not None
    allowed = ALLOWED[part] | {part, None}
    imports = sorted(imports_of(source))
    return [f"{module} imports {i}" for i in imports if part_of(i) not in allowed]


def modules() -> list:
    found = []
    for package in ("pallas_kernels", "qlora_jax"):
        for path in sorted((ROOT / package).rglob("*.py")):
            names = path.relative_to(ROOT).with_suffix("").parts
            if names == ("qlora_jax", "__init__") or names[:2] == ("qlora_jax", "cli"):
                continue  # the public page and the command line import everything
            found.append(pytest.param(".".join(names), path, id=".".join(names)))
    return found


@pytest.mark.parametrize("module, path", modules())
def test_imports_point_one_way(module: str, path: pathlib.Path):
    assert part_of(module) in ALLOWED, f"{part_of(module)} is missing from the table"
    assert violations(module, path.read_text()) == []


def test_the_test_finds_violations():
    assert violations("qlora_jax.quant.x", "from qlora_jax.lora import y")
    assert violations("qlora_jax.data.x", "import pallas_kernels")
    assert violations("pallas_kernels.x", "from qlora_jax.quant.tensor import y")
    assert not violations("qlora_jax.quant.x", "from qlora_jax.quant.tensor import y")
    assert not violations("qlora_jax.quant.x", "import pallas_kernels.api, jax")


def test_kernels_need_jax_only():
    for path in (ROOT / "pallas_kernels").rglob("*.py"):
        for imported in imports_of(path.read_text()):
            top = imported.split(".")[0]
            known = KERNEL_DEPENDENCIES | {"pallas_kernels"} | sys.stdlib_module_names
            assert top in known, f"{path.name} imports {imported}"


IMPORT_CHECK = """
import sys, time
import flax.nnx, jax, numpy, optax  # what the import needs, and nothing else
before = set(sys.modules)
start = time.process_time()
import qlora_jax
print(time.process_time() - start)
new = {name.split(".")[0] for name in set(sys.modules) - before}
ours = {"qlora_jax", "pallas_kernels", "jax", "flax", "numpy", "optax"}
print(sorted(new - set(sys.stdlib_module_names) - ours))
from jax._src import xla_bridge
print(len(xla_bridge._backends))
"""


def test_import_is_light_and_touches_no_device():
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", IMPORT_CHECK],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    seconds, foreign, backends = run.stdout.splitlines()
    assert foreign == "[]", f"imported with qlora_jax, though not needed: {foreign}"
    assert backends == "0", "importing qlora_jax started a backend"
    assert float(seconds) < 0.4  # what is ours, above the second of jax and flax

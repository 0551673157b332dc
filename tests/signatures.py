"""Imports the project with every jaxtyping signature checked by beartype.

jaxtyping is no dependency of the library: its names stand in quoted annotations and are
imported under TYPE_CHECKING alone. Here that block is entered, so that beartype finds
the names, while the project's modules are imported for the first time.
"""

import importlib
import importlib.util
import pkgutil
import typing

PACKAGES = ("pallas_kernels", "qlora_jax")
# What the project imports from others: imported first, as it is, without the block.
FOREIGN = (
    "flax.linen",
    "flax.nnx",
    "jax.experimental.pallas.mosaic_gpu",
    "jinja2.sandbox",
    "optax",
    "orbax.checkpoint",
    "safetensors.numpy",
    "tokenizers",
)


def check_shapes(function):
    """Has beartype check a function that names arrays; others stay as they are.

    What else an argument may be is the function's own to say, in its own words: tests
    of those errors must reach it.
    """
    import beartype

    hints = getattr(function, "__annotations__", {}).values()
    if not any(isinstance(hint, str) and "Array" in hint for hint in hints):
        return function
    # The tower: an int will do where a float is asked for.
    conf = beartype.BeartypeConf(is_pep484_tower=True)
    return beartype.beartype(conf=conf)(function)


def import_checked() -> bool:
    """Imports the project checked; returns whether the checkers are installed."""
    if not all(map(importlib.util.find_spec, ("beartype", "jaxtyping"))):
        return False
    for name in (*FOREIGN, "beartype.roar", "beartype.door", "beartype.claw"):
        importlib.import_module(name)
    import jaxtyping

    typing.TYPE_CHECKING = True
    try:
        with jaxtyping.install_import_hook(PACKAGES, "tests.signatures.check_shapes"):
            for package in PACKAGES:
                path = importlib.import_module(package).__path__
                for module in pkgutil.walk_packages(path, f"{package}."):
                    importlib.import_module(module.name)
    finally:
        typing.TYPE_CHECKING = False
    return True

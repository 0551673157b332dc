"""Imports the project with jaxtyping signatures checked by beartype.

jaxtyping is no dependency of the library: its names stand in quoted annotations and are
imported under TYPE_CHECKING alone. Here that block is entered, so that beartype finds
the names, while the project's modules are imported for the first time.
"""

import importlib
import importlib.util
import pkgutil
import typing

PACKAGES = ("pallas_kernels", "qlora_jax")
# The parts whose signatures are checked so far.
CHECKED = (
    "pallas_kernels.api",
    "qlora_jax.data",
    "qlora_jax.over_rows",
    "qlora_jax.quant",
)
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
    "tyro",
)


def check_shapes(function):
    """Has beartype check the arguments and the result of calls that return.

    jaxtyping asks twice: for the arguments before the call, and for arguments and
    result (named `ret0`) after it. What is wrong with a call is for the function itself
    to say, in its own words, so only the second is checked.
    """
    import beartype

    hints = getattr(function, "__annotations__", {})
    names_arrays = any("jaxtyping." in repr(hint) for hint in hints.values())
    if "ret0" not in hints or not names_arrays:
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
        with jaxtyping.install_import_hook(CHECKED, "tests.signatures.check_shapes"):
            for package in PACKAGES:
                path = importlib.import_module(package).__path__
                for module in pkgutil.walk_packages(path, f"{package}."):
                    importlib.import_module(module.name)
    finally:
        typing.TYPE_CHECKING = False
    return True

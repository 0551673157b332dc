"""The two files of an adapter in PEFT's layout, without the model.

`adapter_config.json` says of what kind it is; what is not done here is refused by name.
`adapter_model.safetensors` has for each module

    base_model.model.<module>.lora_A.weight             [rank, in]
    base_model.model.<module>.lora_B.weight             [out, rank]
    base_model.model.<module>.lora_magnitude_vector     [out], with DoRA

and what `peft_whole` tells of.
"""

import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from qlora_jax import atomic
from qlora_jax.interop import peft_whole
from qlora_jax.interop.safetensors import SafetensorsFiles, read_json
from qlora_jax.interop.safetensors import load as load_tensors
from qlora_jax.interop.weights import ModelFileError
from qlora_jax.lora.places import listed

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

_KEY = re.compile(
    r"base_model\.model\.(?P<module>.+)\."
    r"(?:lora_(?P<factor>[AB])\.weight|lora_(?P<magnitude>magnitude_vector)(\.weight)?)"
)

# Fields of a config that change what an adapter computes and that are not done here.
_UNSUPPORTED = (
    "alora_invocation_tokens",
    "arrow_config",
    "fan_in_fan_out",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "monteclora_config",
    "target_parameters",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)
# Initialisations that leave the base as it is. The others (pissa, olora, corda, loftq,
# lora_ga) adapt a base that they changed, which is not the checkpoint's.
_PLAIN_INITS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")


@dataclasses.dataclass
class Part:
    """The tensors of one module, as in the file, and what they are called there."""

    module: str
    tensors: dict[str, np.ndarray]


def save(
    folder: str | os.PathLike[str],
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
) -> None:
    """Writes the two files of an adapter, each replaced at once.

    Args:
        folder: made if there is none.
        config: what adapter_config.json holds.
        tensors: by the names that PEFT gives them.
    """
    import safetensors.numpy

    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    data = safetensors.numpy.save(dict(tensors), metadata={"format": "pt"})
    atomic.write(folder / WEIGHTS, data)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    atomic.write(folder / CONFIG, text)


def load(
    folder: str | os.PathLike[str],
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Returns the config and the tensors of an adapter, as the files have them.

    Raises:
        ModelFileError: if files are missing or damaged.
    """
    folder = pathlib.Path(folder)
    return read_json(folder / CONFIG), load_tensors(folder / WEIGHTS)


def check_config(path: pathlib.Path, config: Mapping[str, Any]) -> None:
    """Refuses an adapter's config that is damaged, or of a kind that is not done here.

    Raises:
        ModelFileError: naming the field that is damaged.
        NotImplementedError: naming the field that asks for something else.
    """
    kind = config.get("peft_type")
    if kind != "LORA":
        raise NotImplementedError(f"{path}: peft_type {kind!r}; supported is 'LORA'.")
    for field in _UNSUPPORTED:
        if config.get(field):
            raise NotImplementedError(f"{path}: {field}={config[field]!r}.")
    if (bias := config.get("bias", "none")) not in peft_whole.BIAS:
        raise ModelFileError(
            f"{path}: bias is {bias!r}, none of {', '.join(peft_whole.BIAS)}."
        )
    if (init := config.get("init_lora_weights")) not in _PLAIN_INITS:
        raise NotImplementedError(
            f"{path}: init_lora_weights={init!r} adapts a base that it changed; "
            "convert the adapter to one of the original base when saving it from PEFT "
            "(path_initial_model_for_weight_conversion)."
        )
    for field, patterns, kind in (
        ("r", "rank_pattern", int),
        ("lora_alpha", "alpha_pattern", int | float),
    ):
        named = config.get(patterns) or {}
        if not isinstance(named, dict):
            raise ModelFileError(f"{path}: {patterns} is no object.")
        for key, value in {field: config.get(field), **named}.items():
            if isinstance(value, bool) or not isinstance(value, kind) or value <= 0:
                raise ModelFileError(
                    f"{path}: {key} is {value!r}, not a positive number."
                )
        for pattern in named:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ModelFileError(
                    f"{path}: {patterns} {pattern!r} is no regular expression: {error}."
                ) from None


def token_indices_of(
    path: pathlib.Path, config: Mapping[str, Any]
) -> dict[str, list[int]]:
    """Returns which rows were trained, by the name of the tensor they are of."""
    given = config.get("trainable_token_indices") or {}
    if isinstance(given, list):
        given = {"embed_tokens": given}
    is_table = isinstance(given, dict) and all(
        isinstance(rows, list) and all(type(row) is int for row in rows)
        for rows in given.values()
    )
    if not is_table:
        raise ModelFileError(f"{path}: trainable_token_indices is {given!r}.")
    if unknown := [name for name in given if name.split(".")[-1] != "embed_tokens"]:
        raise NotImplementedError(
            f"{path}: trainable_token_indices of {unknown}; only rows of embed_tokens "
            "are read."
        )
    rows = list(given.values())
    return {peft_whole.EMBEDDING: rows[0]} if rows else {}


def read_parts(
    path: pathlib.Path, modules: Mapping[str, tuple[str, Any]]
) -> "tuple[dict[tuple[str, Any], Part], peft_whole.Whole]":
    """Reads an adapter file.

    Args:
        path: the safetensors file.
        modules: where each module of the base is.

    Returns:
        The factors, by the place of their module in the model, and what the file holds
        besides.
    """
    if not path.is_file():
        pickled = path.with_suffix(".bin")
        why = (
            f"; {pickled.name} is pickled, which can run code, and is not read: save "
            "the adapter with safe_serialization=True"
            if pickled.is_file()
            else ""
        )
        raise ModelFileError(f"{path} is missing{why}.")
    parts: dict[tuple[str, Any], Part] = {}
    whole = peft_whole.Whole({}, {})
    files = SafetensorsFiles([path])
    for key in files.tensors:
        match = _KEY.fullmatch(key)
        if match is None and whole.take(key, files.read):
            continue
        if match is None:
            raise ModelFileError(f"{path}: {key!r} is no tensor of LoRA.")
        module = match["module"]
        if module not in modules:
            raise ModelFileError(
                f"{path}: {key!r} is of a module that the model has not. Its "
                f"modules are: {listed(sorted(modules))}."
            )
        part = parts.setdefault(modules[module], Part(module, {}))
        kind = match["factor"] or "magnitude"
        part.tensors[kind] = files.read(key)
    if not parts and not whole.tensors and not whole.rows:
        raise ModelFileError(f"{path} holds no tensor.")
    for part in parts.values():
        for kind in "AB":
            if kind not in part.tensors:
                raise ModelFileError(f"{path}: {part.module}.lora_{kind} is missing.")
    return parts, whole


def pattern_value(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that the end of the module's name matches."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default

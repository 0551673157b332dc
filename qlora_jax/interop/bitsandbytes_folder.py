"""Hugging Face folders whose linear weights bitsandbytes has quantized."""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from qlora_jax.interop.bitsandbytes import from_int8, from_state, state_of
from qlora_jax.interop.safetensors import SafetensorsSource, read_json
from qlora_jax.interop.weights import ModelFileError, Source
from qlora_jax.quant.tensor import QuantizedTensor

_MARK = ".quant_state.bitsandbytes__"
_SCALE = ".SCB"
_PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")


class BitsandbytesSource:
    """A folder with weights in 4 or 8 bits, whose bytes are taken as they are.

    Attributes:
        config: read from `config.json`.
        folder: the folder.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self._files = SafetensorsSource(folder)
        self.config, self.folder = self._files.config, self._files.folder
        self._keys: dict[str, list[str]] = {}  # of each quantized weight
        shapes = dict(self._files.shapes())
        for key in [key for key in shapes if _MARK in key]:
            name = key.partition(_MARK)[0]
            parts = [name + part for part in _PARTS if name + part in shapes]
            if name in self._keys or name not in shapes:
                raise ModelFileError(
                    f"{self}: {key} must be the one description of a tensor {name}."
                )
            self._keys[name] = [key, *parts, name]
            for part in (key, *parts):
                del shapes[part]
            state = self._checked(state_of, {key: self._files.read_any(key)}, name)
            shapes[name] = tuple(state["shape"])
        for key in [key for key in shapes if key.endswith(_SCALE)]:
            module = key.removesuffix(_SCALE)
            name = f"{module}.weight"
            if name not in shapes or name in self._keys:
                raise ModelFileError(f"{self}: {key} is of no 8-bit weight {name}.")
            self._keys[name] = [key, name]
            del shapes[key]
            if (form := f"{module}.weight_format") in shapes:
                self._check_rows(form)
                del shapes[form]
        self._shapes = shapes

    def _check_rows(self, name: str) -> None:
        form = self._files.read_any(name)
        if form.any():
            raise NotImplementedError(
                f"{self}: {name} is {form.tolist()}, a layout of GPUs; only 0 is "
                "read: save it again with a newer bitsandbytes."
            )

    def __str__(self) -> str:
        return str(self.folder)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Returns the shape of every tensor by its name; of weights, as [out, in]."""
        return self._shapes

    def nbytes(self, name: str) -> int:
        """Returns how many bytes of the files one tensor takes, with its scales."""
        return sum(map(self._files.nbytes, self._keys.get(name, [name])))

    def read(self, name: str) -> np.ndarray | QuantizedTensor:
        """Returns one tensor."""
        if name not in self._keys:
            return self._files.read(name)
        tensors = {key: self._files.read_any(key) for key in self._keys[name]}
        if (scale := self._keys[name][0]).endswith(_SCALE):
            try:
                return from_int8(tensors[name], tensors[scale], name)
            except ValueError as error:
                raise ModelFileError(f"{self}: {error}") from None
        return self._checked(from_state, tensors, name)

    def _checked(self, read: Any, tensors: Mapping[str, np.ndarray], name: str) -> Any:
        try:
            return read(tensors, name)
        except ValueError as error:
            raise ModelFileError(f"{self}: {error}") from None


def open_folder(folder: str | os.PathLike[str]) -> Source:
    """Returns the reader of a Hugging Face folder, quantized or not.

    Raises:
        ModelFileError: if files are missing, damaged or inconsistent.
        NotImplementedError: if it was quantized in a way that is not read, named.
    """
    config = read_json(SafetensorsSource.config_path(folder))
    quantization = config.get("quantization_config")
    if not quantization:
        return SafetensorsSource(folder)
    if not isinstance(quantization, dict):
        raise ModelFileError(f"{folder}: quantization_config is {quantization!r}.")
    method = quantization.get("quant_method")
    if method != "bitsandbytes" and not quantization.get("load_in_4bit"):
        raise NotImplementedError(
            f"{folder} was quantized by {method!r}; read are the weights of "
            "bitsandbytes. Take the model it was made from, and quantize= it here."
        )
    return BitsandbytesSource(folder)

"""Hugging Face folders: config.json and one or several safetensors files."""

import contextlib
import json
import math
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from qlora_jax.interop.weights import ModelFileError
from qlora_jax.models.config import config_from_hf

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_FLOATING = ("F64", "F32", "F16", "BF16")
_READ = (*_FLOATING, "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64", "BOOL")
_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4} | {
    "F16": 2,
    "BF16": 2,
    "I16": 2,
    "U16": 2,
}


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Returns the object in a JSON file.

    Raises:
        ModelFileError: if it is missing, not JSON, or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelFileError(f"{path} is missing.") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelFileError(f"{path} is not JSON: {error}.") from None
    if not isinstance(value, dict):
        raise ModelFileError(f"{path} holds no JSON object.")
    return value


def refuse_pickle(path: pathlib.Path) -> None:
    """Refuses a pickled file of weights, or a folder that holds one.

    Raises:
        ModelFileError: naming the file and the way to convert it.
    """
    found = sorted(path.iterdir()) if path.is_dir() else [path]
    for file in found:
        if file.suffix in _PICKLED:
            raise ModelFileError(
                f"{file} holds pickled weights: reading them can run code, so they are "
                "not read. If you trust where they come from, convert them where "
                "transformers is installed: AutoModelForCausalLM.from_pretrained("
                "folder).save_pretrained(other, safe_serialization=True)."
            )


@contextlib.contextmanager
def _opened(path: pathlib.Path) -> Iterator[Any]:
    import safetensors

    try:
        # Read, not mapped: a page at a time takes six times as long.
        with safetensors.safe_open(path, "numpy", backend="pread") as file:
            yield file
    except (safetensors.SafetensorError, FileNotFoundError) as error:
        raise ModelFileError(
            f"{path} cannot be read ({error}): the file is missing, truncated or "
            "damaged; download it again."
        ) from None


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    if (folder / _INDEX).is_file():
        weight_map = read_json(folder / _INDEX).get("weight_map", {})
        if not isinstance(weight_map, dict) or not all(
            isinstance(name, str) for name in weight_map.values()
        ):
            raise ModelFileError(f"{folder / _INDEX}: weight_map names no files.")
        names = sorted(set(weight_map.values()))
        if any(os.path.basename(name) != name for name in names):
            raise ModelFileError(f"{folder / _INDEX} names files outside its folder.")
        if absent := [name for name in names if not (folder / name).is_file()]:
            raise ModelFileError(
                f"{folder} lacks {', '.join(absent[:3])}, which its index names; "
                "download it again."
            )
        return [folder / name for name in names]
    refuse_pickle(folder)
    raise ModelFileError(f"{folder} has neither {_SINGLE} nor {_INDEX}.")


class SafetensorsSource:
    """A Hugging Face folder; tensors are read one at a time.

    Attributes:
        config: read from `config.json`.
        folder: the folder.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = pathlib.Path(folder)
        self.config = config_from_hf(read_json(self.config_path(folder)))
        self._file_of: dict[str, pathlib.Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._types: dict[str, str] = {}
        for path in _files(self.folder):
            with _opened(path) as file:
                for name in file.keys():
                    self._file_of[name] = path
                    view = file.get_slice(name)
                    self._shapes[name] = tuple(view.get_shape())
                    self._types[name] = view.get_dtype()

    def __str__(self) -> str:
        return str(self.folder)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Returns the shape of every tensor by its name."""
        return self._shapes

    def nbytes(self, name: str) -> int:
        """Returns how many bytes of the files one tensor takes."""
        return math.prod(self._shapes[name]) * _BYTES.get(self._types[name], 1)

    def read(self, name: str) -> np.ndarray:
        """Returns one tensor.

        Raises:
            ModelFileError: if it does not hold floating-point numbers.
        """
        if self._types[name] not in _FLOATING:
            raise ModelFileError(
                f"{self._file_of[name]}: {name} is of type {self._types[name]}; a "
                f"weight is one of {', '.join(_FLOATING)}."
            )
        return self.read_any(name)

    def read_any(self, name: str) -> np.ndarray:
        """Returns one tensor, of integers too."""
        if self._types[name] not in _READ:
            raise ModelFileError(
                f"{self._file_of[name]}: {name} is of type {self._types[name]}, which "
                f"is not read; what is read is {', '.join(_READ)}."
            )
        with _opened(self._file_of[name]) as file:
            return file.get_tensor(name)

    @staticmethod
    def config_path(folder: str | os.PathLike[str]) -> pathlib.Path:
        """Returns where a folder describes its model."""
        return pathlib.Path(folder) / "config.json"

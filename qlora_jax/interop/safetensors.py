"""Hugging Face folders: config.json and one or several safetensors files."""

import contextlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from qlora_jax.interop.weights import ModelFileError
from qlora_jax.models.config import config_from_hf

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


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


@contextlib.contextmanager
def _opened(path: pathlib.Path) -> Iterator[Any]:
    import safetensors

    try:
        with safetensors.safe_open(path, "numpy") as file:
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
        names = sorted(set(weight_map.values()))
        if any(os.path.basename(name) != name for name in names):
            raise ModelFileError(f"{folder / _INDEX} names files outside its folder.")
        if absent := [name for name in names if not (folder / name).is_file()]:
            raise ModelFileError(
                f"{folder} lacks {', '.join(absent[:3])}, which its index names; "
                "download it again."
            )
        return [folder / name for name in names]
    if any(folder.glob("*.bin")):
        raise ModelFileError(
            f"{folder} holds pickled .bin weights, which can run code and are not "
            "read; save the model with safe_serialization=True."
        )
    raise ModelFileError(f"{folder} has neither {_SINGLE} nor {_INDEX}.")


class SafetensorsSource:
    """A Hugging Face folder; tensors are read one at a time.

    Attributes:
        config: read from `config.json`.
        folder: the folder.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = pathlib.Path(folder)
        self.config = config_from_hf(read_json(self.folder / "config.json"))
        self._file_of: dict[str, pathlib.Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for path in _files(self.folder):
            with _opened(path) as file:
                for name in file.keys():
                    self._file_of[name] = path
                    self._shapes[name] = tuple(file.get_slice(name).get_shape())

    def __str__(self) -> str:
        return str(self.folder)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Returns the shape of every tensor by its name."""
        return self._shapes

    def read(self, name: str) -> np.ndarray:
        """Returns one tensor."""
        with _opened(self._file_of[name]) as file:
            return file.get_tensor(name)

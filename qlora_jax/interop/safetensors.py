"""Hugging Face folders: config.json and one or several safetensors files."""

import contextlib
import json
import math
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from qlora_jax.atomic import new_file
from qlora_jax.interop.safetensors_header import BITS, fault_of
from qlora_jax.interop.weights import ModelFileError
from qlora_jax.models.config import LlamaConfig
from qlora_jax.models.config_hf import config_from_hf

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_FLOATING = ("F64", "F32", "F16", "BF16")
_READ = (*_FLOATING, "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64", "BOOL")


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Returns the object in a JSON file.

    Raises:
        ModelFileError: if it is missing, not JSON, or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelFileError(
            f"{path} is missing: give a folder that has it, or download it again."
        ) from None
    except OSError as error:
        raise ModelFileError(f"{path} cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, or not JSON
        raise ModelFileError(
            f"{path} is not JSON: {error}. Download it again."
        ) from None
    if not isinstance(value, dict):
        raise ModelFileError(f"{path} holds no JSON object.")
    return value


def read_config(path: pathlib.Path) -> LlamaConfig:
    """Returns the shape of the model that a config.json describes.

    Raises:
        ModelFileError: if the file is missing or damaged.
        NotImplementedError: if the model is not supported; both name file and field.
    """
    try:
        return config_from_hf(read_json(path))
    except ModelFileError:
        raise
    except NotImplementedError as error:
        raise NotImplementedError(f"{path}: {error}") from None
    except ValueError as error:
        raise ModelFileError(f"{path}: {error}") from None


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
    except FileNotFoundError:
        raise ModelFileError(f"{path} is missing: download it again.") from None
    except safetensors.SafetensorError as error:
        # The library does not say which tensor is wrong.
        fault = fault_of(path) or str(error)
        raise ModelFileError(
            f"{path} cannot be read: {fault}. Download it again."
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
    raise ModelFileError(
        f"{folder} has neither {_SINGLE} nor {_INDEX}: download the weights too."
    )


class SafetensorsFiles:
    """The tensors of one or several files, read one at a time.

    Attributes:
        tensors: file and shape of every tensor by its name.
        metadata: texts that the files carry.
    """

    def __init__(self, paths: Sequence[pathlib.Path]):
        self.tensors: dict[str, tuple[pathlib.Path, tuple[int, ...]]] = {}
        self.metadata: dict[str, str] = {}
        self._types: dict[str, str] = {}
        for path in paths:
            with _opened(path) as file:
                self.metadata |= file.metadata() or {}
                for name in file.keys():
                    view = file.get_slice(name)
                    self.tensors[name] = path, tuple(view.get_shape())
                    self._types[name] = view.get_dtype()

    @classmethod
    def of_folder(cls, folder: str | os.PathLike[str]) -> "SafetensorsFiles":
        """Returns those of a model's folder: its one file, or the shards of its index.

        Raises:
            ModelFileError: if there is neither, or a shard is missing or damaged.
        """
        return cls(_files(pathlib.Path(folder)))

    def type(self, name: str) -> str:
        """Returns the type of a tensor, in the format's words: "BF16", "U8"."""
        return self._types[name]

    def nbytes(self, name: str) -> int:
        """Returns how many bytes of the files one tensor takes."""
        numbers = math.prod(self.tensors[name][1])
        return numbers * BITS.get(self._types[name], 8) // 8

    def read(self, name: str) -> np.ndarray:
        """Returns one tensor.

        Raises:
            ModelFileError: if the file is damaged or the type is not read.
        """
        path, _ = self.tensors[name]
        if self._types[name] not in _READ:
            raise ModelFileError(
                f"{path}: {name} is of type {self._types[name]}, which is not read; "
                f"what is read is {', '.join(_READ)}."
            )
        with _opened(path) as file:
            return file.get_tensor(name)


def load(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Returns all tensors of a file or of a model's folder.

    Args:
        path: a `.safetensors` file, or a folder with one or with shards.

    Raises:
        ModelFileError: if files are missing or damaged, or a type is not read.
    """
    path = pathlib.Path(path)
    is_folder = path.is_dir()
    files = SafetensorsFiles.of_folder(path) if is_folder else SafetensorsFiles([path])
    return {name: files.read(name) for name in files.tensors}


def save(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes tensors to a file, which appears whole or not at all.

    Args:
        path: the file.
        tensors: arrays of numpy or JAX by their names.
        metadata: texts to go along; None: what PyTorch's readers ask for.
    """
    arrays = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    with new_file(path) as partial:
        write(partial, arrays, metadata)


def write(
    path: pathlib.Path,
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes tensors to a new file, which whoever may read its neighbours can read.

    Args:
        path: the file.
        tensors: by their names, contiguous.
        metadata: texts to go along; None: what PyTorch's readers ask for.
    """
    import safetensors.numpy

    path.touch()
    mode = path.stat().st_mode
    given = {"format": "pt"} if metadata is None else dict(metadata)
    safetensors.numpy.save_file(dict(tensors), path, given)
    path.chmod(mode)  # the library leaves it to its owner alone


class SafetensorsSource:
    """A Hugging Face folder; tensors are read one at a time.

    Attributes:
        config: read from `config.json`.
        folder: the folder.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = pathlib.Path(folder)
        self.config = read_config(self.config_path(folder))
        self._files = SafetensorsFiles.of_folder(folder)

    def __str__(self) -> str:
        return str(self.folder)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Returns the shape of every tensor by its name."""
        return {name: shape for name, (_, shape) in self._files.tensors.items()}

    def nbytes(self, name: str) -> int:
        """Returns how many bytes of the files one tensor takes."""
        return self._files.nbytes(name)

    def read(self, name: str) -> np.ndarray:
        """Returns one tensor.

        Raises:
            ModelFileError: if it does not hold floating-point numbers.
        """
        kind = self._files.type(name)
        if kind not in _FLOATING:
            raise ModelFileError(
                f"{self._files.tensors[name][0]}: {name} is of type {kind}; a weight "
                f"is one of {', '.join(_FLOATING)}."
            )
        return self._files.read(name)

    def read_any(self, name: str) -> np.ndarray:
        """Returns one tensor, of integers too."""
        return self._files.read(name)

    @staticmethod
    def config_path(folder: str | os.PathLike[str]) -> pathlib.Path:
        """Returns where a folder describes its model."""
        return pathlib.Path(folder) / "config.json"

"""What a checkpoint holds: a table of its tensors, read from the headers alone."""

import collections
import dataclasses
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from qlora_jax.interop import peft_files
from qlora_jax.interop.gguf import GGUFFile
from qlora_jax.interop.hub import find_model
from qlora_jax.interop.safetensors import SafetensorsFiles, read_json, refuse_pickle
from qlora_jax.interop.weights import ModelFileError

# Of bitsandbytes: what belongs to a weight and stands for no parameter of its own.
_SCALES = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ".SCB")
_SCALES += (".weight_format",)
_STATE = ".quant_state.bitsandbytes__"


@dataclasses.dataclass(frozen=True)
class TensorRow:
    """A tensor of a file, as its header has it.

    Attributes:
        name: of the tensor.
        type: of its numbers: "BF16", "U8", "Q4_K", ...
        shape: as stored.
        nbytes: in the file.
        file: the name of the file.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    nbytes: int
    file: str


@dataclasses.dataclass(frozen=True)
class Contents:
    """What a checkpoint holds.

    Attributes:
        path: where it is.
        kind: "safetensors", "gguf", "folder" or "adapter".
        tensors: in the order of the files, within one by name.
        metadata: of the file, or the folder's config.json or adapter_config.json.
    """

    path: pathlib.Path
    kind: str
    tensors: list[TensorRow]
    metadata: Mapping[str, Any]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(row.nbytes for row in self.tensors)

    @property
    def parameters(self) -> int:
        """Numbers that the tensors stand for: two a byte of 4-bit codes, no scales."""
        is_4bit = {
            row.name.partition(_STATE)[0] for row in self.tensors if _STATE in row.name
        }
        count = 0
        for row in self.tensors:
            if row.name in is_4bit:
                count += 2 * row.nbytes
            elif _STATE not in row.name and not row.name.endswith(_SCALES):
                count += math.prod(row.shape)
        return count

    def table(self, limit: int | None = None) -> str:
        """Returns the tensors as aligned text, totals by type at the end.

        Args:
            limit: show the first of many; None: all.
        """
        shown = self.tensors if limit is None else self.tensors[:limit]
        lines = [("tensor", "type", "shape", "bytes")]
        lines += [
            (row.name, row.type, str(list(row.shape)), f"{row.nbytes:,}")
            for row in shown
        ]
        if len(shown) < len(self.tensors):
            lines.append((f"... {len(self.tensors) - len(shown)} more", "", "", ""))
        lines.append(("", "", "", ""))
        by_type: dict[str, int] = collections.defaultdict(int)
        for row in self.tensors:
            by_type[row.type] += row.nbytes
        for kind, nbytes in sorted(by_type.items(), key=lambda item: -item[1]):
            count = sum(row.type == kind for row in self.tensors)
            lines.append((f"{count} tensors", kind, "", f"{nbytes:,}"))
        total = f"{self.parameters:,} parameters in {len(self.tensors)} tensors"
        lines.append((total, "", "", f"{self.nbytes:,}"))
        widths = [max(len(line[i]) for line in lines) for i in range(4)]
        return "\n".join(
            f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:<{widths[2]}}  {d:>{widths[3]}}"
            for a, b, c, d in lines
        )


def inspect_file(path: str | os.PathLike[str], revision: str | None = None) -> Contents:
    """Returns what a checkpoint holds; only headers are read.

    Args:
        path: a `.safetensors` or `.gguf` file, the folder of a model (of one file or
            sharded, dense or quantized) or of an adapter, or a hub name.
        revision: of a model on the hub.

    Raises:
        ModelFileError: if there is no such file, or its header is damaged.
    """
    path = find_model(path, revision)
    if path.is_dir():
        return _folder(path)
    refuse_pickle(path)
    if path.suffix == ".safetensors":
        files = SafetensorsFiles([path])
        return Contents(path, "safetensors", _rows(files), files.metadata)
    file = GGUFFile(path)
    rows = [
        TensorRow(name, info.type.name, info.shape, info.nbytes, path.name)
        for name, info in file.tensors.items()
    ]
    return Contents(path, "gguf", rows, file.metadata)


def _folder(path: pathlib.Path) -> Contents:
    if (path / peft_files.CONFIG).is_file():
        weights = path / peft_files.WEIGHTS
        if not weights.is_file():
            refuse_pickle(path)
            raise ModelFileError(f"{weights} is missing.")
        rows = _rows(SafetensorsFiles([weights]))
        return Contents(path, "adapter", rows, read_json(path / peft_files.CONFIG))
    rows = _rows(SafetensorsFiles.of_folder(path))
    config = path / "config.json"
    metadata = read_json(config) if config.is_file() else {}
    return Contents(path, "folder", rows, metadata)


def _rows(files: SafetensorsFiles) -> list[TensorRow]:
    return [
        TensorRow(name, files.type(name), shape, files.nbytes(name), file.name)
        for name, (file, shape) in files.tensors.items()
    ]

"""A checkpoint with an adapter added to its weights, read one tensor at a time."""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax.interop import peft_whole
from qlora_jax.interop.peft_files import (
    CONFIG,
    WEIGHTS,
    Part,
    check_config,
    pattern_value,
    read_parts,
    token_indices_of,
)
from qlora_jax.interop.safetensors import read_json
from qlora_jax.interop.weights import ModelFileError, Source
from qlora_jax.lora.lora import scale_of
from qlora_jax.lora.merge import Drift
from qlora_jax.quant import QuantizedTensor, dequantize


class MergedSource:
    """Another source, with w + scale · b a in place of each adapted weight w.

    With DoRA the rows of that sum are scaled to the magnitudes of the file. Computed in
    float32 and rounded once to the type of the base; a weight that was quantized is
    dense afterwards. Modules that were trained whole replace those of the base.

    Attributes:
        config: of the base.
        base: the source of the base.
        folder: of the adapter.
    """

    def __init__(
        self, base: Source, folder: str | os.PathLike[str], name: str = "default"
    ):
        self.base, self.config = base, base.config
        self.folder = pathlib.Path(folder)
        if name != "default":
            self.folder /= name
        self._settings = read_json(self.folder / CONFIG)
        check_config(self.folder / CONFIG, self._settings)
        modules = {
            tensor.removesuffix(".weight"): (tensor, ()) for tensor in base.shapes()
        }
        parts, self._whole = read_parts(self.folder / WEIGHTS, modules)
        self._parts = {tensor: part for (tensor, _), part in parts.items()}
        self._indices = token_indices_of(self.folder / CONFIG, self._settings)
        for tensor, part in self._parts.items():
            self._check_fits(tensor, part)
        self._check_whole()

    def __str__(self) -> str:
        return f"{self.base} with {self.folder}"

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Returns the shape of every tensor by its name, those of the base."""
        return self.base.shapes()

    def nbytes(self, name: str) -> int:
        """Returns how many bytes of the base's files one tensor takes."""
        return self.base.nbytes(name)

    def read(self, name: str) -> np.ndarray | QuantizedTensor:
        """Returns one tensor, the adapter in it."""
        if name in self._whole.tensors:
            return self._whole.tensors[name]
        weight = self.base.read(name)
        if name in self._whole.rows:
            weight = np.array(weight)
            weight[self._indices[name]] = self._whole.rows[name].astype(weight.dtype)
        if name not in self._parts:
            return weight
        weight = _dense(weight)
        return np.asarray(self._sum(name, weight).astype(weight.dtype))

    def drift(self, written: Source) -> dict[str, Drift]:
        """Returns how far each adapted weight of a file is from what was meant.

        Args:
            written: the source of the file that this was written into.
        """
        found = {}
        for name in self._parts:
            before = _dense(self.base.read(name))
            meant = self._sum(name, before)
            sums = _squares(before, meant, _dense(written.read(name)))
            error, change, size = map(float, sums)
            found[name] = Drift((error / size) ** 0.5, (change / size) ** 0.5)
        return found

    def _sum(self, name: str, weight: jax.Array) -> jax.Array:
        """The base's weight with its adapter, [out, in], in float32."""
        part = self._parts[name]
        return _merged(
            weight,
            jnp.asarray(part.tensors["A"], jnp.float32),
            jnp.asarray(part.tensors["B"], jnp.float32) * self._scale(part.module),
            part.tensors.get("magnitude"),
        )

    def _rank(self, module: str) -> int:
        patterns = self._settings.get("rank_pattern") or {}
        return pattern_value(patterns, module, self._settings["r"])

    def _scale(self, module: str) -> float:
        patterns = self._settings.get("alpha_pattern") or {}
        alpha = pattern_value(patterns, module, self._settings["lora_alpha"])
        rslora = bool(self._settings.get("use_rslora"))
        return scale_of(self._rank(module), alpha, rslora)

    def _check_fits(self, tensor: str, part: Part) -> None:
        n_out, n_in = self.base.shapes()[tensor]
        rank = self._rank(part.module)
        wanted = {"A": (rank, n_in), "B": (n_out, rank), "magnitude": (n_out,)}
        for kind, found in part.tensors.items():
            if found.shape != wanted[kind]:
                raise ModelFileError(
                    f"{self.folder / WEIGHTS}: {part.module}.lora_{kind} is "
                    f"{list(found.shape)}, and the model and rank {rank} make it "
                    f"{list(wanted[kind])}."
                )
        if self._settings.get("use_dora") and "magnitude" not in part.tensors:
            raise ModelFileError(f"{part.module}.lora_magnitude_vector is missing.")

    def _check_whole(self) -> None:
        shapes: dict[str, Any] = dict(self.base.shapes())
        tied = self.config.tie_embeddings
        for tensor, value in self._whole.tensors.items():
            if tied and tensor == peft_whole.HEAD and tensor not in shapes:
                continue  # compared with the embedding below
            if shapes.get(tensor) != value.shape:
                raise NotImplementedError(
                    f"{self.folder / WEIGHTS}: {tensor} is {list(value.shape)}, and "
                    f"the base has {shapes.get(tensor)}. Load model and adapter, and "
                    "save the model."
                )
        for tensor, rows in self._whole.rows.items():
            at, shape = self._indices.get(tensor, []), shapes.get(tensor, (0, 0))
            if rows.shape != (len(at), shape[1]) or not all(
                0 <= i < shape[0] for i in at
            ):
                raise ModelFileError(
                    f"{self.folder / WEIGHTS}: rows {list(rows.shape)} of {tensor} do "
                    f"not fit trainable_token_indices and {list(shape)}."
                )
        if tied and (
            (head := self._whole.tensors.get(peft_whole.HEAD)) is not None
            or peft_whole.EMBEDDING in self._whole.tensors
        ):
            table = self._whole.tensors.get(peft_whole.EMBEDDING)
            if head is None or table is None or not np.array_equal(head, table):
                raise NotImplementedError(
                    f"{self.folder / WEIGHTS} parts the embedding from the head tied "
                    "to it. Load model and adapter, and save the model."
                )


@jax.jit
def _merged(w: jax.Array, a: jax.Array, b: jax.Array, magnitude: Any) -> jax.Array:
    product = jnp.matmul(b, a, precision=jax.lax.Precision.HIGHEST)
    total = w.astype(jnp.float32) + product
    if magnitude is not None:
        norm = jnp.linalg.norm(total, axis=1, keepdims=True)
        total = total * (magnitude.astype(jnp.float32)[:, None] / norm)
    return total


def _dense(weight: np.ndarray | QuantizedTensor) -> jax.Array:
    if isinstance(weight, QuantizedTensor):
        return dequantize(weight).T
    return jnp.asarray(weight)


@jax.jit
def _squares(
    before: jax.Array, meant: jax.Array, stored: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Squared norms: of the error, of what the adapter changed, of what was meant."""
    before, stored = before.astype(jnp.float32), stored.astype(jnp.float32)
    error, change, size = (
        jnp.square(part).sum() for part in (stored - meant, meant - before, meant)
    )
    return error, change, size

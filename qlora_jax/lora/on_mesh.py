"""An adapter beside a weight that lies on several devices."""

import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qlora_jax.lora.lora import LoraTensor
from qlora_jax.quant import QuantizedTensor
from qlora_jax.sharding import mesh_of, parts_of


def on_mesh_of_base(lt: LoraTensor) -> LoraTensor:
    """Returns the adapter split over devices as the features of its weight are.

        w [*stack, in, out]:   in over "fsdp",  out over "model"
        a [*stack, in, rank]:  in over "fsdp"
        b [*stack, rank, out]:                  out over "model"

    Its optimizer's state, made from it, is split likewise. On one device it would be
    refused beside a weight on several as soon as something binds it there, as state in
    host memory does.

    Args:
        lt: of arrays. Beside a weight on one device, or while it is traced, nothing is
            moved.
    """
    mesh = mesh_of(lt.w)
    if mesh is None:
        return lt
    into, out = _features(lt.w)
    stack = (None,) * (lt.ndim - 2)
    specs = {
        "a": (*stack, into, None),
        "b": (*stack, None, out),
        "magnitude": (*stack, out),
        "square_norm": (*stack, out),
    }
    placed = {
        name: jax.device_put(leaf, NamedSharding(mesh, _shortest(mesh, spec)))
        for name, spec in specs.items()
        if (leaf := getattr(lt, name)) is not None
    }
    return dataclasses.replace(lt, **placed)


def _shortest(mesh: Mesh, spec: tuple[Any, ...]) -> PartitionSpec:
    """The spec without what splits nothing, as a program gives it back.

    One that says the same in other words would be compiled for again.
    """
    kept = [axes if parts_of(mesh, axes) > 1 else None for axes in spec]
    while kept and kept[-1] is None:
        kept.pop()
    return PartitionSpec(*kept)


def _features(w: Any) -> tuple[Any, Any]:
    """The mesh axes of a weight's in and out."""
    array = w.codes if isinstance(w, QuantizedTensor) else w
    if not isinstance(array, jax.Array) or not isinstance(
        array.sharding, NamedSharding
    ):
        return None, None
    # A spec ends where nothing more is split.
    spec = [*array.sharding.spec, *[None] * array.ndim]
    first, second = spec[array.ndim - 2 : array.ndim]
    is_quantized = isinstance(w, QuantizedTensor)  # with codes [*stack, out, in]
    return (second, first) if is_quantized else (first, second)

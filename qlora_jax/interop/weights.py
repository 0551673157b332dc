"""What every reader of checkpoints shares: names, shapes, and their check.

A reader is a `Source`: a config, the names of its tensors, and a way to read one. Names
and orientation are those of Hugging Face checkpoints ([out, in]); a reader of another
format translates.
"""

import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax.models.config import ATTENTION_WEIGHTS, LINEAR_WEIGHTS, LlamaConfig
from qlora_jax.quant import QuantizedTensor, quantize

# In old checkpoints: a buffer that the config determines.
_IGNORED = re.compile(r"\.rotary_emb\.inv_freq$")


class ModelFileError(ValueError):
    """A model file that is missing, truncated, or not what it says it is."""


@runtime_checkable
class Source(Protocol):
    """A checkpoint: Hugging Face names and shapes, read one tensor at a time."""

    config: LlamaConfig

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Returns the shape of every tensor by its name, reading none of them."""
        ...

    def read(self, name: str) -> np.ndarray | QuantizedTensor:
        """Returns one tensor, a weight as [out, in] or as it was quantized."""
        ...

    def nbytes(self, name: str) -> int:
        """Returns how many bytes of the files one tensor takes."""
        ...


def hf_name(attribute: str) -> str:
    """Returns the checkpoint's name of a layer's attribute; `{}` is the layer."""
    stem, bias, _ = attribute.partition("_bias")
    if stem in LINEAR_WEIGHTS or stem in ("q_norm", "k_norm"):
        in_attention = stem in ATTENTION_WEIGHTS or stem in ("q_norm", "k_norm")
        stem = f"{'self_attn' if in_attention else 'mlp'}.{stem}"
    return f"model.layers.{{}}.{stem}.{'bias' if bias else 'weight'}"


def expected_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Returns the name and shape of every tensor a checkpoint of this config holds."""
    c = config
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (c.vocab_size, c.hidden_size),
        "model.norm.weight": (c.hidden_size,),
    }
    if not c.tie_embeddings:
        shapes["lm_head.weight"] = (c.vocab_size, c.hidden_size)
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm": (c.hidden_size,),
        "post_attention_layernorm": (c.hidden_size,),
    }
    if c.qk_norm:
        layer |= {"q_norm": (c.head_dim,), "k_norm": (c.head_dim,)}
    for name, (inner, outer) in c.linear_shapes().items():
        layer[name] = (outer, inner)
        if name in c.biased():
            layer[f"{name}_bias"] = (outer,)
    for name, shape in layer.items():
        for i in range(c.num_layers):
            shapes[hf_name(name).format(i)] = shape
    return shapes


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def check_tensors(source: Source) -> None:
    """Compares names and shapes with the config's, before anything is read.

    Raises:
        ModelFileError: naming the tensors that are missing, unexpected or of another
            shape.
    """
    found, layers = dict(source.shapes()), source.config.num_layers
    if layers > len(found):  # before a list of as many names is made
        raise ModelFileError(
            f"{source} holds {len(found)} tensors, and its config says {layers} layers."
        )
    expected = expected_shapes(source.config)
    if source.config.tie_embeddings:
        found.pop("lm_head.weight", None)  # some checkpoints store the tied head too
    unexpected = [n for n in found.keys() - expected.keys() if not _IGNORED.search(n)]
    if missing := expected.keys() - found.keys():
        raise ModelFileError(
            f"{source} lacks {_some(missing)}: download it again, or give the config "
            "that belongs to it."
        )
    if unexpected:
        raise ModelFileError(
            f"{source} has tensors that its config does not explain: "
            f"{_some(unexpected)}. Are the two of one model?"
        )
    for name, shape in expected.items():
        if tuple(found[name]) != shape:
            raise ModelFileError(
                f"{source}: {name} is {list(found[name])}, its config says "
                f"{list(shape)}. Are the two of one model?"
            )


_STATIC = ("format", "double_quant", "block_size", "dtype")


@functools.partial(jax.jit, static_argnames=_STATIC)
def quantize_rows(
    w: jax.Array, format: str, double_quant: bool, block_size: int, dtype: Any
) -> tuple[QuantizedTensor, jax.Array]:
    """Quantizes a weight as a checkpoint has it.

    Args:
        w: [out, in].
        format: as `quantize` takes it.
        double_quant: quantize the scales too.
        block_size: numbers that share a scale.
        dtype: the type the weight is said to have.

    Returns:
        The weight, and whether all its numbers are finite.
    """
    quantized = quantize(w.T, format, block_size=block_size, double_quant=double_quant)
    return dataclasses.replace(quantized, dtype=dtype), jnp.isfinite(w).all()

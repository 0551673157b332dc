"""From named tensors to a model: what every reader of checkpoints shares.

A reader is a `Source`: a config, the names of its tensors, and a way to read one. Names
and orientation are those of Hugging Face checkpoints ([out, in]); a reader of another
format translates. Tensors are read one at a time, quantized, placed, and dropped.
"""

import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qlora_jax.models.config import ATTENTION_WEIGHTS, LINEAR_WEIGHTS, LlamaConfig
from qlora_jax.models.llama import Llama
from qlora_jax.quant import QuantizedTensor
from qlora_jax.quant import quantize as quantize_weight

if TYPE_CHECKING:
    from jax.typing import DTypeLike

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
        raise ModelFileError(f"{source} lacks {_some(missing)}.")
    if unexpected:
        raise ModelFileError(
            f"{source} has tensors that its config does not explain: "
            f"{_some(unexpected)}."
        )
    for name, shape in expected.items():
        if tuple(found[name]) != shape:
            raise ModelFileError(
                f"{source}: {name} is {list(found[name])}, its config says "
                f"{list(shape)}."
            )


@functools.partial(jax.jit, static_argnames=("format", "double_quant", "dtype"))
def _quantized(w: jax.Array, format: str, double_quant: bool, dtype: Any) -> Any:
    quantized = quantize_weight(w.T, format, double_quant=double_quant)
    return dataclasses.replace(quantized, dtype=dtype)


def _kind(w: QuantizedTensor) -> str:
    scales = "with" if w.nested_format is not None else "without"
    return f"{w.format.name} {scales} double quantization, blocks of {w.block_size}"


def _check_agrees(
    where: str, w: QuantizedTensor, quantize: str | None, double_quant: bool
) -> None:
    if quantize is None:
        return
    if (w.format.name, w.nested_format is not None) != (quantize, double_quant):
        raise ValueError(
            f"{where} is already {_kind(w)}; {quantize=} with {double_quant=} asks for "
            "another. Leave quantize out to take it as it is, or load the model it was "
            "made from."
        )


def _check_stacks(where: str, one: Any, first_name: str, first: Any) -> None:
    """Layers are one stacked array, so they must be of one kind, to the last digit."""
    if jax.tree.structure(one) == jax.tree.structure(first):
        return
    kinds = [
        _kind(w) if isinstance(w, QuantizedTensor) else "dense" for w in (one, first)
    ]
    if kinds[0] == kinds[1]:
        what = "has other numbers in quant_map, nested_quant_map or dtype than"
        raise NotImplementedError(
            f"{where} {what} {first_name}; all layers must share them."
        )
    raise NotImplementedError(
        f"{where} is {kinds[0]}, and {first_name} is {kinds[1]}; all layers must be of "
        "one kind."
    )


def build_model(
    source: Source,
    *,
    quantize: str | None = None,
    double_quant: bool = True,
    dtype: "DTypeLike" = jnp.bfloat16,
) -> Llama:
    """Builds the model of a checkpoint, one tensor in host memory at a time.

    Args:
        source: the checkpoint.
        quantize: format of the linear weights of the layers, None to take them as they
            are. Embedding, head and norms stay dense.
        double_quant: quantize the scales too.
        dtype: of what is not quantized, and of the computation.

    Raises:
        ModelFileError: if tensors are missing, unexpected or of another shape.
        ValueError: if weights are already quantized, and not as `quantize` asks.
        NotImplementedError: if layers are quantized differently.
    """
    check_tensors(source)
    config = source.config

    def dense(name: str) -> jax.Array:
        w = source.read(name)
        if isinstance(w, QuantizedTensor):
            raise NotImplementedError(
                f"{source}: {name} is quantized; only weights of linear layers can be."
            )
        return jnp.asarray(w, dtype)

    def weight(name: str) -> Any:
        w = source.read(name)
        if isinstance(w, QuantizedTensor):
            _check_agrees(f"{source}: {name}", w, quantize, double_quant)
            return w
        if quantize is None or name == "lm_head.weight":
            return jnp.asarray(w.T, dtype)
        return _quantized(jnp.asarray(w), quantize, double_quant, jnp.dtype(dtype))

    def stack(attribute: str) -> Any:
        read = weight if attribute in LINEAR_WEIGHTS else dense
        names = [hf_name(attribute).format(i) for i in range(config.num_layers)]
        slices = [read(name) for name in names]
        for name, one in zip(names, slices, strict=True):
            _check_stacks(f"{source}: {name}", one, names[0], slices[0])
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *slices)

    # The structure without its arrays; every parameter is then given its value.
    model = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0), dtype=dtype))
    model.embed = nnx.Param(dense("model.embed_tokens.weight"))
    model.norm = nnx.Param(dense("model.norm.weight"))
    if not config.tie_embeddings:
        model.lm_head = nnx.Param(weight("lm_head.weight"))
    for attribute in [n for n, v in vars(model.layers).items() if _is_param(v)]:
        setattr(model.layers, attribute, nnx.Param(stack(attribute)))
    return model


def _is_param(value: Any) -> bool:
    return isinstance(value, nnx.Param)

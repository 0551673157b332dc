"""Quantized weights to and from the tensors of a bitsandbytes checkpoint.

For a weight `p` of [n, k] = [out, in], bitsandbytes 0.50 writes (DQ: with double
quantization only)

    p                                       uint8    [ceil(n * k / 2), 1]
    p.absmax                                float32  [blocks]    DQ: uint8
    p.quant_map                             float32  [16]
    p.nested_absmax                    DQ   float32  [ceil(blocks / 256)]
    p.nested_quant_map                 DQ   float32  [256]
    p.quant_state.bitsandbytes__nf4         uint8    JSON in UTF-8

The packed codes may also be stored under another dtype of the same bytes (bfloat16,
float16, float32: `bnb_4bit_quant_storage`). In 8 bits (LLM.int8) it writes

    p                                       int8     [n, k]
    p's module.SCB                          float32  [n], the largest of each row
    p's module.weight_format                uint8    [], 0: by row
"""

import json
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from qlora_jax.quant.blockwise import BLOCK_SIZES
from qlora_jax.quant.formats import DYNAMIC8, FORMATS, Format
from qlora_jax.quant.tensor import QuantizedTensor

_STATE = "quant_state.bitsandbytes__"
_KINDS = ("nf4", "fp4")
_DTYPES = ("float32", "bfloat16", "float16")
# Types under which the codes of 4-bit weights may be stored.
STORAGE_TYPES = {
    "uint8": np.dtype(np.uint8),
    "bfloat16": np.dtype(jnp.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
}
_FLOAT32_MAX = float(np.finfo(np.float32).max)


def to_state(
    qt: QuantizedTensor, name: str, *, storage: str = "uint8"
) -> dict[str, np.ndarray]:
    """Returns the tensors that bitsandbytes writes for a 4-bit weight.

    No bit is lost: `from_state` gives the weight back.

    Args:
        qt: an nf4 or fp4 weight without stack axes (take slices of a stack).
        name: the weight's name in the checkpoint, for example
            "model.layers.0.self_attn.q_proj.weight".
        storage: the type under which the bytes of the codes are stored, one of
            `STORAGE_TYPES`; anything but "uint8" is for those who must shard floating
            point (FSDP of PyTorch).

    Returns:
        name -> array, keys and shapes as in the module's docstring.

    Raises:
        ValueError: if bitsandbytes has no 4-bit form of this weight, or its codes do
            not fill numbers of the storage type.
    """
    if storage not in STORAGE_TYPES:
        raise ValueError(f"{storage=} is none of {', '.join(STORAGE_TYPES)}.")
    if qt.format.name not in _KINDS:
        raise ValueError(
            f"{name}: bitsandbytes stores {' and '.join(_KINDS)} in 4 bits, not "
            f"{qt.format.name!r}: dequantize, or quantize to one of them."
        )
    if qt.stack or qt.layer is not None:
        raise ValueError(
            f"{name}: {qt!r} is a stack or a view of one; write its slices one by one."
        )
    state: dict[str, object] = {
        "quant_type": qt.format.name,
        "blocksize": qt.block_size,
        "dtype": str(qt.dtype),
        "shape": [qt.out_features, qt.in_features],
    }
    codes = np.ascontiguousarray(qt.codes).reshape(-1)
    item = STORAGE_TYPES[storage]
    if codes.size % item.itemsize:
        raise ValueError(
            f"{name} has {codes.size} bytes of codes, which fill no whole number of "
            f"{storage}: store them as uint8."
        )
    tensors = {
        name: codes.view(item).reshape(-1, 1),
        f"{name}.absmax": np.asarray(qt.absmax).reshape(-1),
        f"{name}.quant_map": np.asarray(qt.format.codebook, np.float32),
    }
    if qt.nested_format is not None:
        tensors[f"{name}.nested_absmax"] = np.asarray(qt.nested_absmax)
        tensors[f"{name}.nested_quant_map"] = np.asarray(
            qt.nested_format.codebook, np.float32
        )
        state["nested_blocksize"] = 256
        state["nested_dtype"] = "float32"
        state["nested_offset"] = float(np.asarray(qt.offset))
    text = json.dumps(state).encode()
    tensors[f"{name}.{_STATE}{qt.format.name}"] = np.frombuffer(text, np.uint8).copy()
    return tensors


def from_state(tensors: Mapping[str, np.ndarray], name: str) -> QuantizedTensor:
    """Reads a 4-bit weight from the tensors of a bitsandbytes checkpoint.

    Args:
        tensors: at least those of the weight; others are ignored.
        name: the weight's name in the checkpoint.

    Returns:
        The weight, its bytes as they are in the checkpoint.

    Raises:
        ValueError: if a tensor is missing, or shapes, types and the state's description
            do not fit together; the message names the key.
    """
    state = state_of(tensors, name)
    (n, k), block_size = state["shape"], state["blocksize"]
    num_blocks = -(-n * k // block_size)
    codes = np.ascontiguousarray(_get(tensors, name))
    codes = np.frombuffer(codes.tobytes(), np.uint8)
    if codes.size != -(-n * k // 2):
        raise ValueError(
            f"{name} holds {codes.size} bytes; {n} x {k} codes of 4 bits take "
            f"{-(-n * k // 2)}."
        )
    rows = (n, k // block_size) if k % block_size == 0 else (num_blocks,)
    is_nested = "nested_offset" in state
    absmax = _typed(
        tensors, f"{name}.absmax", np.uint8 if is_nested else np.float32, num_blocks
    )
    codebook = _typed(tensors, f"{name}.quant_map", np.float32, 16)
    nested_absmax = nested_format = offset = None
    if is_nested:
        if state["nested_blocksize"] != 256:
            raise ValueError(
                f"{name}: nested blocks of {state['nested_blocksize']}; only those of "
                "256, which bitsandbytes writes, are read."
            )
        nested_absmax = _typed(
            tensors, f"{name}.nested_absmax", np.float32, -(-num_blocks // 256)
        )
        nested_map = _typed(tensors, f"{name}.nested_quant_map", np.float32, 256)
        nested_format = _format(DYNAMIC8, nested_map)
        offset = jnp.asarray(state["nested_offset"], jnp.float32)
        nested_absmax = jnp.asarray(nested_absmax)
    return QuantizedTensor(
        codes=jnp.asarray(codes.reshape(n, k // 2) if k % 2 == 0 else codes),
        absmax=jnp.asarray(absmax.reshape(rows)),
        nested_absmax=nested_absmax,
        offset=offset,
        layer=None,
        format=_format(FORMATS[state["quant_type"]], codebook),
        nested_format=nested_format,
        in_features=k,
        out_features=n,
        block_size=block_size,
        dtype=jnp.dtype(state["dtype"]),
    )


def from_int8(codes: np.ndarray, scale: np.ndarray, name: str) -> QuantizedTensor:
    """Reads an 8-bit weight (LLM.int8), w[i, j] = codes[i, j] * scale[i] / 127.

    One block is a row. Outliers of the input, which bitsandbytes multiplies apart, are
    of no concern here: the input is not quantized.

    Args:
        codes: int8 [out, in].
        scale: float32 [out], called SCB in a checkpoint.
        name: the weight's name in the checkpoint.

    Raises:
        ValueError: if shapes or types are others.
    """
    if codes.dtype != np.int8 or codes.ndim != 2 or 0 in codes.shape:
        raise ValueError(
            f"{name} must be int8 [out, in], found {codes.dtype} {list(codes.shape)}."
        )
    n, k = codes.shape
    scale = _typed({f"{name} (its SCB)": scale}, f"{name} (its SCB)", np.float32, n)
    return QuantizedTensor(
        codes=jnp.asarray(codes.view(np.uint8)),
        absmax=jnp.asarray(scale[:, None]),
        nested_absmax=None,
        offset=None,
        layer=None,
        format=FORMATS["int8"],
        nested_format=None,
        in_features=k,
        out_features=n,
        block_size=k,
        dtype=jnp.dtype(jnp.bfloat16),  # the file does not say which it had
    )


def to_int8(qt: QuantizedTensor, name: str) -> dict[str, np.ndarray]:
    """Returns the tensors that bitsandbytes writes for an 8-bit weight (LLM.int8).

    No bit is lost: `from_int8` gives the weight back.

    Args:
        qt: an int8 weight without stack axes, one block a row, as `from_int8` gives.
        name: the weight's name in the checkpoint, which ends in ".weight".

    Raises:
        ValueError: if it has another form.
    """
    if (qt.format.name, qt.block_size) != ("int8", qt.in_features) or qt.stack:
        raise ValueError(
            f"{name}: {qt!r} is not of the form of LLM.int8: int8, one block a row, no "
            "stack."
        )
    codes = np.asarray(qt.codes).view(np.int8)
    return _int8_state(name, codes, np.asarray(qt.absmax).reshape(-1))


def quantize_int8(w: np.ndarray, name: str) -> dict[str, np.ndarray]:
    """Returns the tensors that bitsandbytes writes for a weight it puts into 8 bits.

        scale[i]    = max |w[i, j]|  over j, of w rounded to float16
        codes[i, j] = round(w[i, j] * (1 / scale[i] * 127)),  ties to even

    Args:
        w: [out, in].
        name: the weight's name in the checkpoint, which ends in ".weight".

    Raises:
        ValueError: if a number is not finite in float16.

    Source: https://arxiv.org/abs/2208.07339, section 3.
    """
    with np.errstate(over="ignore"):
        rows = w.astype(np.float16).astype(np.float32)
    if not np.isfinite(rows).all():
        raise ValueError(
            f"{name} holds numbers that are not finite in float16, through which "
            "LLM.int8 goes: quantize to nf4 instead."
        )
    scale = np.abs(rows).max(axis=1)
    # As torch divides a number by a tensor: by two roundings, which decides ties. The
    # CUDA kernel divides approximately, so a code in thousands may be the other one.
    factor = np.float32(1) / np.where(scale == 0, np.float32(1), scale)
    factor *= np.float32(127)
    return _int8_state(name, np.rint(rows * factor[:, None]).astype(np.int8), scale)


def _int8_state(
    name: str, codes: np.ndarray, scale: np.ndarray
) -> dict[str, np.ndarray]:
    module = name.removesuffix(".weight")
    return {
        name: codes,
        f"{module}.SCB": scale,
        f"{module}.weight_format": np.zeros((), np.uint8),  # by row
    }


def state_of(tensors: Mapping[str, np.ndarray], name: str) -> dict[str, Any]:
    """Reads the description of a 4-bit weight: `shape` [out, in], `quant_type`, ...

    Args:
        tensors: at least `name`.quant_state.bitsandbytes__nf4 (or __fp4).
        name: the weight's name in the checkpoint.

    Raises:
        ValueError: if it is missing, or does not describe such a weight; the message
            names the key.
    """
    keys = [key for key in tensors if key.startswith(f"{name}.{_STATE}")]
    if len(keys) != 1:
        raise ValueError(
            f"{name} must have one tensor {name}.{_STATE}nf4 (or fp4), found {keys}: "
            "is it a 4-bit weight of bitsandbytes?"
        )
    (key,) = keys
    kind = key.rpartition("__")[2]
    try:
        state = json.loads(np.asarray(tensors[key], np.uint8).tobytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{key} is not JSON in UTF-8: {error}.") from None
    if not isinstance(state, dict):
        raise ValueError(f"{key} holds no JSON object.")
    needed = {"quant_type", "blocksize", "dtype", "shape"}
    if "nested_offset" in state:
        needed |= {"nested_blocksize"}
    if missing := sorted(needed - set(state)):
        raise ValueError(f"{key} lacks {missing}; it has {sorted(state)}.")
    if state["quant_type"] != kind or kind not in _KINDS:
        raise ValueError(
            f"{key} describes quant_type {state['quant_type']!r}; nf4 and fp4 are "
            "read, and the key must name the same."
        )
    shape, block_size = state["shape"], state["blocksize"]
    is_matrix = isinstance(shape, list) and len(shape) == 2
    if not is_matrix or not all(type(size) is int and size > 0 for size in shape):
        raise ValueError(f"{key}: shape {shape!r} is not that of a matrix, [out, in].")
    if type(block_size) is not int or block_size not in BLOCK_SIZES:
        raise ValueError(f"{key}: blocksize {block_size!r} is not in {BLOCK_SIZES}.")
    if state["dtype"] not in _DTYPES:
        raise ValueError(f"{key}: dtype {state['dtype']!r} is not in {_DTYPES}.")
    offset = state.get("nested_offset", 0.0)
    if type(offset) not in (int, float) or not abs(offset) < _FLOAT32_MAX:
        raise ValueError(f"{key}: nested_offset {offset!r} is no float32 number.")
    return state


def _get(tensors, key):
    if key not in tensors:
        raise ValueError(f"{key} is missing from the checkpoint.")
    return np.asarray(tensors[key])


def _typed(tensors, key, dtype, size):
    array = _get(tensors, key).reshape(-1)
    if array.dtype != dtype or array.size != size:
        raise ValueError(
            f"{key} must be {np.dtype(dtype)} [{size}], found {array.dtype} "
            f"[{array.size}]."
        )
    return array


def _format(known: Format, codebook: np.ndarray) -> Format:
    """The known format or, if the file's numbers differ, one with those.

    Files made on other machines hold maps that differ in the last place.
    """
    if np.array_equal(np.asarray(known.codebook, np.float32), codebook):
        return known
    return Format(known.name, tuple(float(number) for number in codebook))

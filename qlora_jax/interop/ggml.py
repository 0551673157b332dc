"""The tensor types of GGUF files: how the bytes of a block stand for numbers.

Each decoder takes uint8 [blocks, bytes of a block] and returns [blocks, numbers of a
block]. Layouts: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h
"""

import dataclasses
from collections.abc import Callable

import numpy as np


@dataclasses.dataclass(frozen=True)
class TensorType:
    """A type: `block_size` numbers take `block_bytes` bytes."""

    name: str
    block_size: int
    block_bytes: int
    decode: Callable[[np.ndarray], np.ndarray]


def _half(blocks: np.ndarray, start: int) -> np.ndarray:
    """Returns the float16 at byte `start` of each block, as float32 [blocks, 1]."""
    two_bytes = np.ascontiguousarray(blocks[:, start : start + 2])
    return two_bytes.view(np.float16).astype(np.float32)


def _nibbles(codes: np.ndarray) -> np.ndarray:
    """Returns the low nibbles of each block's bytes, then the high ones."""
    return np.concatenate([codes & 15, codes >> 4], axis=-1)


def _f32(blocks: np.ndarray) -> np.ndarray:
    return blocks.view(np.float32)


def _f16(blocks: np.ndarray) -> np.ndarray:
    return blocks.view(np.float16)


def _bf16(blocks: np.ndarray) -> np.ndarray:
    return (blocks.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def _q4_0(blocks: np.ndarray) -> np.ndarray:
    codes = _nibbles(blocks[:, 2:]).astype(np.int8) - 8
    return _half(blocks, 0) * codes


def _q4_1(blocks: np.ndarray) -> np.ndarray:
    return _half(blocks, 0) * _nibbles(blocks[:, 4:]) + _half(blocks, 2)


def _q5_0(blocks: np.ndarray) -> np.ndarray:
    fifth = np.unpackbits(blocks[:, 2:6], axis=-1, bitorder="little")  # [blocks, 32]
    codes = (_nibbles(blocks[:, 6:]) | fifth << 4).astype(np.int8) - 16
    return _half(blocks, 0) * codes


def _q5_1(blocks: np.ndarray) -> np.ndarray:
    fifth = np.unpackbits(blocks[:, 4:8], axis=-1, bitorder="little")  # [blocks, 32]
    return _half(blocks, 0) * (_nibbles(blocks[:, 8:]) | fifth << 4) + _half(blocks, 2)


def _q8_0(blocks: np.ndarray) -> np.ndarray:
    return _half(blocks, 0) * blocks[:, 2:].view(np.int8)


def _fields(codes: np.ndarray, bits: int) -> np.ndarray:
    """Returns codes of one or two bits, [blocks, groups, 8 / bits, 32].

    Bytes come in groups of 32; their lowest bits are the first 32 codes of the group.
    """
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    return codes.reshape(len(codes), -1, 1, 32) >> shifts & (2**bits - 1)


def _scales_and_minima(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Those of the eight sub-blocks of 32 of Q4_K and Q5_K, each [blocks, 8, 1].

    Of six bits, packed in twelve bytes: the first four of each lie plain, the last four
    are spread over the high bits.
    """
    packed = blocks[:, 4:16]
    low, middle, high = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([low & 63, (high & 15) | (low >> 6) << 4], axis=-1)
    minima = np.concatenate([middle & 63, (high >> 4) | (middle >> 6) << 4], axis=-1)
    return (
        (_half(blocks, 0) * scales)[..., None],
        (_half(blocks, 2) * minima)[..., None],
    )


def _q4_k(blocks: np.ndarray) -> np.ndarray:
    scales, minima = _scales_and_minima(blocks)
    codes = _nibbles(blocks[:, 16:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    return (scales * codes - minima).reshape(-1, 256)


def _q5_k(blocks: np.ndarray) -> np.ndarray:
    scales, minima = _scales_and_minima(blocks)
    fifth = _fields(blocks[:, 16:48], 1).reshape(-1, 8, 32)
    codes = _nibbles(blocks[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    return (scales * (codes | fifth << 4) - minima).reshape(-1, 256)


def _q2_k(blocks: np.ndarray) -> np.ndarray:
    # Sixteen sub-blocks of 16, scales and minima of four bits, which share a byte.
    scales = _half(blocks, 80) * (blocks[:, :16] & 15)
    minima = _half(blocks, 82) * (blocks[:, :16] >> 4)
    codes = _fields(blocks[:, 16:80], 2).reshape(-1, 16, 16)
    return (scales[..., None] * codes - minima[..., None]).reshape(-1, 256)


def _q3_k(blocks: np.ndarray) -> np.ndarray:
    # Sixteen sub-blocks of 16. Their scales have six bits: four of two to a byte, then
    # two of four to a byte.
    low = _nibbles(blocks[:, 96:104])
    shifts = np.array([0, 2, 4, 6], np.uint8)[:, None]
    high = (blocks[:, None, 104:108] >> shifts & 3).reshape(-1, 16)
    scales = _half(blocks, 108) * ((low | high << 4).astype(np.int8) - 32)
    # Where the third bit is not set, 4 is taken off.
    third = _fields(blocks[:, :32], 1).reshape(-1, 256)
    codes = _fields(blocks[:, 32:96], 2).reshape(-1, 256)
    codes = (codes | third << 2).astype(np.int8) - 4
    return (scales[..., None] * codes.reshape(-1, 16, 16)).reshape(-1, 256)


def _q6_k(blocks: np.ndarray) -> np.ndarray:
    # Two halves of 128 numbers; four bits of each in 64 bytes, two more in 32.
    low = _nibbles(blocks[:, :128].reshape(-1, 2, 64)).reshape(-1, 2, 4, 32)
    shifts = np.array([0, 2, 4, 6], np.uint8)[:, None]
    high = blocks[:, 128:192].reshape(-1, 2, 1, 32) >> shifts & 3  # [blocks, 2, 4, 32]
    codes = (low | high << 4).astype(np.int8) - 32
    scales = _half(blocks, 208) * blocks[:, 192:208].view(np.int8)  # [blocks, 16]
    return (scales[..., None] * codes.reshape(-1, 16, 16)).reshape(-1, 256)


# By ggml's number of the type.
TENSOR_TYPES: dict[int, TensorType] = {
    0: TensorType("F32", 1, 4, _f32),
    1: TensorType("F16", 1, 2, _f16),
    2: TensorType("Q4_0", 32, 18, _q4_0),
    3: TensorType("Q4_1", 32, 20, _q4_1),
    6: TensorType("Q5_0", 32, 22, _q5_0),
    7: TensorType("Q5_1", 32, 24, _q5_1),
    8: TensorType("Q8_0", 32, 34, _q8_0),
    10: TensorType("Q2_K", 256, 84, _q2_k),
    11: TensorType("Q3_K", 256, 110, _q3_k),
    12: TensorType("Q4_K", 256, 144, _q4_k),
    13: TensorType("Q5_K", 256, 176, _q5_k),
    14: TensorType("Q6_K", 256, 210, _q6_k),
    30: TensorType("BF16", 1, 2, _bf16),
}

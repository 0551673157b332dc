"""Makes bitsandbytes.npz: bytes and numbers of bitsandbytes 0.50.2 itself (CPU).

Run under Python 3.11 with torch==2.13.0 (CPU) and bitsandbytes==0.50.2:

    python tests/golden/make_bitsandbytes.py

Every case holds the state dict that bitsandbytes writes for one quantized weight, the
input, and the SHA-256 of what bitsandbytes decodes from those bytes. Its plain torch
path is used for decoding and for the 4-bit codes; its AVX512 path mis-indexes scales
when a row is no multiple of the block. Nested codes come from its CPU quantizer, which
goes through a 65,536-bin table and may lie one step beside the nearest code; the
nearest ones, by the rule of its CUDA kernels in numpy, are stored as `nested_nearest`.
"""

import hashlib
import json
import os
import pathlib

os.environ["TORCH_COMPILE_DISABLE"] = "1"  # eager torch, the plainest reading

import bitsandbytes as bnb
import numpy as np
import torch
from bitsandbytes import functional as F
from bitsandbytes.backends.default import ops as plain

torch.set_num_threads(1)

# name: (rows n, columns k, block size, type of the weight)
SHAPES = {
    "plain": (48, 128, 64, torch.float32),
    "bfloat16": (32, 192, 64, torch.bfloat16),
    "float16": (32, 64, 32, torch.float16),
    "cross_rows": (40, 172, 64, torch.float32),
    "ragged": (7, 90, 64, torch.float32),
    "odd": (5, 13, 32, torch.float32),
    "block128": (16, 256, 128, torch.float32),
    "block256": (16, 256, 256, torch.float32),
    "block512": (16, 512, 512, torch.float32),
    "block1024": (8, 1024, 1024, torch.float32),
    "block2048": (6, 1024, 2048, torch.float32),
    "block4096": (9, 1024, 4096, torch.bfloat16),
    "many_blocks": (160, 128, 32, torch.bfloat16),
}


def weight(n, k, dtype, generator):
    w = torch.randn(n, k, generator=generator) * 0.02
    w[0, : min(k, 64)] = 0  # an all-zero block, wherever a block of 64 starts a row
    w[-1, -1] = 0.5  # an outlier in the last, possibly short, block
    return w.to(dtype)


def nearest(x, codebook):
    midpoints = (codebook[1:] + codebook[:-1]) / np.float32(2)
    return np.searchsorted(midpoints, x, side="left").astype(np.uint8)


def as_numpy(tensor):
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(np.uint16)
    return tensor.numpy()


def main():
    out = {}
    generator = torch.Generator().manual_seed(0)
    out["dynamic_map_signed"] = F.create_dynamic_map(signed=True).numpy()
    out["dynamic_map_unsigned"] = F.create_dynamic_map(signed=False).numpy()
    for kind in ("nf4", "fp4"):
        out[f"codebook_{kind}"] = F.get_4bit_type(kind, device="cpu").numpy()
    cases = []
    for name, (n, k, block_size, dtype) in SHAPES.items():
        w = weight(n, k, dtype, generator)
        out[f"{name}/input"] = as_numpy(w)
        for kind in ("nf4", "fp4"):
            for double_quant in (False, True):
                case = f"{name}/{kind}/{'dq' if double_quant else 'single'}"
                cases.append((case, n, k, block_size, str(dtype).split(".")[1]))
                packed, absmax = F.quantize_4bit(
                    w, blocksize=block_size, quant_type=kind, compress_statistics=False
                )
                state = absmax  # a QuantState; its absmax are float32
                if double_quant:
                    _, state = F.quantize_4bit(
                        w,
                        blocksize=block_size,
                        quant_type=kind,
                        compress_statistics=True,
                    )
                    plain_absmax = absmax.absmax.numpy()
                    offset = np.float32(state.offset.item())
                    residual = plain_absmax - offset
                    map_ = state.state2.code.numpy()
                    codes = []
                    for start in range(0, residual.size, 256):
                        block = residual[start : start + 256]
                        scale = np.abs(block).max()
                        inverse = np.float32(1) / scale if scale else np.float32(0)
                        codes.append(nearest(block * inverse, map_))
                    out[f"{case}/nested_nearest"] = np.concatenate(codes)
                    out[f"{case}/mean_float64"] = plain_absmax.astype(np.float64).mean()
                    scales = (
                        map_[state.absmax.numpy().astype(np.int64)]
                        * np.repeat(state.state2.absmax.numpy(), 256)[
                            : plain_absmax.size
                        ]
                    ) + offset
                    scales = torch.from_numpy(scales.astype(np.float32))
                else:
                    scales = state.absmax
                tensors = {"p.weight": packed}
                for key, value in state.as_dict(packed=True).items():
                    tensors[f"p.weight.{key}"] = value
                for key, value in tensors.items():
                    out[f"{case}/state/{key}"] = value.numpy()
                for target in (torch.float32, torch.bfloat16, torch.float16):
                    decoded = plain._dequantize_4bit_compute(
                        packed.reshape(-1),
                        scales,
                        state.code,
                        block_size,
                        (n, k),
                        target,
                    )
                    label = str(target).split(".")[1]
                    digest = hashlib.sha256(as_numpy(decoded).tobytes()).digest()
                    out[f"{case}/decoded/{label}"] = np.frombuffer(digest, np.uint8)
    out["cases"] = np.frombuffer(json.dumps(cases).encode(), np.uint8)
    out["versions"] = np.frombuffer(
        f"bitsandbytes {bnb.__version__}, torch {torch.__version__}".encode(), np.uint8
    )
    path = pathlib.Path(__file__).with_name("bitsandbytes.npz")
    np.savez_compressed(path, **out)
    print(path, path.stat().st_size, "bytes")


if __name__ == "__main__":
    main()

"""Makes bitsandbytes_optim.npz: parameters after 100 steps of its 8-bit optimizers.

Run under Python 3.11 with torch==2.13.0 (CPU) and bitsandbytes==0.50.2:

    python tests/golden/make_bitsandbytes_optim.py

The gradients are a function of the parameters, the target and the step
(`gradient`), so that a test can compute them again. The CPU build updates in float32
as its CUDA kernels do, decays before the step, and rounds moments through a table of
65,536 bins, which is coarse near zero: its codes are no oracle, its trajectories are.
"""

import os
import pathlib

os.environ["TORCH_COMPILE_DISABLE"] = "1"

import bitsandbytes as bnb
import numpy as np
import torch

torch.set_num_threads(1)

STEPS, SHAPE = 100, (64, 80)
RUNS = {
    "adam8bit": (bnb.optim.Adam8bit, dict(lr=1e-2)),
    "adamw8bit": (bnb.optim.AdamW8bit, dict(lr=1e-2, weight_decay=0.1)),
    "lion8bit": (bnb.optim.Lion8bit, dict(lr=1e-3, weight_decay=0.1)),
    "adam": (bnb.optim.Adam32bit, dict(lr=1e-2)),
}


def target():
    return np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)


def gradient(params, goal, step):
    """The gradient of |p - goal|² / 2, and a wave for noise."""
    place = np.arange(params.size, dtype=np.float64).reshape(params.shape)
    wave = 0.3 * np.sin(place * 12.9898 + step * 78.233)
    return (params - goal + wave).astype(np.float32)


def main():
    goal = target()
    results = {}
    for name, (optimizer_of, arguments) in RUNS.items():
        p = torch.nn.Parameter(torch.zeros(SHAPE))
        optimizer = optimizer_of([p], **arguments)
        for step in range(1, STEPS + 1):
            p.grad = torch.from_numpy(gradient(p.detach().numpy(), goal, step))
            optimizer.step()
        results[name] = p.detach().numpy().copy()
    path = pathlib.Path(__file__).with_name("bitsandbytes_optim.npz")
    np.savez_compressed(path, **results)
    print({k: float(np.sqrt(((v - goal) ** 2).mean())) for k, v in results.items()})


if __name__ == "__main__":
    main()

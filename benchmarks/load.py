"""How fast an 8B-shaped checkpoint is loaded, and what memory that takes.

    python benchmarks/load.py                          # Llama-3-8B's shape, 16 GB
    python benchmarks/load.py --layers 4 --cold        # a part of it, not from memory
    python benchmarks/load.py --folder DIR --keep      # keep the files for another run

Writes a folder of random bfloat16 shards, loads it dense or quantized in a process of
its own (so that peaks are those of loading) and prints seconds, bytes a second, host
memory above the model and, on a GPU, the device's peak. Needs the core dependencies.
"""

import argparse
import concurrent.futures
import contextlib
import datetime
import functools
import json
import multiprocessing
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import tempfile
import time

import jax
import ml_dtypes
import numpy as np
import safetensors.numpy

from qlora_jax.interop.hub import load_model
from qlora_jax.interop.weights import expected_shapes
from qlora_jax.models.config import LlamaConfig
from qlora_jax.models.config_hf import config_to_hf

RESULTS = pathlib.Path(__file__).parent / "results"
SHARD_BYTES = 1_100_000_000  # the embedding is 1.05 GB
WRITERS = 8


def llama_8b(layers):
    return LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_layers=layers,
        num_heads=32,
        num_kv_heads=8,
        rope_theta=500_000.0,
        max_position=8192,
    )


@functools.cache
def random_block():
    """2**25 numbers about as large as weights are, made as fast as random bits are."""
    bits = np.random.default_rng(0).integers(0, 2**16, 2**25, np.uint16)
    # Any sign and mantissa, one of eight exponents: magnitudes from 2**-13 to 2**-5.
    words = (bits & np.uint16(0x83FF)) + np.uint16(114 << 7)
    return words.view(ml_dtypes.bfloat16)


def shards(config):
    """Returns the names and shapes of each shard's tensors, none above SHARD_BYTES."""
    groups, size = [{}], 0
    for name, shape in expected_shapes(config).items():
        nbytes = 2 * int(np.prod(shape))
        if groups[-1] and size + nbytes > SHARD_BYTES:
            groups.append({})
            size = 0
        groups[-1][name] = shape
        size += nbytes
    return groups


def write_shard(path, shapes):
    # The numbers repeat; no time depends on what they are.
    shard = {name: np.resize(random_block(), shape) for name, shape in shapes.items()}
    safetensors.numpy.save_file(shard, path, metadata={"format": "pt"})
    return sum(tensor.nbytes for tensor in shard.values())


def make_folder(folder, layers):
    """Writes the checkpoint, a shard in memory for each core; returns its bytes."""
    config = llama_8b(layers)
    folder.mkdir(parents=True, exist_ok=True)
    groups = shards(config)
    names = [f"model-{i:05d}.safetensors" for i in range(len(groups))]
    paths = [folder / name for name in names]
    workers = min(WRITERS, os.cpu_count() or 1)
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, spawn) as pool:
        total = sum(pool.map(write_shard, paths, groups))
    weight_map = {}
    for name, group in zip(names, groups, strict=True):
        weight_map |= dict.fromkeys(group, name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    hf = config_to_hf(config) | {"torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(hf))
    return total


def forget(folder):
    """Takes the files out of the system's memory, so that they come from the disk."""
    for path in folder.glob("*.safetensors"):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def peak_rss():
    """Returns the most memory this process had, and not what started it."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status does not tell VmHWM")


def load(folder, quantize):
    """Loads once; returns what was measured. In a process of its own."""
    jax.block_until_ready(jax.numpy.zeros(1))
    before = peak_rss()
    start = time.perf_counter()
    model = load_model(folder, quantize, progress=True)
    leaves = jax.tree.leaves(model)
    jax.block_until_ready(leaves)
    seconds = time.perf_counter() - start
    device = jax.devices()[0]
    memory = device.memory_stats() or {}
    result = sum(leaf.nbytes for leaf in leaves)
    on_host = result if device.platform == "cpu" else 0
    return {
        "seconds": seconds,
        "model_gb": result / 1e9,
        "host_peak_above_result_gb": (peak_rss() - before - on_host) / 1e9,
        "device_peak_gb": memory.get("peak_bytes_in_use", 0) / 1e9,
        "device": device.device_kind,
    }


def measured(folder, quantize):
    command = [sys.executable, __file__, "--load", str(folder)]
    command += ["--quantize", quantize or "none"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, env=environment
    )
    return json.loads(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(
        description="Times the loading of a large checkpoint."
    )
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--folder", type=pathlib.Path, help="where to write it")
    parser.add_argument("--keep", action="store_true", help="do not delete it")
    parser.add_argument("--cold", action="store_true", help="read from the disk")
    parser.add_argument("--quantize", nargs="*", default=["nf4"], help="or none")
    parser.add_argument("--load", type=pathlib.Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    quantizations = [None if q == "none" else q for q in args.quantize]
    if args.load is not None:
        print(json.dumps(load(args.load, quantizations[0])))
        return
    with contextlib.ExitStack() as stack:
        folder = args.folder
        if folder is None:
            folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        fresh = not (folder / "config.json").exists()
        if fresh:
            print(f"writing {args.layers} layers into {folder}", file=sys.stderr)
            start = time.perf_counter()
            made = make_folder(folder, args.layers)
            seconds = time.perf_counter() - start
            print(f"{made / 1e9:.2f} GB in {seconds:.0f} s", file=sys.stderr)
        if fresh and args.folder is not None and not args.keep:
            stack.callback(shutil.rmtree, folder)
        nbytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        rows = []
        for quantize in quantizations:
            if args.cold:
                forget(folder)
            row = {"quantize": quantize or "none", "cold": args.cold}
            row["read_gb"] = nbytes / 1e9
            row |= measured(folder, quantize)
            row["gb_per_s"] = row["read_gb"] / row["seconds"]
            rows.append(row)
    names = list(rows[0])
    print("| " + " | ".join(names) + " |")
    print("|" + "---|" * len(names))
    for row in rows:
        cells = [f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values()]
        print("| " + " | ".join(cells) + " |")
    RESULTS.mkdir(exist_ok=True)
    result = {
        "rows": rows,
        "layers": args.layers,
        "host": platform.machine(),
        "jax": jax.__version__,
        "date": datetime.date.today().isoformat(),
    }
    path = RESULTS / "load.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()

"""What the optimizers cost, and what they lose: a table, and loss curves.

    python benchmarks/optimizers.py step
    python benchmarks/optimizers.py train --model FOLDER --text FILE

`step` times one update of LoRA adapters of the shapes of Llama-3-8B at rank 64 (on a
CPU, of smaller ones), with the state on the device, paged, in 8 bits, and both. `train`
trains one model from the same start with each of them and compares the losses: adapters
on a 4-bit `--model`, or, without one, a small transformer on bytes, all of it.

Each prints a table and writes JSON to `benchmarks/results/`; `train` a picture as well,
if matplotlib is there.
"""

import argparse
import contextlib
import datetime
import json
import pathlib
import platform
import time
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pallas_kernels import tuning
from qlora_jax.optim import adamw8bit, lion8bit, paged, with_master

RESULTS = pathlib.Path(__file__).parent / "results"


def optimizers(rate, min_size: int = 65_536):
    def clipped(inner):
        return optax.chain(optax.clip_by_global_norm(0.3), inner)

    adamw = clipped(optax.adamw(rate, weight_decay=0.0))
    adamw_8bit = clipped(adamw8bit(rate, weight_decay=0.0))
    return {
        "adamw": adamw,
        "paged adamw": paged(adamw, min_size=min_size),
        "adamw8bit": adamw_8bit,
        "paged adamw8bit": paged(adamw_8bit, min_size=min_size),
    }


def adapter_shapes(layers, hidden, intermediate, kv, rank):
    """The adapters of all linear layers of a Llama, layers stacked."""
    linear = {
        "q_proj": (hidden, hidden),
        "k_proj": (hidden, kv),
        "v_proj": (hidden, kv),
        "o_proj": (hidden, hidden),
        "gate_proj": (hidden, intermediate),
        "up_proj": (hidden, intermediate),
        "down_proj": (intermediate, hidden),
    }
    shapes = {}
    for name, (rows, columns) in linear.items():
        shapes[f"{name}.a"] = (layers, rows, rank)
        shapes[f"{name}.b"] = (layers, rank, columns)
    return shapes


def bytes_in(tree, kind):
    leaves = jax.tree.leaves(tree)
    return sum(x.nbytes for x in leaves if x.sharding.memory_kind == kind)


def measure_steps(args):
    on_gpu = jax.default_backend() == "gpu"
    sizes = (32, 4096, 14336, 1024, 64) if on_gpu else (4, 512, 1792, 128, 64)
    key = jax.random.key(0)
    make = jax.jit(
        lambda: {
            name: jax.random.normal(jax.random.fold_in(key, i), shape) * 0.02
            for i, (name, shape) in enumerate(adapter_shapes(*sizes).items())
        }
    )
    grads = make()
    numbers = sum(x.size for x in jax.tree.leaves(grads))
    candidates = optimizers(2e-4) | {
        "paged adamw, 256 MB": paged(optax.adamw(2e-4), page_size=2**28),
        "lion8bit": lion8bit(2e-5),
        "paged with_master adamw": paged(with_master(optax.adamw(2e-4))),
    }
    if on_gpu:
        for name in ("adamw8bit", "lion8bit"):
            candidates[f"{name}, no kernel"] = candidates[name]
    rows = []
    for name, tx in candidates.items():
        params = make()
        if "master" in name:
            params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
        params = jax.device_put(params, jax.devices()[0])
        state = tx.init(params)

        def step(params, state, grads, tx=tx):
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        # Traced as on a device that the kernel of a step is not for.
        other = mock.patch.object(tuning, "compute_capability", return_value=None)
        with other if "no kernel" in name else contextlib.nullcontext():
            lowered = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, grads)
        compiled = lowered.compile()
        for _ in range(2):
            params, state = compiled(params, state, grads)
        jax.block_until_ready((params, state))
        start = time.perf_counter()
        for _ in range(args.steps):
            params, state = compiled(params, state, grads)
        jax.block_until_ready((params, state))
        seconds = (time.perf_counter() - start) / args.steps
        on_host = bytes_in(state, "pinned_host")
        temporary = getattr(compiled.memory_analysis(), "temp_size_in_bytes", 0)
        rows.append(
            {
                "optimizer": name,
                "ms a step": round(seconds * 1e3, 2),
                "state on device, MB": round(bytes_in(state, "device") / 1e6, 1),
                "state on host, MB": round(on_host / 1e6, 1),
                "temporary, MB": round(temporary / 1e6, 1),
                "GB/s each way": round(on_host / seconds / 1e9, 1),
            }
        )
        del params, state
    print(f"{numbers / 1e6:.1f} million parameters")
    return {"parameters": numbers, "rows": rows}


def read_tokens(args, tokenizer):
    text = pathlib.Path(args.text).read_text() if args.text else None
    if text is None:  # sums, so that there is something to learn
        rng = np.random.default_rng(0)
        pairs = rng.integers(0, 100, (20_000, 2))
        text = "".join(f"{a}+{b}={a + b}\n" for a, b in pairs)
    text = text[: args.characters]
    if tokenizer is None:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)
    return np.array(tokenizer.encode(text), np.int32)


def small_transformer(width=256, layers=2, heads=4, vocab=256, length=1024):
    """Parameters and loss of a byte-level transformer in plain jnp."""
    keys = iter(jax.random.split(jax.random.key(0), 3 + 4 * layers))

    def normal(*shape, scale=0.02):
        return jax.random.normal(next(keys), shape) * scale

    params = {
        "embed": normal(vocab, width, scale=0.5),
        "position": normal(length, width),
        "head": normal(width, vocab),
        "layers": [
            {
                "qkv": normal(width, 3 * width),
                "out": normal(width, width),
                "up": normal(width, 4 * width),
                "down": normal(4 * width, width),
            }
            for _ in range(layers)
        ],
    }

    def norm(x):
        return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)

    def loss(params, tokens):
        x = params["embed"][tokens] + params["position"][: tokens.shape[1]]
        for layer in params["layers"]:
            heads_of = norm(x) @ layer["qkv"]
            q, k, v = heads_of.reshape(*x.shape[:2], 3, heads, -1).swapaxes(0, 2)
            q, k, v = (y.swapaxes(0, 1) for y in (q, k, v))
            attended = jax.nn.dot_product_attention(q, k, v, is_causal=True)
            x = x + attended.reshape(x.shape) @ layer["out"]
            x = x + jax.nn.gelu(norm(x) @ layer["up"]) @ layer["down"]
        logits = norm(x) @ params["head"]
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits[:, :-1], tokens[:, 1:]
        )
        return losses.mean()

    return params, loss


def quantized_model(args):
    """Trainable part and loss of adapters on a 4-bit base, and its tokenizer."""
    import qlora_jax as ql

    model = ql.load_model(args.model, quantize="nf4")
    model = ql.add_lora(model, rank=args.rank, alpha=16, key=jax.random.key(0))
    trainable, frozen = ql.split_trainable(model)

    def loss(trainable, tokens, frozen):
        model = ql.join_trainable(trainable, frozen)
        return ql.next_token_loss(model, {"tokens": tokens})

    return trainable, loss, (frozen,), ql.load_tokenizer(args.model)


def measure_training(args):
    if args.model:
        start, loss, constants, tokenizer = quantized_model(args)
    else:
        (start, loss), constants, tokenizer = small_transformer(), (), None
    tokens = read_tokens(args, tokenizer)
    rng = np.random.default_rng(0)
    starts = rng.integers(0, len(tokens) - args.length, (args.steps, args.batch))
    rate = optax.warmup_cosine_decay_schedule(
        0.0, args.rate, args.steps // 20 + 1, args.steps
    )
    curves, rows = {}, []
    for name, tx in optimizers(rate, min_size=args.min_size).items():
        params = jax.device_put(jax.tree.map(jnp.copy, start), jax.devices()[0])
        state = tx.init(params)

        def step(params, state, batch, *constants, tx=tx):
            value, grads = jax.value_and_grad(loss)(params, batch, *constants)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state, value

        step = jax.jit(step, donate_argnums=(0, 1))
        losses = []
        clock = time.perf_counter()
        for row in starts:
            batch = np.stack([tokens[i : i + args.length] for i in row])
            params, state, value = step(params, state, batch, *constants)
            losses.append(value)
        curves[name] = [float(x) for x in losses]
        last = float(np.mean(curves[name][-max(args.steps // 10, 1) :]))
        first = rows[0]["final loss"] if rows else last
        rows.append(
            {
                "optimizer": name,
                "final loss": last,
                "against adamw, %": round(100 * (last / first - 1), 3),
                "state on device, MB": round(bytes_in(state, "device") / 1e6, 2),
                "state on host, MB": round(bytes_in(state, "pinned_host") / 1e6, 2),
                "seconds": round(time.perf_counter() - clock, 1),
            }
        )
        print(rows[-1], flush=True)
    draw(curves, args.picture)
    arguments = vars(args) | {
        name: path and pathlib.Path(path).name
        for name, path in [("model", args.model), ("text", args.text)]
    }
    del arguments["picture"]
    return {"arguments": arguments, "rows": rows, "curves": curves}


def draw(curves, path):
    """Smoothed loss curves in one picture."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no matplotlib, no picture")
        return
    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    styles = ["-", "--", "-.", ":"]
    for (name, losses), style in zip(curves.items(), styles, strict=True):
        width = max(len(losses) // 50, 1)
        smooth = np.convolve(losses, np.ones(width) / width, mode="valid")
        axes.plot(smooth, style, label=name, linewidth=1.5)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.legend()
    figure.savefig(path, bbox_inches="tight", dpi=120)


def print_table(rows):
    names = list(rows[0])
    print("| " + " | ".join(names) + " |")
    print("|" + "---|" * len(names))
    for row in rows:
        print("| " + " | ".join(str(row[name]) for name in names) + " |")


def main():
    parser = argparse.ArgumentParser(description="Optimizers: cost and losses.")
    commands = parser.add_subparsers(dest="command", required=True)
    step = commands.add_parser("step")
    step.add_argument("--steps", type=int, default=10)
    train = commands.add_parser("train")
    train.add_argument("--model", help="folder or name for qlora_jax.load_model")
    train.add_argument("--text", help="a text file to train on")
    train.add_argument("--characters", type=int, default=1_000_000)
    train.add_argument("--steps", type=int, default=200)
    train.add_argument("--batch", type=int, default=8)
    train.add_argument("--length", type=int, default=128)
    train.add_argument("--rank", type=int, default=64)
    train.add_argument("--rate", type=float, default=2e-3)
    train.add_argument("--min-size", type=int, default=4096)
    train.add_argument("--picture", default=str(RESULTS / "optimizers.png"))
    args = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    measure = {"step": measure_steps, "train": measure_training}[args.command]
    result = measure(args)
    print_table(result["rows"])
    device = jax.devices()[0]
    result |= {
        "device": device.device_kind,
        "host": platform.machine(),
        "jax": jax.__version__,
        "optax": optax.__version__,
        "date": datetime.date.today().isoformat(),
    }
    path = RESULTS / f"optimizers-{args.command}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()

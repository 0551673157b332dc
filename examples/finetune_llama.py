"""Finetune a Llama in 4 bits: QLoRA from a checkpoint to an adapter, on any machine.

    pip install -e '.[train]' && python examples/finetune_llama.py

Without arguments it takes SmolLM2-135M-Instruct and questions on Python's standard
library, and needs neither an account nor a GPU. With them it takes yours:

    python examples/finetune_llama.py --model meta-llama/Llama-3.1-8B-Instruct \
        --data my_alpaca.jsonl --rank 64 --alpha 16 --dropout 0.1 \
        --learning-rate 2e-4 --steps 1875 --batch-size 16 --seq-len 512
"""

import argparse
import pathlib
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp

import qlora_jax as ql

# The paper's settings are the defaults of TrainConfig. These suit a small model and a
# run of minutes: few adapters' parameters, and a rate at which sixty steps go far.
SMALL = ql.TrainConfig(
    rank=16,
    alpha=32.0,
    dropout=0.0,
    learning_rate=1e-3,
    schedule="linear",
    warmup_steps=3,
    steps=60,
    batch_size=8,
    seq_len=96,
    chunk_size=256,
    save_every=20,
)


def parse() -> argparse.Namespace:
    """Returns the command line; the hyperparameters of TrainConfig are flags."""
    parser = argparse.ArgumentParser(description="Finetune a Llama in 4 bits.")
    add = parser.add_argument
    add("--model", default="SmolLM2-135M-Instruct", help="folder, .gguf or hub name")
    add("--data", help="rows, .json, .jsonl, .csv; default: Python's documentation")
    add("--quantize", default="nf4", help="format of the frozen weights")
    add("--eval-rows", type=int, default=64, help="rows that are held out")
    add("--out", help="folder of the run; default: runs/<model>")
    add("--resume", action="store_true", help="go on with the run in that folder")
    for name, default in vars(SMALL).items():
        kind: dict[str, Any] = {"type": type(default)}
        if isinstance(default, bool):
            kind = {"action": argparse.BooleanOptionalAction}
        if name != "also":  # arrays trained whole are saved otherwise than below
            flag = "--" + name.replace("_", "-")
            add(flag, default=default, help=f"default {default}", **kind)
    return parser.parse_args()


def conversations(args: argparse.Namespace) -> tuple[list, list]:
    """Returns the rows to train on and the rows held out."""
    if args.data is None:
        train, held_out = ql.data.stdlib_conversations()
        return train, held_out[: args.eval_rows]
    rows = ql.data.read_conversations(args.data)
    if len(rows) <= args.eval_rows:
        raise ValueError(
            f"{args.data} has {len(rows)} rows, and --eval-rows {args.eval_rows} are "
            "held out: give more rows, or hold out fewer."
        )
    return rows[args.eval_rows :], rows[: args.eval_rows]


def main() -> None:
    """Finetunes, and shows what changed."""
    began = time.perf_counter()
    args = parse()
    ql.use_one_gpu()  # the first of CUDA_VISIBLE_DEVICES, and no memory on the others
    # Whatever is wrong with the call is said here, before anything takes long.
    given = vars(args)
    config = ql.TrainConfig(**{k: given[k] for k in vars(SMALL) if k in given})
    name = pathlib.Path(args.model).name.removesuffix(".gguf")
    folder = args.out or f"runs/{name}"
    settings = {k: v for k, v in given.items() if k not in ("out", "resume")}
    run = ql.Run(folder, settings, resume=args.resume)
    train_rows, held_out_rows = conversations(args)
    path = ql.find_model(args.model)
    tokenizer = ql.load_tokenizer(path)
    print(f"Model: {path}")
    encode = ql.data.Encoder(tokenizer).encode
    rows, length = config.batch_size, config.seq_len
    batches = ql.data.Batches(
        encode(train_rows), batch_size=rows, seq_len=length, seed=config.seed
    )
    held_out = ql.data.in_order(encode(held_out_rows), batch_size=rows, seq_len=length)
    print(f"Data: {len(train_rows)} rows, and {len(held_out_rows)} held out")
    # Matmuls in bfloat16 are what a GPU is for; a CPU is faster in float32.
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    model = ql.load_model(path, quantize=args.quantize, dtype=dtype)

    # The frozen base: 4-bit codes, 8-bit scales, and scales of those.
    frozen = [
        w for w in jax.tree.leaves(model, is_leaf=is_quantized) if is_quantized(w)
    ]
    matrices = sum(w.shape[0] for w in frozen)
    parameters, nbytes = sum(w.size for w in frozen), sum(w.nbytes for w in frozen)
    print(
        f"Frozen: {matrices} matrices in {args.quantize}, {parameters:,} parameters in "
        f"{nbytes:,} bytes: {8 * nbytes / parameters:.3f} bits a parameter"
    )

    # What is trained: two thin matrices beside each frozen one.
    model = ql.add_lora(
        model,
        rank=config.rank,
        alpha=config.alpha,
        dropout=config.dropout,
        key=jax.random.key(config.seed),
    )
    trainable, _ = ql.split_trainable(model)
    count = sum(leaf.size for leaf in jax.tree.leaves(trainable))
    print(f"Trained: {count:,} parameters in adapters of rank {config.rank}")

    first = held_out_rows[0]

    def measure(model) -> dict:
        prompt = tokenizer.encode_chat(first.question, answer_next=True)
        (new,) = ql.generate(model, [prompt], max_new_tokens=48)
        sample = {"prompt": first.question[-1]["content"], "wanted": first.answer}
        sample["answer"] = tokenizer.decode(new).strip()
        return {"eval_loss": ql.evaluate(model, held_out), "samples": [sample]}

    # A run that is taken up again has measured this already.
    before = run.recorded(step=0)
    if before is None:
        before = {"step": 0, **measure(model)}
        run.record(**before)
    print(f"Held-out loss before: {before['eval_loss']:.3f}")

    # AdamW behind a clip of the gradient's norm; its state is paged to host memory.
    tx = ql.paged(config.optimizer())
    shown = [ql.ProgressBar()]
    try:
        tell = {"run": run, "callbacks": shown, "evaluate": measure}
        model = ql.fit(model, batches, config, tx, consume=True, **tell)
    except ql.Stopped as stopped:  # by SIGTERM or Ctrl-C; the state is saved
        print(f"{stopped} To go on: the same command, with --resume.")
        return

    after = measure(model)
    ql.save_adapter(model, run.folder / "adapter", base_model=args.model)
    summary = run.finish(
        **after,
        eval_loss_before=before["eval_loss"],
        eval_loss_after=after["eval_loss"],
        seconds=round(time.perf_counter() - began, 1),
    )
    fell = before["eval_loss"] - after["eval_loss"]
    print(f"Held-out loss after: {after['eval_loss']:.3f} (fell by {fell:.3f})")
    print(f"\nQuestion: {first.question[-1]['content']}")
    print(f"Before:   {before['samples'][0]['answer']}")
    print(f"After:    {after['samples'][0]['answer']}")
    print(f"Wanted:   {first.answer}\n")
    print(f"Written: {run.folder}/ (adapter/, report.md, metrics.jsonl)")
    print(f"{summary['seconds']:.0f} s, {summary['peak_rss_gb']:.2f} GB at most")


def is_quantized(weight) -> bool:
    """Tells frozen 4-bit weights from the other leaves of the model."""
    return isinstance(weight, ql.QuantizedTensor)


if __name__ == "__main__":
    try:
        main()
    # A wrong call, a full disk, a loss that is no number: one line says what to do.
    except (ValueError, NotImplementedError, OSError, FloatingPointError) as error:
        sys.exit(f"finetune_llama.py: {error}")

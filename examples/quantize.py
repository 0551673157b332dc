"""What a 4-bit weight is, what it costs, and how to train over it.

    python examples/quantize.py

Part 1 quantizes one matrix and shows its codes, its scales, the bits it takes and the
error of each format. Part 2 trains adapters over a frozen NF4 model, with the
optimizer's state paged to host memory, all under one jit.
"""

import functools

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import qlora_jax as ql


def show_one_matrix() -> None:
    """Quantizes a matrix of normal numbers in every format."""
    w = jax.random.normal(jax.random.key(0), (1024, 1024))
    qt = ql.quantize(w)
    print(qt)
    # The bytes are those of bitsandbytes: a row per output feature, two codes a byte.
    print("  weights  ", ", ".join(f"{x:+.3f}" for x in w[:8, 0]))
    codes = [code for byte in qt.codes[0, :4] for code in (byte >> 4, byte & 15)]
    print("  codes    ", ", ".join(f"{int(code):6d}" for code in codes))
    print("  decoded  ", ", ".join(f"{x:+.3f}" for x in ql.dequantize(qt)[:8, 0]))
    single = ql.quantize(w, double_quant=False)
    print(f"  absmax of the first blocks      {single.absmax[0, :4]}")
    print(f"  their codes, double-quantized   {qt.absmax[0, :4]}")

    print("\nformat            bits a parameter   mean |error|")
    for name in ("nf4", "fp4", "fp4-e3m0", "int4", "int8", "dynamic8"):
        for double_quant in (True, False):
            qt = ql.quantize(w, name, double_quant=double_quant)
            error = jnp.abs(ql.dequantize(qt) - w).mean()
            label = f"{name}{' + DQ' if double_quant else ''}"
            print(f"{label:17s} {qt.bits_per_parameter:16.3f} {error:14.5f}")


class TwoLayers(nnx.Module):
    """A small regression model that multiplies by `x @ w`, whatever `w` is."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        init = nnx.initializers.lecun_normal()
        self.up_proj = nnx.Param(init(rngs.params(), (width, 4 * width)))
        self.down_proj = nnx.Param(init(rngs.params(), (4 * width, width)))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [batch, width] to [batch, width]."""
        hidden = jax.nn.silu(x @ weight_of(self.up_proj))
        return hidden @ weight_of(self.down_proj)


def weight_of(w):
    """Returns what an `nnx.Param` holds; a LoraTensor stands for itself."""
    return w.get_value() if isinstance(w, nnx.Variable) else w


def train_adapters(steps: int = 200) -> tuple[float, float]:
    """Teaches a quantized model the function of another; returns the losses."""
    width, rank = 128, 16
    model = TwoLayers(width, rngs=nnx.Rngs(0))
    # The task: the same model after a change of low rank, as finetuning asks for.
    keys = jax.random.split(jax.random.key(1), 3)
    change = jax.random.normal(keys[0], (width, 4)) @ jax.random.normal(
        keys[1], (4, 4 * width)
    )
    teacher = TwoLayers(width, rngs=nnx.Rngs(0))
    teacher.up_proj[...] += 0.05 * change

    model = ql.quantize_tree(model, {"_proj": "nf4"})
    model = ql.add_lora(model, rank=rank, alpha=rank, key=keys[2])
    tx = ql.paged(optax.adamw(1e-2), min_size=0)
    trainable, frozen = ql.split_trainable(model)
    opt_state = tx.init(trainable)
    kinds = {x.sharding.memory_kind for x in jax.tree.leaves(opt_state) if x.ndim}
    print(f"\ntrainable parameters {sum(x.size for x in jax.tree.leaves(trainable)):,}")
    print(f"optimizer state in {' and '.join(sorted(kinds))} memory")

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(trainable, opt_state, frozen, x):
        def loss_fn(trainable):
            y = ql.join_trainable(trainable, frozen)(x)
            return jnp.mean((y - teacher(x)) ** 2)

        loss, grads = jax.value_and_grad(loss_fn)(trainable)
        updates, opt_state = tx.update(grads, opt_state, trainable)
        return optax.apply_updates(trainable, updates), opt_state, loss

    losses = []
    for i in range(steps):
        x = jax.random.normal(jax.random.key(i), (256, width))
        trainable, opt_state, loss = step(trainable, opt_state, frozen, x)
        losses.append(loss)
    first, last = float(losses[0]), float(jnp.stack(losses[-10:]).mean())
    print(f"loss {first:.4f} -> {last:.4f} in {steps} steps")
    return first, last


if __name__ == "__main__":
    show_one_matrix()
    train_adapters()

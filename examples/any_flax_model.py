"""Adapters over models of Flax that know nothing of them: Linen, NNX, a library's.

    python examples/any_flax_model.py

Three vision transformers learn to tell the direction of stripes. Each is taken as it
was written, its linear layers are held in NF4 with adapters beside them, and these,
the head, the biases and the norms are trained by a plain optax loop.

1. A Linen model: layers scanned and rematerialised, a params tree.
2. An NNX model: attention, convolution, an einsum.
3. The blocks of CanViT, a public package (`pip install canvit-nnx`), left out where it
   is not installed. Its attention reads `self.qkv.kernel` and multiplies by itself.
"""

import importlib.util
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import nnx

import qlora_jax as ql
from qlora_jax import lora

WIDTH, HEADS, CLASSES, PATCH, SIDE = 64, 4, 4, 4, 16
# Trained whole beside the adapters.
ALSO = r"head/|bias$|scale$"


def stripes(key: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Draws images [count, 16, 16, 3] of stripes, and the direction of each, 0 to 3."""
    keys = jax.random.split(key, 3)
    labels = jax.random.randint(keys[0], (count,), 0, CLASSES)
    angle = (labels * jnp.pi / CLASSES)[:, None, None]
    phase = jax.random.uniform(keys[1], (count, 1, 1), maxval=2 * jnp.pi)
    y, x = jnp.mgrid[:SIDE, :SIDE] * 1.0
    wave = jnp.sin((x * jnp.cos(angle) + y * jnp.sin(angle)) * 1.2 + phase)
    noise = 0.3 * jax.random.normal(keys[2], (count, SIDE, SIDE, 3))
    return wave[..., None] + noise, labels


def train(
    model: Any, logits_of: Callable[[Any, jax.Array], jax.Array], steps: int = 60
) -> tuple[float, float]:
    """Trains a model with adapters in it; returns the first and the last loss."""
    trainable, frozen = lora.split_trainable(model, also=ALSO)
    sizes = [
        sum(x.nbytes for x in jax.tree.leaves(part)) for part in (trainable, model)
    ]
    print(f"  trained {sizes[0] / 1e3:.0f} kB of {sizes[1] / 1e3:.0f} kB")
    tx = optax.adamw(optax.cosine_decay_schedule(5e-3, steps))
    opt_state = tx.init(trainable)

    @jax.jit
    def step(trainable, opt_state, frozen, key):
        images, labels = stripes(key, 64)

        def loss_fn(trainable):
            logits = logits_of(ql.join_trainable(trainable, frozen), images)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean()

        loss, grads = jax.value_and_grad(loss_fn)(trainable)
        updates, opt_state = tx.update(grads, opt_state, trainable)
        return optax.apply_updates(trainable, updates), opt_state, loss

    losses = []
    for i in range(steps):
        key = jax.random.key(i)
        trainable, opt_state, loss = step(trainable, opt_state, frozen, key)
        losses.append(loss)
    first, last = float(losses[0]), float(jnp.stack(losses[-10:]).mean())
    print(f"  loss {first:.3f} -> {last:.3f} in {steps} steps")
    return first, last


class LinenBlock(nn.Module):
    """A transformer block."""

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        """Maps [batch, tokens, width] to the same, as `nn.scan` wants it."""
        x = x + nn.MultiHeadDotProductAttention(num_heads=HEADS)(nn.LayerNorm()(x))
        hidden = nn.gelu(nn.Dense(2 * WIDTH)(nn.LayerNorm()(x)))
        return x + nn.Dense(WIDTH)(hidden), None


class LinenViT(nn.Module):
    """A small vision transformer in Linen."""

    layers: int = 2

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps images [batch, 16, 16, 3] to logits [batch, classes]."""
        x = nn.Conv(WIDTH, (PATCH, PATCH), strides=PATCH, name="patches")(images)
        x = x.reshape(x.shape[0], -1, WIDTH)
        x = x + self.param("positions", nn.initializers.normal(0.5), x.shape[1:])
        blocks = nn.scan(
            nn.remat(LinenBlock),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.layers,
        )
        x, _ = blocks(name="blocks")(x, None)
        return nn.Dense(CLASSES, name="head")(x.mean(1))


def train_linen(steps: int = 60) -> tuple[float, float]:
    """Trains the Linen model."""
    model = LinenViT()
    images, _ = stripes(jax.random.key(0), 2)
    params = model.init(jax.random.key(1), images)["params"]
    # Which kernels are which matrices, the model itself has to tell.
    forms = lora.linen.forms(lambda p: model.apply({"params": p}, images), params)
    key = jax.random.key(2)
    params = ql.add_lora(params, rank=8, alpha=8, quantize="nf4", forms=forms, key=key)
    apply = lora.linen.apply(model)
    return train(params, lambda p, x: apply({"params": p}, x), steps)


class NNXBlock(nnx.Module):
    """A transformer block whose output projection is an einsum."""

    def __init__(self, rngs: nnx.Rngs):
        self.norm1, self.norm2 = (nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(2))
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 2 * WIDTH, rngs=rngs)
        self.down = nnx.Einsum("bth,hd->btd", (2 * WIDTH, WIDTH), (WIDTH,), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [batch, tokens, width] to the same."""
        x = x + self.attention(self.norm1(x))
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class NNXViT(nnx.Module):
    """The same kind of model in NNX."""

    def __init__(self, *, rngs: nnx.Rngs, layers: int = 2):
        window = (PATCH, PATCH)
        self.patches = nnx.Conv(3, WIDTH, window, strides=PATCH, rngs=rngs)
        shape = ((SIDE // PATCH) ** 2, WIDTH)
        self.positions = nnx.Param(0.5 * jax.random.normal(rngs.params(), shape))
        self.blocks = nnx.List([NNXBlock(rngs) for _ in range(layers)])
        self.head = nnx.Linear(WIDTH, CLASSES, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps images [batch, 16, 16, 3] to logits [batch, classes]."""
        x = self.patches(images).reshape(images.shape[0], -1, WIDTH)
        x = x + self.positions[...]
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


def train_nnx(steps: int = 60) -> tuple[float, float]:
    """Trains the NNX model; its convolution gets an adapter too."""
    model = NNXViT(rngs=nnx.Rngs(0))
    model = ql.add_lora(
        model,
        rank=8,
        alpha=8,
        targets="patches/kernel|blocks/.*kernel",
        quantize="nf4",
        key=jax.random.key(2),
    )
    return train(model, lambda model, x: model(x), steps)


def has_canvit() -> bool:
    """Whether the package of the third model is installed."""
    return importlib.util.find_spec("canvit_nnx") is not None


def train_canvit(steps: int = 60) -> tuple[float, float]:
    """Trains a classifier on CanViT's backbone, made small."""
    from canvit_core.backbone import ViTSpec  # type: ignore
    from canvit_nnx.model.backbone import ViTBackbone  # type: ignore
    from canvit_nnx.model.readout import LinearReadout  # type: ignore
    from canvit_nnx.model.rope import compute_2d_rope, make_rope_periods  # type: ignore
    from canvit_nnx.viewpoint import grid_coords  # type: ignore

    spec = ViTSpec(
        embed_dim=WIDTH,
        num_heads=HEADS,
        num_blocks=2,
        patch_size=PATCH,
        layerscale_init=1.0,
    )

    class Classifier(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.backbone = ViTBackbone(spec=spec, rngs=rngs)
            self.head = LinearReadout(in_dim=WIDTH, out_dim=CLASSES, rngs=rngs)

        def __call__(self, images: jax.Array) -> jax.Array:
            x = self.backbone.patch_embed(images)
            positions = grid_coords(size=SIDE // PATCH).reshape(1, -1, 2)
            periods = make_rope_periods(head_dim=spec.head_dim, base=spec.rope_base)
            rope = compute_2d_rope(positions=positions, periods=periods)
            for block in self.backbone.blocks:
                x = block(x, rope)
            return self.head(x.mean(1))

    model = ql.add_lora(
        Classifier(nnx.Rngs(0)),
        rank=8,
        alpha=8,
        targets="backbone/.*kernel",
        quantize="nf4",
        key=jax.random.key(2),
    )
    return train(model, lambda model, x: model(x), steps)


if __name__ == "__main__":
    print("Linen")
    train_linen()
    print("NNX")
    train_nnx()
    print("CanViT")
    if has_canvit():
        train_canvit()
    else:
        print("  not installed: pip install canvit-nnx")

"""The train step: one pure function, jitted once."""

import functools
import zlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from qlora_jax.lora import join_trainable
from qlora_jax.optim import take_step
from qlora_jax.train.loss import next_token_loss_sum
from qlora_jax.train.neftune import neftune

if TYPE_CHECKING:
    from jaxtyping import Array, Float

    Batch = Mapping[str, Any]  # of arrays, NumPy's or jax's, [batch, seq]
    LossSum = Callable[..., tuple[Float[Array, ""], Float[Array, ""]]]


# Measured on an H200 at 512 (Triton 4 % faster) and 8192 tokens (2 % slower).
_MANY_TOKENS = 4096
# What XLA puts into CUDA graphs, but slices, as copies to and from the host are.
_IN_GRAPHS = "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN"
# Beside the paths by which `join_trainable` folds the key for each weight's dropout.
_NOISE = zlib.crc32(b"noise on the embeddings")


def make_train_step(
    tx: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    loss_sum: "LossSum" = next_token_loss_sum,
    neftune_alpha: float = 0.0,
    compiler_options: Mapping[str, Any] | None = None,
    shardings: Any = None,
) -> Callable[..., tuple[Any, Any, dict[str, "Float[Array, '']"]]]:
    """Makes the jitted function that takes one optimizer step.

        trainable, opt_state, metrics = step(trainable, opt_state, frozen, batch, key)

    With accumulation a batch is computed in parts, one after another, and

        gradient = sum over parts of d(loss_sum) / sum over parts of tokens

    so that it is the gradient of the whole batch, however tokens fall into parts. Part
    i has the rows i, i + accumulate, i + 2 accumulate, ...

    Args:
        tx: the optimizer, plain or paged.
        accumulate: the number of parts; it divides the rows of a batch.
        loss_sum: (model, batch) -> summed loss, number of tokens; with `neftune_alpha`
            it takes `perturb=` too.
        neftune_alpha: of noise on the embeddings, see `neftune`; 0 for none.
        compiler_options: of XLA, for this program; see `step_options`.
        shardings: of `trainable` on a mesh, `jax.tree.map(lambda x: x.sharding,
            trainable)`. What is returned then lies as what was given. XLA left to
            itself may choose otherwise, and the second call compiles again.

    Returns:
        The step. `trainable` and `opt_state` are donated: use what it returns. Give
        them `committed` the first time, or the second call compiles again.
        `metrics` has `loss` (mean over the batch's tokens), `grad_norm` (before any
        clip; NaN if the loss is no number) and `target_tokens`. `key` is of dropout
        and of noise; None for neither.
    """

    def summed(trainable, frozen, batch, key):
        model = join_trainable(trainable, frozen, key=key)
        if not neftune_alpha or key is None:
            return loss_sum(model, batch)
        noise = neftune(batch, neftune_alpha, jax.random.fold_in(key, _NOISE))
        return loss_sum(model, batch, perturb=noise)

    gradient = jax.value_and_grad(summed, has_aux=True)

    def kept(tree):
        if shardings is None:
            return tree
        return lax.with_sharding_constraint(tree, shardings)

    options = dict(compiler_options or {})

    @functools.partial(jax.jit, donate_argnums=(0, 1), compiler_options=options)
    def step(trainable, opt_state, frozen, batch, key=None):
        if accumulate == 1:
            (loss, count), grads = gradient(trainable, frozen, batch, key)
        else:
            parts = jax.tree.map(functools.partial(_split_rows, accumulate), batch)

            def add(carry, part_and_number):
                part, number = part_and_number
                own = None if key is None else jax.random.fold_in(key, number)
                (loss, count), grads = gradient(trainable, frozen, part, own)
                return jax.tree.map(jnp.add, carry, (loss, count, grads)), None

            zeros = jax.tree.map(jnp.zeros_like, trainable)
            start = (jnp.float32(0), jnp.float32(0), zeros)
            parts = (parts, jnp.arange(accumulate))
            (loss, count, grads), _ = lax.scan(add, start, parts)
        count = jnp.maximum(count, 1)
        # A loss that is no number makes the gradient none: see `skip_nonfinite`.
        divisor = jnp.where(jnp.isfinite(loss), count, jnp.nan)
        grads = kept(jax.tree.map(lambda g: g / divisor.astype(g.dtype), grads))
        # Gradients are given back as parameters are updated, unless a sum over them is
        # left to the end.
        trainable, norm = lax.optimization_barrier((trainable, _norm(grads)))
        trainable, opt_state = take_step(tx, grads, opt_state, trainable)
        trainable = kept(trainable)
        metrics = {
            "loss": loss / count,
            "grad_norm": norm,
            "target_tokens": count,
        }
        # Parameters before state: see the note on donation in optim/paged.py.
        return trainable, opt_state, metrics

    return step


def step_options(
    tokens: int, *, remat: str = "full", tune: bool = True
) -> dict[str, Any]:
    """Returns the options of XLA that suit a step of so many tokens at a time.

    Of large products on an NVIDIA GPU the library's are the fastest, which also add
    what is added to a product (an adapter's to the base's) on the way out; XLA's own,
    which it writes in Triton, would be chosen for some and leave the sums to further
    passes. Of few tokens they are faster. docs/performance.md has the measurements.

    Copies of "offload" are kept out of CUDA graphs: in one of those a copy and the
    kernels around it run one after another.

    Args:
        tokens: of a step, or of a part of it with accumulation.
        remat: what the step recomputes, see `models.remat.Remat`.
        tune: whether XLA may try the ways to compute a product, on operands of its own:
            with a large vocabulary that takes another copy of the head while it
            compiles. Otherwise the library's first choice is taken.
    """
    if jax.default_backend() != "gpu":
        return {}
    options: dict[str, Any] = {}
    if tokens >= _MANY_TOKENS or not tune:
        options["xla_gpu_enable_triton_gemm"] = False
    if not tune:
        options["xla_gpu_autotune_level"] = 0
        # XLA makes one product of small ones of the same x. Their weights are copied
        # beside each other, for which it transposes the adapters of all layers.
        options["xla_gpu_dot_merger_threshold_mb"] = 0
    if remat == "offload":
        options["xla_gpu_enable_command_buffer"] = _IN_GRAPHS
    return options


def _norm(grads: Any) -> "Float[Array, '']":
    """The global norm, in float32 at least.

    Of bfloat16 gradients it is then the number that a clip inside `with_master` takes.
    """
    return optax.tree.norm(
        jax.tree.map(lambda g: g.astype(jnp.promote_types(g.dtype, jnp.float32)), grads)
    )


def _split_rows(parts: int, x: "Array") -> "Array":
    if x.shape[0] % parts:
        raise ValueError(f"A batch of {x.shape[0]} rows cannot be cut into {parts=}.")
    # Every parts-th row: of a batch whose rows lie on several devices in turn, each
    # has its share of every part.
    return x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)

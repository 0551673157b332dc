"""The Llama family as one Flax NNX model: a decoder whose layers are scanned.

Every linear is written `x @ w`, so a weight may be an array, a `QuantizedTensor`, a
`LoraTensor` or whatever else supports that; nothing here knows which. Differences
between families (Llama 1 to 3, Mistral, Qwen2, Qwen3) are data in `LlamaConfig`.

Letters in shapes: b batch, t tokens of a row, d hidden size, h query heads, k key and
value heads, c head dimension, s capacity of a cache, l layers, v vocabulary.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding, PartitionSpec

from qlora_jax.models.attention import attention
from qlora_jax.models.config import MLP_WEIGHTS, LlamaConfig
from qlora_jax.models.inputs import Gated, Normed
from qlora_jax.models.logits import float32_logits
from qlora_jax.models.offload import Keep
from qlora_jax.models.positions import document_lengths, rotate, segment_positions
from qlora_jax.models.remat import Remat, run_layers
from qlora_jax.models.stack import stack_of
from qlora_jax.sharding import on_rows, row_parts

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

    from qlora_jax.models.positions import Rotation

    Attend = Callable[[Array, Array, Array], Array]


# Tokens that go through an MLP at a time where it is recomputed: enough for a matmul to
# reach its speed. Layers that are compiled one by one leave memory for more, and those
# whose inputs are on the host.
_MLP_ROWS, _MLP_ROWS_MORE = 4096, 8192


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens seen so far, for decoding.

    Attributes:
        keys: [l, b, s, k, c], rotated.
        values: [l, b, s, k, c].
        lengths: int32 [b], how many tokens of each row are filled.
    """

    keys: Any
    values: Any
    lengths: Any

    def with_lengths(self, lengths: "Int[Array, ' b']") -> "Cache":
        """Returns the cache with only the first `lengths` tokens of each row."""
        return dataclasses.replace(self, lengths=lengths)


def products(
    x: "Any",
    weights: "list[Any]",
    onto: "Array | None" = None,
    name: str | None = None,
) -> "list[Array]":
    """Returns onto + x @ w for each weight; weights that can share work do.

    A type of weights may have `multiply_together(x, weights, onto, name)` for what
    several of them have in common when they multiply the same x.

    Args:
        x: [*b, m], or a value of `models.inputs` that stands for it.
        weights: what to multiply by.
        onto: what the one product is added to, or None.
        name: of `checkpoint_name`, for what is multiplied out; None for no name.
    """
    together = getattr(weights[0], "multiply_together", None)
    if together is not None and all(type(w) is type(weights[0]) for w in weights):
        return together(x, weights, onto, name)
    whole = x.whole() if hasattr(x, "whole") else x
    ys = [whole @ w if onto is None else onto + whole @ w for w in weights]
    return ys if name is None else [checkpoint_name(y, name) for y in ys]


def weight_of(w: Any) -> Any:
    """Returns the weight that an `nnx.Variable` holds, or the weight itself."""
    return w.get_value() if isinstance(w, nnx.Variable) else w


def rms_norm(
    x: "Float[Array, '*b d']", scale: "nnx.Param", eps: float
) -> "Float[Array, '*b d']":
    """Returns x / sqrt(mean(x²) + eps) · scale, computed in float32."""
    return Normed(x, scale[...], eps).whole()


class Layer(nnx.Module):
    """The decoder layers: every parameter has a leading axis of `num_layers`.

    A slice of it, as `lax.scan` makes, is one layer and is called as one:

        x = x + o_proj(attend(rotate(q), rotate(k), v))  of the normalised x
        x = x + down_proj(silu(gate_proj(x)) · up_proj(x))  of the normalised x
    """

    input_layernorm: nnx.Param
    post_attention_layernorm: nnx.Param

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs, dtype: Any):
        self.config = config
        layers, hidden = config.num_layers, config.hidden_size
        for name, shape in config.linear_shapes().items():
            weight = jax.random.normal(rngs.params(), (layers, *shape), dtype)
            setattr(self, name, nnx.Param(weight * 0.02))
            if name in config.biased():
                bias = jnp.zeros((layers, shape[1]), dtype)
                setattr(self, f"{name}_bias", nnx.Param(bias))
        for name in ("input_layernorm", "post_attention_layernorm"):
            setattr(self, name, nnx.Param(jnp.ones((layers, hidden), dtype)))
        if config.qk_norm:
            for name in ("q_norm", "k_norm"):
                scale = jnp.ones((layers, config.head_dim), dtype)
                setattr(self, name, nnx.Param(scale))

    def _project(
        self,
        x: "Any",
        *names: str,
        onto: "Array | None" = None,
        name: str | None = None,
    ) -> "list[Array]":
        """Returns x times each of these weights, plus their biases; see `products`."""
        weights = [weight_of(getattr(self, name)) for name in names]
        ys = products(x, weights, onto, name)
        biases = [getattr(self, f"{name}_bias", None) for name in names]
        return [
            y if bias is None else y + bias[...]
            for y, bias in zip(ys, biases, strict=True)
        ]

    def _heads(self, y: "Array", name: str) -> "Array":
        y = y.reshape(*y.shape[:-1], -1, self.config.head_dim)  # [b, t, h or k, c]
        norm = getattr(self, f"{name}_norm", None)
        return y if norm is None else rms_norm(y, norm, self.config.norm_eps)

    def __call__(
        self,
        x: "Float[Array, 'b t d']",
        rotation: "Rotation",
        attend: "Attend",
        mlp_rows: int | None = None,
        keep: "Keep" = checkpoint_name,
        rows: "NamedSharding | None" = None,
    ) -> "Float[Array, 'b t d']":
        """Applies one layer.

        Args:
            x: the residual stream.
            rotation: cosine and sine of the angles of each token.
            attend: (q, k, v) -> the attention, with its mask.
            mlp_rows: tokens that go through the MLP at a time, where it is computed
                again in the backward; None where it is kept.
            keep: what the values that may be kept for the backward go through.
            rows: how the rows of x lie on a mesh: of what each device has, `mlp_rows`
                tokens go through the MLP at a time.
        """
        x, shape = on_rows(x, rows), x.shape
        if self._is_rowwise(self.config.linear_shapes()):
            # Rows, of which the norm and the residual sum see the same array: a product
            # could otherwise not be added to it without a copy.
            x = x.reshape(-1, shape[-1])
        read = Normed(x, self.input_layernorm[...], self.config.norm_eps)
        projected = self._project(read, "q_proj", "k_proj", "v_proj")
        q, k, v = (
            self._heads(y.reshape(*shape[:-1], -1), name)
            for y, name in zip(projected, "qkv", strict=True)
        )
        q, k = rotate(q, rotation), rotate(k, rotation)
        q, k, v = keep((q, k, v), "qkv")
        mixed = keep(attend(q, k, v), "attention")
        mixed = mixed.reshape(*x.shape[:-1], -1)
        (x,) = self._project(mixed, "o_proj", onto=x)
        x = keep(on_rows(x, rows), "residual")
        mlp = functools.partial(self._mlp, recomputed=mlp_rows is not None)
        return self._in_chunks(mlp, x, mlp_rows, rows).reshape(shape)

    def _mlp(
        self, x: "Float[Array, '*b d']", *, recomputed: bool
    ) -> "Float[Array, '*b d']":
        """Returns x and what the MLP adds to it.

        Args:
            x: the residual stream.
            recomputed: whether gate and up are computed again in the backward.
        """
        scale = self.post_attention_layernorm[...]
        read = Normed(x, scale, self.config.norm_eps)
        gate, up = self._project(read, "gate_proj", "up_proj", name="gate_up")
        (x,) = self._project(Gated(gate, up, recomputed), "down_proj", onto=x)
        return x

    def _is_rowwise(self, names: "Iterable[str]") -> bool:
        """Whether each of these weights treats a row alike wherever it stands."""
        weights = (weight_of(getattr(self, name)) for name in names)
        return all(getattr(w, "rowwise", True) for w in weights)

    def _in_chunks(
        self,
        f: Callable,
        x: "Array",
        size: int | None,
        rows: "NamedSharding | None",
    ) -> "Array":
        """Applies `f` to `size` tokens at a time, and recomputes them in the backward.

        Of those of each device so many, where the rows lie on several.

        All at once where they are not several times as many, or a weight looks at
        where a row stands (a random mask does, and an adapter chosen by row).
        """
        parts = row_parts(rows)
        count = 1 if size is None else math.prod(x.shape[:-1]) / parts / size
        if count < 2 or count != int(count) or not self._is_rowwise(MLP_WEIGHTS):
            return f(x)
        one_at_a_time = jax.checkpoint(f, prevent_cse=False)
        done: list[Array] = []
        features, front = x.shape[-1:], () if parts == 1 else (parts,)
        whole = x.reshape(*front, -1, *features)
        for chunk in jnp.split(whole, int(count), axis=-2):
            if done:  # forward this chunk, and backward the last one, has to wait
                chunk, done[-1] = lax.optimization_barrier((chunk, done[-1]))
            y = one_at_a_time(on_rows(chunk.reshape(-1, *features), rows))
            done.append(on_rows(y, rows).reshape(chunk.shape))
        return jnp.concatenate(done, axis=-2).reshape(x.shape)


class Llama(nnx.Module):
    """A Llama-like language model.

    Parameters are `nnx.Param`s: `embed` [v, d], `layers` (a `Layer`: each linear weight
    [l, in, out], each norm [l, d]), `norm` [d] and, unless tied, `lm_head` [d, v]. The
    model computes in the dtype of `embed`; norms, rotation and softmax in float32.

    Attributes:
        config: the shape, a `LlamaConfig`.

    Example:
        >>> config = LlamaConfig(256, 64, 128, num_layers=2, num_heads=4,
        ...     num_kv_heads=2)
        >>> model = Llama(config, rngs=nnx.Rngs(0))
        >>> model(jnp.zeros((1, 8), jnp.int32)).shape
        (1, 8, 256)
    """

    def __init__(
        self, config: LlamaConfig, *, rngs: nnx.Rngs, dtype: Any = jnp.float32
    ):
        self.config = config
        shape = (config.vocab_size, config.hidden_size)
        self.embed = nnx.Param(jax.random.normal(rngs.params(), shape, dtype) * 0.02)
        self.layers = Layer(config, rngs=rngs, dtype=dtype)
        self.norm = nnx.Param(jnp.ones((config.hidden_size,), dtype))
        if not config.tie_embeddings:
            head = jax.random.normal(rngs.params(), shape[::-1], dtype)
            self.lm_head = nnx.Param(head * 0.02)

    def __call__(
        self,
        tokens: "Int[Array, 'b t']",
        segment_ids: "Int[Array, 'b t'] | None" = None,
        positions: "Int[Array, 'b t'] | None" = None,
    ) -> "Float[Array, 'b t v']":
        """Returns the float32 logits of the token after each token.

        Args:
            tokens: ids in [0, vocab_size).
            segment_ids: which document of its row a token belongs to; it attends to
                that document alone. None: a row is one document.
            positions: place of a token in its document. None: counted from the segment
                ids, or along the row.
        """
        return self.head(self.hidden(tokens, segment_ids, positions))

    def hidden(
        self,
        tokens: "Int[Array, 'b t']",
        segment_ids: "Int[Array, 'b t'] | None" = None,
        positions: "Int[Array, 'b t'] | None" = None,
        *,
        remat: Remat = "none",
        unroll: bool = False,
        perturb: "Callable[[Array], Array] | None" = None,
        rows: "NamedSharding | None" = None,
    ) -> "Float[Array, 'b t d']":
        """Returns the normalised last hidden state; `head` makes logits of it.

        Args:
            tokens: as in a call of the model.
            segment_ids: as in a call of the model.
            positions: as in a call of the model.
            remat: what the backward recomputes, see `models.remat.Remat`.
            unroll: compile the layers one by one instead of as one loop. Compiling
                takes several times as long; a step without recomputation is faster,
                since what a loop keeps for its backward is copied twice.
            perturb: what the embeddings [b, t, d] go through before the layers, as
                `train.neftune` gives it.
            rows: how the rows of `tokens` lie on a mesh, and so all activations; see
                `sharding.batch_sharding`.

        Raises:
            ValueError: if `tokens` is not [b, t] or `remat` is unknown.
        """
        if tokens.ndim != 2:
            raise ValueError(f"{tokens.shape=} must be [batch, tokens].")
        if positions is None and segment_ids is not None:
            positions = segment_positions(segment_ids)
        elif positions is None:
            index = jnp.arange(tokens.shape[1], dtype=jnp.int32)
            positions = jnp.broadcast_to(index, tokens.shape)
        mask = None
        if segment_ids is not None:
            mask = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
        window = self.config.sliding_window
        rotation = self._rotation(positions)

        def attend(q, k, v):
            return attention(q, k, v, mask=mask, window=window)

        graph, sliced, at_layer = stack_of(self.layers)
        # The activations of the MLP are the widest: recomputed, they come in chunks.
        has_room = unroll or remat == "offload"
        mlp_rows = _MLP_ROWS_MORE if has_room else _MLP_ROWS
        mlp_rows = None if remat == "none" else mlp_rows

        def layer(x, number_and_slices, keep):
            layer = nnx.merge(graph, at_layer(*number_and_slices))
            return layer(x, rotation, attend, mlp_rows, keep, rows)

        x = on_rows(self.embed[...][tokens], rows)
        x = x if perturb is None else perturb(x)
        x = run_layers(layer, x, sliced, remat=remat, unroll=unroll)
        return rms_norm(x, self.norm, self.config.norm_eps)

    def head(self, x: "Float[Array, '*b d']") -> "Float[Array, '*b v']":
        """Returns the float32 logits of normalised hidden states."""
        return self.head_on(None)(x)

    def head_on(self, rows: "NamedSharding | None") -> "Callable[[Array], Array]":
        """Returns `head`, for hidden states whose rows lie so on a mesh.

        What it sums over is gathered once for all calls: in a loop it would be in each.
        """
        tied = self.config.tie_embeddings
        weight, axis = weight_of(self.embed if tied else self.lm_head), int(tied)
        if rows is not None and isinstance(weight, jax.Array):
            whole: list[Any] = [PartitionSpec.UNCONSTRAINED] * 2  # [d, v] or [v, d]
            whole[axis] = None
            place = NamedSharding(rows.mesh, PartitionSpec(*whole))
            weight = lax.with_sharding_constraint(weight, place)

        def head(x: "Array") -> "Array":
            x = on_rows(x, rows)
            if isinstance(weight, jax.Array):
                return float32_logits(x, weight, axis)
            if hasattr(weight, "each"):  # a table that takes a product for each token
                return weight.each(lambda w: float32_logits(x, w, axis))
            return (x @ weight).astype(jnp.float32)

        return head

    def init_cache(self, batch: int, capacity: int) -> Cache:
        """Returns an empty cache for `batch` rows of at most `capacity` tokens."""
        c = self.config
        shape = (c.num_layers, batch, capacity, c.num_kv_heads, c.head_dim)
        empty = jnp.zeros(shape, self.embed[...].dtype)
        return Cache(empty, empty, jnp.zeros(batch, jnp.int32))

    def decode(
        self, tokens: "Int[Array, 'b t']", cache: Cache
    ) -> "tuple[Float[Array, 'b t d'], Cache]":
        """Runs the tokens that follow those in the cache.

        Rows may have different lengths: a row's token `i` is at position
        `lengths + i`, and sees every filled position up to its own. Tokens of padding
        do no harm if the caller takes them back by `Cache.with_lengths`.

        Args:
            tokens: the next tokens of each row.
            cache: what came before; it must have room for them.

        Returns:
            The normalised hidden states, and the cache with these tokens in it.
        """
        batch, count = tokens.shape
        positions = cache.lengths[:, None] + jnp.arange(count, dtype=jnp.int32)
        seen = jnp.arange(cache.keys.shape[2])[None, None, None]  # [1, 1, 1, s]
        query = positions[:, None, :, None]  # [b, 1, t, 1]
        mask = seen <= query
        if self.config.sliding_window is not None:
            mask &= seen > query - self.config.sliding_window
        rotation = self._rotation(positions)
        rows = jnp.arange(batch)[:, None]
        graph, sliced, at_layer = stack_of(self.layers)

        def body(x, layer_and_cache):
            layer, keys, values = layer_and_cache
            kept = {}

            def attend(q, k, v):
                kept["keys"] = keys.at[rows, positions].set(k)
                kept["values"] = values.at[rows, positions].set(v)
                return jax.nn.dot_product_attention(
                    q, kept["keys"], kept["values"], mask=mask
                )

            x = nnx.merge(graph, at_layer(*layer))(x, rotation, attend)
            return x, (kept["keys"], kept["values"])

        x = self.embed[...][tokens]
        x, (keys, values) = lax.scan(body, x, (sliced, cache.keys, cache.values))
        x = rms_norm(x, self.norm, self.config.norm_eps)
        return x, Cache(keys, values, cache.lengths + count)

    def _rotation(self, positions: "Int[Array, 'b t']") -> "Rotation":
        frequencies = self.config.rope_frequencies()  # [c/2]
        scaling = self.config.rope_scaling
        if scaling is not None and self.config.is_rope_dynamic:
            original = scaling.original_max_position
            longer = jnp.maximum(document_lengths(positions), original) / original
            stretch = scaling.factor * longer - (scaling.factor - 1)  # [b, t]
            exponents = -self.config.rope_exponents()
            frequencies = frequencies * stretch[..., None] ** exponents  # [b, t, c/2]
        angles = positions[..., None].astype(jnp.float32) * frequencies
        factor = 1.0 if scaling is None else scaling.attention_factor
        return jnp.cos(angles) * factor, jnp.sin(angles) * factor

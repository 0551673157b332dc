"""What distinguishes one Llama-like model from another, as data."""

import dataclasses

import numpy as np

from qlora_jax.models.rope import ROPE_SCALINGS, RopeScaling

# Names of the linear weights of a layer, in the order they are applied.
ATTENTION_WEIGHTS = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_WEIGHTS = ("gate_proj", "up_proj", "down_proj")
LINEAR_WEIGHTS = ATTENTION_WEIGHTS + MLP_WEIGHTS


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Shape and variants of a Llama-like decoder.

    Attributes:
        vocab_size: rows of the embedding.
        hidden_size: width of the residual stream.
        intermediate_size: width of the gated MLP.
        num_layers: decoder layers.
        num_heads: query heads.
        num_kv_heads: key and value heads; it divides `num_heads`.
        head_dim: width of a head; 0 stands for `hidden_size // num_heads`.
        norm_eps: added to the mean square in every RMSNorm.
        rope_theta: base of the rotary frequencies.
        rope_scaling: how they are stretched, None for not at all.
        max_position: the context length the model is meant for.
        tie_embeddings: the head is the transposed embedding.
        qkv_bias: q, k and v projections add a bias (Qwen2).
        o_bias: the output projection adds a bias.
        mlp_bias: the three projections of the MLP add a bias.
        qk_norm: RMSNorm over each head of q and k before the rotation (Qwen3).
        sliding_window: a token sees this many last tokens, itself included (Mistral);
            None for all.
        architecture: the class name in a Hugging Face config.
        bos_token_id: first token of a text, None if the model has none.
        eos_token_id: the tokens that end a text.

    Raises:
        ValueError: if heads or sizes do not fit together.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int = 0
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    max_position: int = 2048
    tie_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    architecture: str = "LlamaForCausalLM"
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            positive = field.type is int and field.name != "head_dim"
            if positive and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{field.name}={value!r} must be a positive integer.")
        if self.head_dim < 0:
            raise ValueError(f"{self.head_dim=} must be positive, or 0.")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"{self.num_heads=} must be a multiple of {self.num_kv_heads=}."
            )
        if not self.head_dim:
            if self.hidden_size % self.num_heads:
                raise ValueError(
                    f"{self.hidden_size=} is no multiple of {self.num_heads=}: "
                    "give head_dim."
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_heads)
        if self.head_dim % 2:
            raise ValueError(f"{self.head_dim=} must be even: rotation takes pairs.")
        if not self.rope_theta > 0:
            raise ValueError(f"{self.rope_theta=} must be positive.")
        if self.is_rope_dynamic and self.head_dim == 2:
            raise ValueError("Dynamic rotary scaling takes head_dim above 2.")

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """Returns [in, out] of each linear weight of a layer, by its name."""
        hidden, inner = self.hidden_size, self.intermediate_size
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {
            "q_proj": (hidden, q),
            "k_proj": (hidden, kv),
            "v_proj": (hidden, kv),
            "o_proj": (q, hidden),
            "gate_proj": (hidden, inner),
            "up_proj": (hidden, inner),
            "down_proj": (inner, hidden),
        }

    def biased(self) -> tuple[str, ...]:
        """Returns the names of the linear weights that have a bias."""
        return (
            ATTENTION_WEIGHTS[:3] * self.qkv_bias
            + ATTENTION_WEIGHTS[3:] * self.o_bias
            + MLP_WEIGHTS * self.mlp_bias
        )

    @property
    def is_rope_dynamic(self) -> bool:
        """Whether the frequencies depend on the length, see `rope_exponents`."""
        return self.rope_scaling is not None and self.rope_scaling.kind == "dynamic"

    def rope_exponents(self) -> np.ndarray:
        """Returns how a document's length changes each frequency, if dynamic.

        With M = `rope_scaling.original_max_position` a document of L tokens has

            frequency[i] = rope_frequencies()[i] * stretch ** -exponent[i]
            stretch = factor * max(L, M) / M - (factor - 1)

        which is rope_theta times stretch ** (head_dim / (head_dim - 2)): the highest
        frequency stays, the lowest is divided by the stretch.

        Returns:
            float32 [head_dim / 2], from 0 to 1.
        """
        pairs = np.arange(self.head_dim // 2, dtype=np.float32)
        return 2 * pairs / np.float32(self.head_dim - 2)

    def rope_frequencies(self) -> np.ndarray:
        """Returns the angle by which each pair of dimensions turns a position.

            frequency[i] = rope_theta ** (-2 i / head_dim),  then stretched

        Returns:
            float32 [head_dim / 2], in radians; if `is_rope_dynamic`, those of a
            document that is no longer than the original context.
        """
        exponents = np.arange(0, self.head_dim, 2, dtype=np.float64) / self.head_dim
        frequencies = self.rope_theta**-exponents
        if self.rope_scaling is not None:
            scale = ROPE_SCALINGS[self.rope_scaling.kind]
            frequencies = scale(frequencies, self.rope_scaling)
        return frequencies.astype(np.float32)

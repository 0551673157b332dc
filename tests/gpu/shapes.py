"""Shapes of models for the tests on GPUs."""

from qlora_jax.models import LlamaConfig

SMALL = LlamaConfig(
    vocab_size=4096,
    hidden_size=1024,
    intermediate_size=2816,
    num_layers=2,
    num_heads=16,
    num_kv_heads=4,
)

"""The Llama family as one Flax model."""

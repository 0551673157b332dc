"""LoRA adapters over any weight that supports `x @ w`."""

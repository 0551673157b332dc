"""QLoRA for JAX: finetune large language models on one GPU, the base in 4 bits."""

"""QLoRA for JAX: finetune large language models on one GPU, the base in 4 bits."""

from qlora_jax.lora import LoraTensor as LoraTensor
from qlora_jax.lora import add_lora as add_lora
from qlora_jax.lora import join_trainable as join_trainable
from qlora_jax.lora import merge_lora as merge_lora
from qlora_jax.lora import split_trainable as split_trainable
from qlora_jax.optim import paged as paged
from qlora_jax.quant import FORMATS as FORMATS
from qlora_jax.quant import Format as Format
from qlora_jax.quant import QuantizedTensor as QuantizedTensor
from qlora_jax.quant import dequantize as dequantize
from qlora_jax.quant import quantize as quantize
from qlora_jax.quant import quantize_tree as quantize_tree
from qlora_jax.quant import quantized_matmul as quantized_matmul

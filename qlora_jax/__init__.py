"""QLoRA for JAX: finetune large language models on one GPU, the base in 4 bits."""

from qlora_jax.quant import FORMATS as FORMATS
from qlora_jax.quant import Format as Format
from qlora_jax.quant import QuantizedTensor as QuantizedTensor
from qlora_jax.quant import dequantize as dequantize
from qlora_jax.quant import quantize as quantize
from qlora_jax.quant import quantize_tree as quantize_tree
from qlora_jax.quant import quantized_matmul as quantized_matmul

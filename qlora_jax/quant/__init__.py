"""Quantized weights: formats, blockwise codes, the tensor that multiplies."""

from qlora_jax.quant.blockwise import dequantize_blockwise as dequantize_blockwise
from qlora_jax.quant.blockwise import quantize_blockwise as quantize_blockwise
from qlora_jax.quant.formats import FORMATS as FORMATS
from qlora_jax.quant.formats import Format as Format
from qlora_jax.quant.formats import dynamic_map as dynamic_map
from qlora_jax.quant.formats import get_format as get_format
from qlora_jax.quant.rules import quantize_tree as quantize_tree
from qlora_jax.quant.tensor import QuantizedTensor as QuantizedTensor
from qlora_jax.quant.tensor import dequantize as dequantize
from qlora_jax.quant.tensor import quantize as quantize
from qlora_jax.quant.tensor import quantized_matmul as quantized_matmul
from qlora_jax.quant.tensor import transposed_product as transposed_product

"""GPU kernels for weights held in 4 bits, and the plain form of each.

Arrays in, arrays out: this package imports jax and nothing of `qlora_jax`.
"""

from pallas_kernels.api import dequantize as dequantize
from pallas_kernels.api import quantize as quantize
from pallas_kernels.api import quantized_matmul as quantized_matmul
from pallas_kernels.api import quantized_matmul_dx as quantized_matmul_dx
from pallas_kernels.implementations import Implementation as Implementation
from pallas_kernels.packed import PackedSpec as PackedSpec
from pallas_kernels.packed import PackedWeight as PackedWeight

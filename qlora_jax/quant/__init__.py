"""Quantized weights: formats, blockwise codes, the tensor that multiplies."""

"""GPU kernels for weights held in 4 bits, and the plain form of each.

Arrays in, arrays out: this package imports jax and nothing of `qlora_jax`.
"""

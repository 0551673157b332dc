"""Optimizers whose state is paged to host memory, kept in 8 bits, or both."""

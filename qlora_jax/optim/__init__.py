"""Optimizers whose state is paged to host memory, kept in 8 bits, or both."""

from qlora_jax.optim.eightbit import adam8bit as adam8bit
from qlora_jax.optim.eightbit import adamw8bit as adamw8bit
from qlora_jax.optim.eightbit import lion8bit as lion8bit
from qlora_jax.optim.eightbit import scale_by_adam8bit as scale_by_adam8bit
from qlora_jax.optim.eightbit import scale_by_lion8bit as scale_by_lion8bit
from qlora_jax.optim.finite import SkipNonfiniteState as SkipNonfiniteState
from qlora_jax.optim.finite import skip_nonfinite as skip_nonfinite
from qlora_jax.optim.master import with_master as with_master
from qlora_jax.optim.paged import paged as paged
from qlora_jax.optim.paged import take_step as take_step

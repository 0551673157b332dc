"""Models whose linears are written `x @ w`."""

from qlora_jax.models.config import LlamaConfig as LlamaConfig
from qlora_jax.models.config_hf import config_from_hf as config_from_hf
from qlora_jax.models.llama import Llama as Llama
from qlora_jax.models.rope import RopeScaling as RopeScaling
from qlora_jax.models.vocabulary import resize_vocabulary as resize_vocabulary

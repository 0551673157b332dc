"""Low-rank adapters over frozen weights: added, trained, chosen, merged."""

from qlora_jax.lora import functions as functions
from qlora_jax.lora import linen as linen
from qlora_jax.lora import nnx as nnx
from qlora_jax.lora.adapters import add_lora as add_lora
from qlora_jax.lora.bank import AdapterBank as AdapterBank
from qlora_jax.lora.bank import combine_adapters as combine_adapters
from qlora_jax.lora.bank import with_rank as with_rank
from qlora_jax.lora.forms import KernelForm as KernelForm
from qlora_jax.lora.initial import loftq as loftq
from qlora_jax.lora.initial import pissa as pissa
from qlora_jax.lora.lora import Frozen as Frozen
from qlora_jax.lora.lora import LoRAParam as LoRAParam
from qlora_jax.lora.lora import LoraTensor as LoraTensor
from qlora_jax.lora.merge import MergeReport as MergeReport
from qlora_jax.lora.merge import merge_lora as merge_lora
from qlora_jax.lora.merge import unmerge_lora as unmerge_lora
from qlora_jax.lora.plus import lora_plus as lora_plus
from qlora_jax.lora.rows import TrainedRows as TrainedRows
from qlora_jax.lora.tokens import fold_rows as fold_rows
from qlora_jax.lora.tokens import train_rows as train_rows
from qlora_jax.lora.trainable import join_trainable as join_trainable
from qlora_jax.lora.trainable import split_trainable as split_trainable
from qlora_jax.lora.trainable import stack_adapters as stack_adapters

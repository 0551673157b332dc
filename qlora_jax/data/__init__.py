"""Rows, conversations, tokens with a loss mask, batches."""

from qlora_jax.data.batching import Batches as Batches
from qlora_jax.data.batching import in_order as in_order
from qlora_jax.data.prompts import FORMATS as FORMATS
from qlora_jax.data.prompts import DataError as DataError
from qlora_jax.data.prompts import Example as Example
from qlora_jax.data.prompts import encode_conversation as encode_conversation
from qlora_jax.data.prompts import read_conversations as read_conversations
from qlora_jax.data.prompts import to_conversation as to_conversation
from qlora_jax.data.stdlib import stdlib_conversations as stdlib_conversations

"""Rows, conversations, tokens with a loss mask, batches."""

from qlora_jax.data.batching import Batches as Batches
from qlora_jax.data.batching import Rows as Rows
from qlora_jax.data.batching import in_order as in_order
from qlora_jax.data.conversations import Conversation as Conversation
from qlora_jax.data.conversations import DataError as DataError
from qlora_jax.data.conversations import conversation as conversation
from qlora_jax.data.conversations import exchange as exchange
from qlora_jax.data.documents import Documents as Documents
from qlora_jax.data.encoding import Encoder as Encoder
from qlora_jax.data.encoding import EncodingOptions as EncodingOptions
from qlora_jax.data.encoding import Example as Example
from qlora_jax.data.encoding import encode_conversation as encode_conversation
from qlora_jax.data.formats import FORMATS as FORMATS
from qlora_jax.data.formats import RowFormat as RowFormat
from qlora_jax.data.formats import to_conversations as to_conversations
from qlora_jax.data.mixture import Mixture as Mixture
from qlora_jax.data.packing import best_fit as best_fit
from qlora_jax.data.preparation import Prepared as Prepared
from qlora_jax.data.preparation import Statistics as Statistics
from qlora_jax.data.preparation import prepare as prepare
from qlora_jax.data.previews import preview as preview
from qlora_jax.data.sources import Source as Source
from qlora_jax.data.sources import as_sources as as_sources
from qlora_jax.data.sources import read_conversations as read_conversations
from qlora_jax.data.stdlib import stdlib_conversations as stdlib_conversations
from qlora_jax.data.templates import TEMPLATES as TEMPLATES

"""What the data ask of a tokenizer, so that they need none of any kind."""

import datetime
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class ChatTokenizer(Protocol):
    """What encoding asks of a tokenizer; `qlora_jax.load_tokenizer` returns one."""

    @property
    def bos_token(self) -> str:
        """What a text begins with, "" if nothing."""
        ...

    @property
    def eos_token(self) -> str:
        """What an answer ends with."""
        ...

    @property
    def control_tokens(self) -> Sequence[str]:
        """Tokens that no text of a user may become."""
        ...

    @property
    def template_source(self) -> str:
        """Jinja source of the chat template."""
        ...

    @property
    def fingerprint(self) -> str:
        """Hash of all that decides which ids a conversation becomes."""
        ...

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        answer_next: bool = False,
        tools: Sequence[Mapping[str, Any]] = (),
        date: datetime.date | None = None,
    ) -> str:
        """Returns a conversation as the text the model was trained on."""
        ...

    def encode_many(
        self, texts: Sequence[str], *, special: bool = False
    ) -> list[list[int]]:
        """Returns the ids of each text; `special` lets control tokens be themselves."""
        ...

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """Returns the text of ids."""
        ...

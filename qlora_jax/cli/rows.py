"""The settings of how rows of data become tokens, of every command that reads some."""

import dataclasses
from typing import Any, Literal


@dataclasses.dataclass(frozen=True)
class Rows:
    """How rows become tokens; see `qlora_jax.data.prepare`.

    Attributes:
        format: what the rows are, see `qlora-jax data formats`; auto finds it by their
            fields.
        answers: learn the last answer of a conversation, or all of them.
        train_on_source: learn the questions too.
        source_max_len: tokens that a question is cut to.
        target_max_len: tokens that an answer is cut to.
        truncate_source: which end of a question falls.
        chat_template: guanaco, alpaca, chatml, hermes, plain, or Jinja source; None for
            the model's own.
        packing: several documents to a row, none seeing another.
        skip_bad_rows: leave out up to so many rows that are not what they should be.
    """

    format: str = "auto"
    answers: Literal["last", "all"] = "last"
    train_on_source: bool = False
    source_max_len: int | None = None
    target_max_len: int | None = None
    truncate_source: Literal["right", "left"] = "right"
    chat_template: str | None = None
    packing: bool = False
    skip_bad_rows: int = 0

    def of_rows(self) -> dict[str, Any]:
        """These settings, as `data.prepare` and `data.preview` take them."""
        names = [field.name for field in dataclasses.fields(Rows)]
        return {name: getattr(self, name) for name in names}

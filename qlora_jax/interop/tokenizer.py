"""Text to ids and back, and conversations to text.

A `Tokenizer` joins what the `tokenizers` library does (text to ids) with the chat
template of the model (a Jinja program, run in a sandbox) and its special tokens.
"""

import dataclasses
import datetime
import functools
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tokenizers

Message = Mapping[str, Any]  # role: "system", "user" or "assistant"; content: text

# What a model without a template of its own is trained on: the prompt of Alpaca, as in
# QLoRA's code.
ALPACA_TEMPLATE = """\
{{ bos_token }}{% for message in messages %}{% if message.role == 'system' %}\
{{ message.content }}

{% elif message.role == 'user' %}### Instruction:
{{ message.content }}

### Response:
{% else %}{{ message.content }}{{ eos_token }}{% endif %}{% endfor %}"""

# A text of this form stands for a message while the template is rendered.
_PLACEHOLDER = "\ue000{}\ue001"
_PLACEHOLDERS = re.compile("\ue000(\\d+)\ue001")


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """The text side of a model.

    Attributes:
        backend: the `tokenizers.Tokenizer`.
        bos_token: what a text begins with, "" if nothing.
        eos_token: what an answer ends with.
        chat_template: Jinja source; None stands for Alpaca's prompt.
    """

    backend: "tokenizers.Tokenizer"
    bos_token: str
    eos_token: str
    chat_template: str | None = None

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def bos_id(self) -> int | None:
        """Id of the token a text begins with, None if there is none."""
        return self.backend.token_to_id(self.bos_token) if self.bos_token else None

    @property
    def eos_id(self) -> int:
        """Id of the token an answer ends with."""
        found = self.backend.token_to_id(self.eos_token)
        if found is None:
            raise ValueError(f"eos_token {self.eos_token!r} is no token of the model.")
        return found

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Returns the ids of a text, without a first or last token added.

        Args:
            text: any text.
            special: let "<|im_end|>" and the like become control tokens. False: they
                are letters, so that a user's text cannot end its turn.
        """
        self.backend.encode_special_tokens = not special
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_many(
        self, texts: Sequence[str], *, special: bool = False
    ) -> list[list[int]]:
        """Returns the ids of each text, as `encode` does, in parallel."""
        self.backend.encode_special_tokens = not special
        batch = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in batch]

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """Returns the text of ids; control tokens are left out unless `special`."""
        return self.backend.decode(list(ids), skip_special_tokens=not special)

    @property
    def template_source(self) -> str:
        """Jinja source of the chat template that is used."""
        return self.chat_template or ALPACA_TEMPLATE

    @property
    def fingerprint(self) -> str:
        """Hash of all that decides which ids a conversation becomes."""
        parts = (self.backend.to_str(), self.bos_token, self.eos_token)
        text = json.dumps([*parts, self.template_source])
        return hashlib.sha256(text.encode()).hexdigest()

    def render(
        self,
        messages: Sequence[Message],
        *,
        answer_next: bool = False,
        tools: Sequence[Mapping[str, Any]] = (),
        date: datetime.date | None = None,
        **variables: Any,
    ) -> str:
        """Returns a conversation as the text the model was trained on.

        Args:
            messages: the turns, each with `role` and `content`.
            answer_next: end where the assistant's answer begins.
            tools: descriptions of functions that may be called, as OpenAI has them.
            date: what a template that tells the day takes for today; None: today.
            variables: what else the template knows, as `enable_thinking=False`.

        Raises:
            ValueError: if the template refuses the messages.
        """
        try:
            return _compiled(self.template_source).render(
                messages=[dict(message) for message in messages],
                tools=[dict(tool) for tool in tools] or None,
                add_generation_prompt=answer_next,
                bos_token=self.bos_token,
                eos_token=self.eos_token,
                strftime_now=(date or datetime.datetime.now()).strftime,
                **variables,
            )
        except Exception as error:  # whatever a program of others runs into
            roles = [message.get("role") for message in messages]
            raise ValueError(f"The chat template refuses {roles=}: {error}") from None

    def encode_chat(
        self, messages: Sequence[Message], *, answer_next: bool = False
    ) -> list[int]:
        """Returns the ids of a conversation.

        The template's control tokens count; the same letters inside a message do not.
        """
        marks: list[str] = []
        control = self.control_tokens
        marked = [_marked(message, control, marks) for message in messages]
        # Text that looks like control is tokenized apart from the template around it.
        pieces = _PLACEHOLDERS.split(self.render(marked, answer_next=answer_next))
        ids: list[int] = []
        for i, piece in enumerate(pieces):  # template, number, template, ...
            if i % 2:
                ids += self.encode(marks[int(piece)])
            elif piece:
                ids += self.encode(piece, special=True)
        return ids

    @property
    def control_tokens(self) -> list[str]:
        """Tokens that no text of a user may become."""
        added = self.backend.get_added_tokens_decoder().values()
        return [token.content for token in added if token.special]


def _marked(value: Any, control: Sequence[str], marks: list[str], key: str = "") -> Any:
    """A message with placeholders for texts that look like control tokens.

    Of `content` the whole text, elsewhere (arguments of calls, say) the tokens alone,
    so that what a template does with the rest of it is done.
    """
    if isinstance(value, Mapping):
        return {k: _marked(v, control, marks, str(k)) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_marked(item, control, marks) for item in value]
    if not isinstance(value, str) or key == "role":
        return value

    def mark(text: str) -> str:
        marks.append(text)
        return _PLACEHOLDER.format(len(marks) - 1)

    # Nobody else's placeholder counts as one.
    if _PLACEHOLDERS.search(value):
        return mark(value)
    if not any(token in value for token in control):
        return value
    if key == "content":
        return mark(value)
    tokens = sorted(control, key=len, reverse=True)
    pattern = "|".join(map(re.escape, tokens))
    return re.sub(pattern, lambda match: mark(match[0]), value)


@functools.lru_cache(maxsize=16)
def _compiled(source: str) -> Any:
    import jinja2
    import jinja2.ext
    import jinja2.nodes
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """Marks of answers, which some templates have; they write nothing."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    # The settings under which the templates of published models were written.
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", Generation],
    )
    environment.globals["raise_exception"] = raise_exception
    # Jinja's own writes for HTML: "<" as "\u003c".
    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    return environment.from_string(source)


def load_tokenizer(
    path: str | os.PathLike[str], *, revision: str | None = None
) -> Tokenizer:
    """Loads the tokenizer of a model: a Hugging Face folder or a GGUF file.

    Args:
        path: what `load_model` takes: a folder, a `.gguf` file or a name. Of a folder
            `tokenizer.json` is read or, without it, `tokenizer.model` (SentencePiece).
        revision: of a model on the hub: a branch, tag or commit.

    Raises:
        ModelFileError: if the files are missing or damaged.
        NotImplementedError: if the kind of tokenizer is not known.
    """
    from qlora_jax.interop.gguf import GGUFFile
    from qlora_jax.interop.hub import find_model
    from qlora_jax.interop.tokenizer_files import from_folder, from_gguf

    path = find_model(path, revision)
    return from_gguf(GGUFFile(path)) if path.is_file() else from_folder(path)

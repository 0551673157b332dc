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
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qlora_jax.interop import sentencepiece
from qlora_jax.interop.gguf import GGUFFile
from qlora_jax.interop.safetensors import read_json
from qlora_jax.interop.weights import ModelFileError

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
    from qlora_jax.interop.hub import find_model

    path = find_model(path, revision)
    return _from_gguf(GGUFFile(path)) if path.is_file() else _from_folder(path)


def _from_folder(folder: pathlib.Path) -> Tokenizer:
    import tokenizers

    file, pieces = folder / "tokenizer.json", folder / "tokenizer.model"
    settings = folder / "tokenizer_config.json"
    config: dict[str, Any] = {}
    if file.is_file():
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        # The library raises bare Exception, and panics where a file lies to it.
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            raise ModelFileError(f"{file} is no tokenizer: {error}.") from None
        backend.no_truncation()
        backend.no_padding()
        config = read_json(settings)
    elif pieces.is_file():
        model = sentencepiece.read_model(pieces)
        config = _special_of(model) | (
            read_json(settings) if settings.is_file() else {}
        )
        # As transformers has it: the first models were used with a space in front of
        # each stretch of text, and configs of later ones say otherwise.
        if model.prefix == "always" and config.get("legacy") is False:
            model = dataclasses.replace(model, prefix="first")
        backend = _built(pieces, model)
        _add_tokens(folder, backend, config)
    else:
        raise ModelFileError(f"{folder} has neither {file.name} nor {pieces.name}.")

    def token(name: str) -> str:
        value = config.get(name) or ""
        value = value.get("content") if isinstance(value, dict) else value
        if not isinstance(value, str):
            raise ModelFileError(f"{settings}: {name} is {value!r}, no text.")
        return value

    template = _template(settings, config)
    if (folder / "chat_template.jinja").is_file():
        template = _text(folder / "chat_template.jinja")
    if backend.token_to_id(token("eos_token")) is None:
        raise ModelFileError(f"{folder}: eos_token {token('eos_token')!r} has no id.")
    return Tokenizer(backend, token("bos_token"), token("eos_token"), template)


def _text(path: pathlib.Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ModelFileError(f"{path} is not UTF-8.") from None


def _template(path: pathlib.Path, config: Mapping[str, Any]) -> str | None:
    template = config.get("chat_template")
    if isinstance(template, list):  # several by name
        named = {t.get("name"): t.get("template") for t in template if type(t) is dict}
        template = named.get("default")
    if not isinstance(template, str | None):
        raise ModelFileError(f"{path}: chat_template is {template!r}, no text.")
    return template


def _special_of(model: sentencepiece.SentencePieceModel) -> dict[str, Any]:
    ids = {"bos_token": model.bos_id, "eos_token": model.eos_id}
    return {name: model.pieces[i].text for name, i in ids.items() if i >= 0}


def _built(
    path: pathlib.Path, model: sentencepiece.SentencePieceModel
) -> "tokenizers.Tokenizer":
    try:
        return sentencepiece.build(model)
    except ValueError as error:
        raise ModelFileError(f"{path}: {error}.") from None


def _add_tokens(
    path: pathlib.Path, backend: "tokenizers.Tokenizer", config: Mapping[str, Any]
) -> None:
    """Adds the tokens that other files than the model's name, if they come next."""
    import tokenizers

    added = config.get("added_tokens_decoder") or {}
    if not isinstance(added, dict):
        raise ModelFileError(f"{path}: added_tokens_decoder is {added!r}.")
    if (path / "added_tokens.json").is_file():  # as old versions wrote them
        listed = read_json(path / "added_tokens.json")
        added = {str(i): {"content": text} for text, i in listed.items()} | added
    for index in sorted(added, key=lambda key: (len(key), key)):
        fields = added[index]
        content = fields.get("content") if isinstance(fields, dict) else None
        if not isinstance(content, str) or not content or not index.isdigit():
            raise ModelFileError(f"{path}: added token {index}: {fields!r}.")
        if backend.token_to_id(content) is not None:
            continue
        next_id = backend.get_vocab_size(with_added_tokens=True)
        if int(index) != next_id:
            raise ModelFileError(
                f"{path}: added token {content!r} has id {index}, and the next id is "
                f"{next_id}."
            )
        is_special = bool(fields.get("special"))
        token = tokenizers.AddedToken(content, special=is_special, normalized=False)
        (backend.add_special_tokens if is_special else backend.add_tokens)([token])


# How GGUF's names for pre-tokenizers split a text: a regular expression ("" is that of
# GPT-2) and whether digits are single tokens.
PRE_TOKENIZERS = {
    "default": ("", False),
    "gpt-2": ("", False),
    "smollm": ("", True),
    "llama-bpe": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        False,
    ),
    "qwen2": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        False,
    ),
}
_CONTROL, _USER = 3, 4


def _from_gguf(file: GGUFFile) -> Tokenizer:
    import tokenizers
    from tokenizers import AddedToken, decoders, models, pre_tokenizers

    def field(name: str) -> Any:
        value = file.metadata.get(f"tokenizer.ggml.{name}")
        if value is None:
            raise ModelFileError(f"{file.path} has no metadata tokenizer.ggml.{name}.")
        return value

    kind, pre = field("model"), file.metadata.get("tokenizer.ggml.pre", "default")
    if kind == "llama":
        return _from_gguf_pieces(file, field)
    if kind != "gpt2" or pre not in PRE_TOKENIZERS:
        raise NotImplementedError(
            f"{file.path}: tokenizer {kind!r} with pre-tokenizer {pre!r}; supported is "
            f"'llama', and 'gpt2' with {', '.join(PRE_TOKENIZERS)}. Load the model's "
            "Hugging Face folder instead."
        )
    tokens, types = field("tokens"), field("token_type")
    merges = file.metadata.get("tokenizer.ggml.merges", [])
    vocabulary = {token: i for i, token in enumerate(tokens)}
    try:
        pairs = [tuple(merge.split(" ", 1)) for merge in merges]
        backend = tokenizers.Tokenizer(models.BPE(vocabulary, pairs))
    except Exception as error:  # the library raises bare Exception
        raise ModelFileError(f"{file.path} has no tokenizer: {error}.") from None
    regex, digits = PRE_TOKENIZERS[pre]
    steps = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    if regex:
        steps += [pre_tokenizers.Split(tokenizers.Regex(regex), "isolated")]
    steps += [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not regex)]
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    if len(types) != len(tokens):
        raise ModelFileError(
            f"{file.path} has {len(tokens)} tokens and {len(types)} token types."
        )
    kinds = dict(zip(tokens, types, strict=True))
    control = [AddedToken(t, special=True) for t, k in kinds.items() if k == _CONTROL]
    plain = [AddedToken(t, normalized=False) for t, k in kinds.items() if k == _USER]
    backend.add_special_tokens(control)
    backend.add_tokens(plain)
    return _with_ends(file, backend, tokens)


def _from_gguf_pieces(file: GGUFFile, field: Callable[[str], Any]) -> Tokenizer:
    """A SentencePiece model, as GGUF files of Llama 1 and 2 and of Mistral hold it."""
    tokens, scores, kinds = field("tokens"), field("scores"), field("token_type")
    if not len(tokens) == len(scores) == len(kinds):
        raise ModelFileError(
            f"{file.path} has {len(tokens)} tokens, {len(scores)} scores and "
            f"{len(kinds)} token types."
        )
    pieces = [
        sentencepiece.Piece(token, score, kind)
        for token, score, kind in zip(tokens, scores, kinds, strict=True)
    ]
    unknown = [i for i, k in enumerate(kinds) if k == sentencepiece.UNKNOWN]
    prefixed = file.metadata.get("tokenizer.ggml.add_space_prefix", True)
    model = sentencepiece.SentencePieceModel(
        pieces,
        prefix="always" if prefixed else "never",
        unknown_id=unknown[0] if unknown else -1,
    )
    return _with_ends(file, _built(file.path, model), tokens)


def _with_ends(
    file: GGUFFile, backend: "tokenizers.Tokenizer", tokens: list[str]
) -> Tokenizer:
    bos = file.metadata.get("tokenizer.ggml.bos_token_id")
    eos = file.metadata.get("tokenizer.ggml.eos_token_id")
    template = file.metadata.get("tokenizer.chat_template")
    for end in (bos, eos):
        if end is not None and not (type(end) is int and 0 <= end < len(tokens)):
            raise ModelFileError(
                f"{file.path}: first or last token is none of {len(tokens)} tokens."
            )
    if eos is None or not isinstance(template, str | None):
        raise ModelFileError(
            f"{file.path} has no tokenizer.ggml.eos_token_id, or a chat template that "
            "is no text."
        )
    bos_token = "" if bos is None else tokens[bos]
    return Tokenizer(backend, bos_token, tokens[eos], template)

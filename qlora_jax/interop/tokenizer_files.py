"""Where tokenizers come from: Hugging Face folders and GGUF files."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from qlora_jax.interop import sentencepiece
from qlora_jax.interop.gguf import GGUFFile
from qlora_jax.interop.safetensors import read_json
from qlora_jax.interop.tokenizer import Tokenizer
from qlora_jax.interop.weights import ModelFileError

if TYPE_CHECKING:
    import tokenizers


def from_folder(folder: pathlib.Path) -> Tokenizer:
    """Reads the tokenizer of a Hugging Face folder.

    Raises:
        ModelFileError: if files are missing or damaged.
        NotImplementedError: if it is a SentencePiece model that is no BPE.
    """
    import tokenizers

    file, pieces = folder / "tokenizer.json", folder / "tokenizer.model"
    settings = folder / "tokenizer_config.json"
    config: dict[str, Any] = {}
    if file.is_file():
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
            for backend.encode_special_tokens in (True, False):
                backend.encode("Some text: 1, 2.\n", add_special_tokens=False)
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


def from_gguf(file: GGUFFile) -> Tokenizer:
    """Reads the tokenizer inside a GGUF file.

    Raises:
        ModelFileError: if the metadata is missing or damaged.
        NotImplementedError: if the kind of tokenizer is not known.
    """
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

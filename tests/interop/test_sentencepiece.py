"""SentencePiece models against SentencePiece 0.2.3 (make_sentencepiece.py)."""

import dataclasses
import json
import shutil

import gguf
import pytest

from qlora_jax.interop import sentencepiece
from qlora_jax.interop.convert import convert_model
from qlora_jax.interop.gguf import save as save_gguf
from qlora_jax.interop.sentencepiece import CONTROL, build, merges_of, read_model
from qlora_jax.interop.tokenizer import load_tokenizer
from qlora_jax.interop.weights import ModelFileError
from tests.conftest import GOLDEN
from tests.interop.folders import LLAMA, write_folder

FOLDER = GOLDEN / "sentencepiece"
GOLD = json.loads((FOLDER / "ids.json").read_text())
TEXTS = GOLD["texts"]


@pytest.fixture(scope="module")
def llama():
    return read_model(FOLDER / "llama.model")


@pytest.mark.parametrize("name", ["llama", "gemma", "normalized"])
def test_ids_and_texts_are_those_of_sentencepiece(name):
    backend = build(read_model(FOLDER / f"{name}.model"))
    backend.encode_special_tokens = True
    for text, ids, decoded in zip(
        TEXTS, GOLD[name]["ids"], GOLD[name]["decoded"], strict=True
    ):
        assert backend.encode(text, add_special_tokens=False).ids == ids, text
        # SentencePiece writes " ⁇ " for what it cannot spell.
        got = backend.decode(ids, skip_special_tokens=True)
        assert got == decoded.replace(" \u2047 ", ""), text


def test_ids_are_those_of_transformers(llama):
    """A space in front of the first text alone; control tokens where they are meant."""
    backend = build(dataclasses.replace(llama, prefix="first"))
    for texts, key in ((TEXTS, "ids"), (GOLD["with_control"], "with_control")):
        for text, ids in zip(texts, GOLD["transformers"][key], strict=True):
            assert backend.encode(text, add_special_tokens=False).ids == ids, text


def test_what_the_files_say(llama):
    assert (len(llama.pieces), llama.prefix, llama.squeezes) == (600, "always", False)
    assert [p.text for p in llama.pieces[:4]] == ["<unk>", "<s>", "</s>", "<0x00>"]
    gemma, normalized = (
        read_model(FOLDER / f"{n}.model") for n in ("gemma", "normalized")
    )
    assert gemma.prefix == "never" and not gemma.charsmap
    assert normalized.squeezes and normalized.charsmap
    assert (llama.unknown_id, llama.bos_id, llama.eos_id) == (0, 1, 2)


def folder_of(path, settings=None, added=None):
    path.mkdir()
    shutil.copy(FOLDER / "llama.model", path / "tokenizer.model")
    if settings is not None:
        (path / "tokenizer_config.json").write_text(json.dumps(settings))
    if added is not None:
        (path / "added_tokens.json").write_text(json.dumps(added))
    return path


def test_a_folder_with_nothing_but_the_model(tmp_path):
    tokenizer = load_tokenizer(folder_of(tmp_path / "m"))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (1, 2, 600)
    for text, ids in zip(TEXTS, GOLD["llama"]["ids"], strict=True):
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == text.replace(sentencepiece.SPACE, " ")
    # The letters of a control token are letters, unless asked.
    assert 2 not in tokenizer.encode("</s>")
    assert tokenizer.encode("</s>", special=True)[-1] == 2


def test_settings_and_added_tokens(tmp_path):
    added = {"600": {"content": "<pad>", "special": True}, "601": {"content": "hm"}}
    settings = {
        "legacy": False,
        "eos_token": {"content": "</s>"},
        "added_tokens_decoder": added,
        "chat_template": "{{ bos_token }}{{ messages[0].content }}",
    }
    tokenizer = load_tokenizer(folder_of(tmp_path / "m", settings))
    assert tokenizer.vocab_size == 602
    assert tokenizer.encode("x<pad>hm", special=True)[1:] == [600, 601]
    assert 600 not in tokenizer.encode("x<pad>")
    text = [{"role": "user", "content": "hi </s>"}]
    assert tokenizer.render(text) == "<s>hi </s>"
    assert 2 not in tokenizer.encode_chat(text)
    old = load_tokenizer(folder_of(tmp_path / "old", {}, {"<pad>": 600}))
    assert old.backend.token_to_id("<pad>") == 600
    with pytest.raises(
        ModelFileError, match=r"'<pad>' has id 700, and the next id is 60"
    ):
        load_tokenizer(folder_of(tmp_path / "gap", {}, {"<pad>": 700}))


def test_the_same_model_in_a_gguf_file(tmp_path, llama):
    metadata = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [piece.text for piece in llama.pieces],
        "tokenizer.ggml.scores": [piece.score for piece in llama.pieces],
        "tokenizer.ggml.token_type": [piece.kind for piece in llama.pieces],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    assert gguf.TokenType.BYTE == sentencepiece.BYTE
    save_gguf(tmp_path / "m.gguf", metadata, {})
    tokenizer = load_tokenizer(tmp_path / "m.gguf")
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    for text, ids in zip(TEXTS, GOLD["llama"]["ids"], strict=True):
        assert tokenizer.encode(text) == ids


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_through_gguf_and_back(tmp_path, name):
    """From a folder with tokenizer.model to GGUF, and to a folder of transformers."""
    hf = LLAMA | {"vocab_size": 604, "num_hidden_layers": 1}
    write_folder(tmp_path / "in", hf)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "in" / file).unlink()
    shutil.copy(FOLDER / f"{name}.model", tmp_path / "in" / "tokenizer.model")
    convert_model(tmp_path / "in", tmp_path / "m.gguf")
    convert_model(tmp_path / "m.gguf", tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    for path in ("m.gguf", "out"):
        tokenizer = load_tokenizer(tmp_path / path)
        assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
        for text, ids in zip(TEXTS, GOLD[name]["ids"], strict=True):
            assert tokenizer.encode(text) == ids, text
        assert tokenizer.encode("a</s>", special=True)[-1] == 2
    assert gguf.GGUFReader(tmp_path / "m.gguf").get_field(
        "tokenizer.ggml.token_type"
    ).contents()[:4] == [2, 3, 3, 6 if name == "llama" else 4]


def test_no_merge_makes_a_control_token(llama):
    made = {left + right for left, right in merges_of(llama.pieces)}
    control = {piece.text for piece in llama.pieces if piece.kind == CONTROL}
    assert made and control and not made & control


@pytest.mark.parametrize(
    "change, error, words",
    [
        (lambda d: b"", ModelFileError, "holds no piece"),
        (lambda d: d[:100], ModelFileError, "leaves its message|ends inside"),
        (lambda d: b"PK\3\4" + d, ModelFileError, "is no SentencePiece model"),
        (
            lambda d: d.replace(b"<unk>", b"\xff\xfe\xff\xfe\xff"),
            ModelFileError,
            "UTF-8",
        ),
        (
            lambda d: d.replace(b"\x18\x02 ", b"\x18\x01 ", 1),
            NotImplementedError,
            "of type 1; supported is BPE",
        ),
    ],
)
def test_what_is_no_model(tmp_path, change, error, words):
    data = change((FOLDER / "llama.model").read_bytes())
    (tmp_path / "tokenizer.model").write_bytes(data)
    with pytest.raises(error, match=words):
        load_tokenizer(tmp_path)


def test_a_folder_without_a_tokenizer(tmp_path):
    with pytest.raises(
        ModelFileError, match=r"has neither tokenizer\.json nor tokenizer\.model"
    ):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda c: b"\xff" * 4 + c[4:], "has a table of 4294967295 bytes"),
        (lambda c: c[:4] + b"\xff\xff\xff\x7f" * 256 + c[4 + 1024 :], "leads out of"),
        (lambda c: c[:-8] + b"\xff" * 8, "are not UTF-8"),
        (
            lambda c: c[:4] + b"\0\1" + b"\0" * 1022 + c[1028:],
            "points at no text",
        ),
    ],
)
def test_rules_of_normalization_that_lead_astray(tmp_path, change, words):
    """The library would walk out of the table; the reader does not let it."""
    data = (FOLDER / "normalized.model").read_bytes()
    rules = read_model(FOLDER / "normalized.model").charsmap
    damaged = change(rules)
    assert data.count(rules) == 1 and len(damaged) == len(rules)
    (tmp_path / "tokenizer.model").write_bytes(data.replace(rules, damaged))
    with pytest.raises(ModelFileError, match=words):
        load_tokenizer(tmp_path)

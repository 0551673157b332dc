import concurrent.futures
import dataclasses
import json
import os
import time

import numpy as np
import pytest

from qlora_jax.data import DataError, Encoder, EncodingOptions, Source
from qlora_jax.data.cache import TokenCache, default_cache_dir
from tests.data.examples import ALPACA, TOKENIZER, WITH_BOS, write_lines
from tests.interop.folders import byte_tokenizer


class Counting:
    """A tokenizer that counts the texts it is given."""

    def __init__(self, inner=TOKENIZER):
        self._inner, self.texts = inner, 0

    def __getattr__(self, name):
        return getattr(self._inner, name)

    def encode_many(self, texts, *, special=False):
        self.texts += len(texts)
        return self._inner.encode_many(texts, special=special)


@pytest.fixture
def file(tmp_path):
    rows = [ALPACA | {"output": str(i) * (i + 1)} for i in range(6)]
    return write_lines(tmp_path / "rows.jsonl", [*rows, ALPACA | {"output": ""}])


def entries(cache):
    return sorted(p.name for p in cache.folder.iterdir())


def test_the_second_time_nothing_is_tokenized(file, tmp_path):
    tokenizer = Counting()
    cache = TokenCache(tmp_path / "cache")
    first = cache.encoded(Source(file), Encoder(tokenizer))
    assert tokenizer.texts == 12
    second = cache.encoded(Source(file), Encoder(tokenizer))
    assert tokenizer.texts == 12
    assert (first.rows, first.empty_answers, first.bad_rows) == (7, 1, 0)
    assert second.rows == 7 and second.empty_answers == 1
    assert isinstance(second.documents.tokens, np.memmap)
    expected = Encoder(TOKENIZER).encode(
        [c for _, found in Source(file, limit=6).conversations() for c in found]
    )
    for found, example in zip(second.documents, expected, strict=True):
        np.testing.assert_array_equal(found.tokens, example.tokens)
        np.testing.assert_array_equal(found.loss_mask, example.loss_mask)
    assert first.documents.fingerprint == second.documents.fingerprint


def test_whatever_changes_the_tokens_is_another_entry(file, tmp_path):
    cache = TokenCache(tmp_path / "cache")

    def encode(source=None, tokenizer=TOKENIZER, **options):
        encoder = Encoder(tokenizer, EncodingOptions(**options))
        return cache.encoded(source or Source(file), encoder).documents.fingerprint

    first = encode()
    others = [
        encode(tokenizer=WITH_BOS),
        encode(answers="all"),
        encode(train_on_source=True),
        encode(chat_template="plain"),
        encode(target_max_len=3),
        encode(Source(file, limit=3)),
    ]
    assert len(entries(cache)) == len({first, *others}) == 7
    copy = file.with_name("copy.jsonl")
    copy.write_bytes(file.read_bytes())
    assert encode(Source(copy)) == first
    copy.write_bytes(file.read_bytes().replace(b"Add", b"add"))
    assert encode(Source(copy)) not in (first, *others)


def test_a_damaged_entry_is_made_anew(file, tmp_path):
    cache = TokenCache(tmp_path / "cache")
    first = cache.encoded(Source(file), Encoder(TOKENIZER)).documents
    tokens = np.array(first.tokens)
    (entry,) = cache.folder.iterdir()
    for name, content in [("tokens.bin", b"123"), ("meta.json", b"{")]:
        (entry / name).write_bytes(content)
        again = cache.encoded(Source(file), Encoder(TOKENIZER)).documents
        np.testing.assert_array_equal(tokens, again.tokens)
    (entry / "starts.bin").unlink()
    assert len(cache.encoded(Source(file), Encoder(TOKENIZER)).documents) == 6
    assert entries(cache) == [entry.name]


def test_what_fails_leaves_nothing(tmp_path):
    cache = TokenCache(tmp_path / "cache")
    bad = write_lines(tmp_path / "bad.jsonl", [ALPACA, {"instruction": "x"}])
    with pytest.raises(DataError, match=r"bad.jsonl, line 2 has no field 'output'"):
        cache.encoded(Source(bad), Encoder(TOKENIZER))
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    with pytest.raises(DataError, match=r"empty.jsonl holds no rows"):
        cache.encoded(Source(empty), Encoder(TOKENIZER))
    assert entries(cache) == []


def test_bad_rows_are_refused_from_the_cache_too(tmp_path):
    cache = TokenCache(tmp_path / "cache")
    bad = write_lines(tmp_path / "bad.jsonl", [ALPACA, {"instruction": "x"}])
    found = cache.encoded(Source(bad), Encoder(TOKENIZER), skip_bad_rows=1)
    assert (found.rows, found.bad_rows, len(found.documents)) == (2, 1, 1)
    with pytest.raises(DataError, match=r"bad.jsonl, line 2"):
        cache.encoded(Source(bad), Encoder(TOKENIZER))
    again = cache.encoded(Source(bad), Encoder(TOKENIZER), skip_bad_rows=5)
    assert again.bad_rows == 1


def test_rows_that_the_template_refuses_are_bad(tmp_path):
    template = (
        "{% for m in messages %}{% if m.content == 'no' %}{{ raise_exception('no') }}"
        "{% endif %}{{ m.content }}{% endfor %}"
    )
    rows = [{"question": "u", "answer": "a"}, {"question": "no", "answer": "a"}]
    path = write_lines(tmp_path / "a.jsonl", rows)
    encoder = Encoder(TOKENIZER, EncodingOptions(chat_template=template))
    cache = TokenCache(tmp_path / "cache")
    with pytest.raises(DataError, match=r"a.jsonl, line 2: The chat template refuses"):
        cache.encoded(Source(path), encoder)
    assert cache.encoded(Source(path), encoder, skip_bad_rows=1).bad_rows == 1


def test_several_at_once_write_one_entry(file, tmp_path):
    def encode(_):
        tokenizer = dataclasses.replace(TOKENIZER, backend=byte_tokenizer())
        cache = TokenCache(tmp_path / "cache")
        return cache.encoded(Source(file), Encoder(tokenizer)).documents

    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        found = list(threads.map(encode, range(8)))
    assert len({documents.fingerprint for documents in found}) == 1
    assert len(entries(TokenCache(tmp_path / "cache"))) == 1


def test_the_folder_is_bounded(file, tmp_path):
    cache = TokenCache(tmp_path / "cache")
    encoder = Encoder(TOKENIZER)
    cache.encoded(Source(file, limit=1), encoder)
    (old,) = entries(cache)
    size = sum(p.stat().st_size for p in (cache.folder / old).iterdir())
    os.utime(cache.folder / old, (1, 1))
    cache.encoded(Source(file, limit=2), encoder)
    (new,) = {*entries(cache)} - {old}
    small = TokenCache(tmp_path / "cache", max_bytes=size * 2)
    small.encoded(Source(file, limit=2), encoder)
    assert entries(cache) == [new]
    # What is in use stays, whatever it takes.
    TokenCache(tmp_path / "cache", max_bytes=1).encoded(Source(file, limit=2), encoder)
    assert entries(cache) == [new]


def test_what_killed_processes_left_goes(file, tmp_path):
    cache = TokenCache(tmp_path / "cache")
    for name, age in [("partial-old", 2 * 86400), ("partial-new", 60)]:
        (cache.folder / name).mkdir(parents=True)
        os.utime(cache.folder / name, (time.time() - age,) * 2)
    cache.encoded(Source(file), Encoder(TOKENIZER))
    assert "partial-new" in entries(cache)
    assert "partial-old" not in entries(cache)


def test_where_it_is(file, tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_JAX_CACHE", str(tmp_path))
    assert TokenCache().folder == default_cache_dir() == tmp_path / "data"
    (tmp_path / "data").write_text("a file")
    with pytest.raises(
        DataError, match=r"The cache .*/data cannot be written \(.*cache"
    ):
        TokenCache().encoded(Source(file), Encoder(TOKENIZER))


def test_an_entry_says_what_it_is(file, tmp_path):
    cache = TokenCache(tmp_path / "cache")
    encoded = cache.encoded(Source(file), Encoder(TOKENIZER))
    (entry,) = cache.folder.iterdir()
    meta = json.loads((entry / "meta.json").read_text())
    assert meta["path"] == str(file)
    assert meta["sha256"] == encoded.sha256 == Source(file).sha256()

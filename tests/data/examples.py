"""Small conversations and a tokenizer of bytes for the tests of data."""

import json

from qlora_jax.interop.tokenizer import Tokenizer
from tests.interop.folders import CHATML, byte_tokenizer

TOKENIZER = Tokenizer(byte_tokenizer(), "", "<|im_end|>", CHATML)
WITH_BOS = Tokenizer(byte_tokenizer(), "<|endoftext|>", "<|im_end|>", CHATML)

ALPACA = {"instruction": "Add.", "input": "1 2", "output": "3"}


def turns(*contents, first="user"):
    """Messages of speakers that take turns."""
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    return [
        {"role": roles[i % 2], "content": content} for i, content in enumerate(contents)
    ]


def write_lines(path, rows):
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text(text + "\n", encoding="utf-8")
    return path


def learned(example, tokenizer=TOKENIZER):
    """The text that the loss is on."""
    return tokenizer.decode(example.tokens[example.loss_mask == 1], special=True)


def seen(example, tokenizer=TOKENIZER):
    return tokenizer.decode(example.tokens, special=True)

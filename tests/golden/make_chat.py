"""Makes chat.json: conversations as transformers renders, tokenizes and masks them.

Run with transformers 5.23.0:

    python make_chat.py

The tokenizer has a token for each byte; the templates are "hermes" of `TEMPLATES`, and
ChatML with the marks of answers that transformers makes its mask from.
"""

import json
import pathlib
import runpy

import tokenizers
import transformers

HERE = pathlib.Path(__file__).parent
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MARKED = """\
{% for message in messages %}<|im_start|>{{ message.role }}
{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|im_end|>\
{% endgeneration %}{% else %}{{ message.content }}<|im_end|>{% endif %}

{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Weather in a place: <now> & 'later'",
            "parameters": {"type": "object", "properties": {"place": {}}},
        },
    }
]
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Weather in Zürich?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {
                "type": "function",
                "function": {"name": "weather", "arguments": {"place": "Zürich <CH>"}},
            }
        ],
    },
    {"role": "tool", "content": "12 °C"},
    {"role": "assistant", "content": "It is 12 °C."},
]
PLAIN = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!\nWhat now?"},
    {"role": "user", "content": "Count: 1 2"},
    {"role": "assistant", "content": " 3"},
]


def byte_tokenizer() -> tokenizers.Tokenizer:
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(SPECIAL + alphabet)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    return backend


def main() -> None:
    ours = runpy.run_path(str(HERE.parent.parent / "qlora_jax/data/templates.py"))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=byte_tokenizer(), eos_token="<|im_end|>"
    )
    hermes = {
        "messages": TURNS,
        "tools": TOOLS,
        "text": tokenizer.apply_chat_template(
            TURNS,
            tools=TOOLS,
            chat_template=ours["TEMPLATES"]["hermes"],
            tokenize=False,
        ),
    }
    marked = tokenizer.apply_chat_template(
        PLAIN, chat_template=MARKED, return_dict=True, return_assistant_tokens_mask=True
    )
    record = {
        "transformers": transformers.__version__,
        "hermes": hermes,
        "marked": {
            "template": MARKED,
            "messages": PLAIN,
            "tokens": list(marked["input_ids"]),
            "mask": list(marked["assistant_masks"]),
        },
    }
    text = json.dumps(record, indent=1, ensure_ascii=False)
    (HERE / "chat.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Makes tests/golden/sentencepiece: small models and what they make of texts.

Run with Python 3.11, sentencepiece 0.2.3, transformers 5.23.0:

    python make_sentencepiece.py

"llama" is trained with the settings of Llama 1 and 2 and Mistral (BPE, bytes, a space
in front, no normalization), "gemma" without the space and with pieces of its own for
line breaks, "normalized" without bytes, with a rule of normalization and with extra
spaces removed. ids.json holds, of each text, the ids by SentencePiece and what they
decode to; of "llama" also the ids by transformers' conversion with the space in front
of the first text alone (legacy=False), in texts that hold control tokens too.
"""

import json
import pathlib
import tempfile

import sentencepiece
from transformers import LlamaTokenizer

HERE = pathlib.Path(__file__).parent / "sentencepiece"
ROOT = HERE.parent.parent.parent
TEXTS = [
    "Hello world",
    "Quantized weights, 4.127 bits a parameter: 65B in 48 GB!",
    " a leading space",
    "two  spaces   and more    ",
    "tabs\tand\nlines\r\n\nend",
    "naïve façade, Zürich, Ελληνικά, русский, 日本語, 한국어, العربية",
    "emoji 🙂👍🏽 and \u200d joiners",
    "x = np.zeros((3, 4))[::-1]  # comment",
    "\uff26\uff35\uff2c\uff2c width \ufb01 \u2460 ½",
    "",
    " ",
    "▁▁ the mark itself",
    "<s>not a token</s>",
    "aaaaaaaaaaaaaaaaaaaaaaaa",
    "The licensor grants You a perpetual, worldwide, non-exclusive license.",
]
WITH_CONTROL = ["<s>Hello</s>", "<s> a </s> b", "x</s>y</s></s> z"]
MODELS = {
    "llama": dict(
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        vocab_size=600,
    ),
    "gemma": dict(
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        user_defined_symbols=["\n", "\n\n", "<start_of_turn>"],
        vocab_size=600,
    ),
    "normalized": dict(model_type="bpe", vocab_size=500),
}


def corpus():
    """Returns texts that are at hand and differ."""
    files = [
        ROOT / "LICENSE",
        ROOT / "README.md",
        *sorted((ROOT / "docs").glob("*.md")),
    ]
    lines = [line for file in files for line in file.read_text().split("\n") if line]
    return lines + TEXTS * 3


def main():
    """Writes everything."""
    HERE.mkdir(exist_ok=True)
    golden = {}
    for name, options in MODELS.items():
        with tempfile.TemporaryDirectory() as folder:
            prefix = pathlib.Path(folder) / name
            if name == "normalized":
                rules = pathlib.Path(folder) / "rules.tsv"
                wide = [f"{0xFF21 + i:X}\t{0x41 + i:X}\n" for i in range(26)]
                rules.write_text("".join(wide) + "BD\t31 2F 32\n")
                options = options | {"normalization_rule_tsv": str(rules)}
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(corpus()),
                model_prefix=str(prefix),
                num_threads=1,
                minloglevel=2,
                **options,
            )
            model = prefix.with_suffix(".model").read_bytes()
        (HERE / f"{name}.model").write_bytes(model)
        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        ids = [processor.encode(text) for text in TEXTS]
        decoded = [processor.decode(row) for row in ids]
        golden[name] = {"ids": ids, "decoded": decoded}
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "tokenizer.model"
        path.write_bytes((HERE / "llama.model").read_bytes())
        converted = LlamaTokenizer.from_pretrained(
            folder, legacy=False, add_bos_token=False, add_eos_token=False
        )
        golden["transformers"] = {
            name: [
                converted(text, add_special_tokens=False).input_ids for text in texts
            ]
            for name, texts in (("ids", TEXTS), ("with_control", WITH_CONTROL))
        }
    text = json.dumps({"texts": TEXTS, "with_control": WITH_CONTROL} | golden)
    (HERE / "ids.json").write_text(text + "\n")


if __name__ == "__main__":
    main()

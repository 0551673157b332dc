"""Makes tests/golden/families with transformers (and bitsandbytes) itself.

Run with Python 3.11, torch 2.13.0, transformers 5.23.0, bitsandbytes 0.50.2 on a CPU:

    python make_families.py                 # writes the golden files, or some
    python make_families.py --check FOLDER  # loads a model we saved, compares logits

Each folder holds a model of 2 layers with random weights, saved by transformers in
bfloat16, and `logits.npy`: float32 [rows, tokens, vocabulary] of the rows of
`tokens.npy` computed as one padded batch in float32 (dynamic scaling: row by row, and
`cached.npy` of the first row in two parts). Those of `QUANTIZED`
were quantized by bitsandbytes while transformers loaded the folder `source`, kept
beside them.
"""

import argparse
import json
import pathlib
import shutil

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

HERE = pathlib.Path(__file__).parent / "families"
VOCAB, LENGTHS = 48, (24, 13, 5)
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 500.0,
}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 100.0}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 10000.0,
}
FAMILIES = {
    "llama": ("Llama", {}),
    "llama_tied": ("Llama", {"tie_word_embeddings": True}),
    "llama_llama3": ("Llama", {"rope_parameters": LLAMA3}),
    "llama_linear": ("Llama", {"rope_parameters": LINEAR}),
    # Rows of 24 tokens are longer than the original context, of 13 and 5 shorter.
    "llama_dynamic": (
        "Llama",
        {"rope_parameters": DYNAMIC, "max_position_embeddings": 16},
    ),
    "llama_yarn": ("Llama", {"rope_parameters": YARN}),
    "llama_bias": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", {"sliding_window": 6}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
}
QUANTIZED = {
    "int8": dict(load_in_8bit=True),
    "nf4_double": dict(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    ),
    "nf4_float16": dict(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_quant_storage=torch.float16,
        bnb_4bit_compute_dtype=torch.bfloat16,
    ),
    "nf4_float32": dict(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_quant_storage=torch.float32,
        bnb_4bit_compute_dtype=torch.bfloat16,
    ),
    "fp4_bfloat16": dict(
        load_in_4bit=True,
        bnb_4bit_quant_type="fp4",
        bnb_4bit_quant_storage=torch.bfloat16,
        bnb_4bit_compute_dtype=torch.float32,
    ),
}


def padded_tokens():
    """Returns the ids, right-padded with 0, and the mask of those that count."""
    generator = np.random.default_rng(7)
    tokens = np.zeros((len(LENGTHS), max(LENGTHS)), np.int64)
    for row, length in zip(tokens, LENGTHS, strict=True):
        row[:length] = generator.integers(1, VOCAB, length)
    mask = np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None]
    return torch.tensor(tokens), torch.tensor(mask)


def rows_alone(folder):
    """Returns the float32 logits of each row computed by itself, zero after its end.

    The model is loaded anew for each: with dynamic scaling it keeps the frequencies of
    the longest text it has seen. The second array is the first row in two parts, the
    second of them from the cache.
    """
    tokens, _ = padded_tokens()
    out = np.zeros((*tokens.shape, VOCAB), np.float32)
    with torch.no_grad():
        for i, length in enumerate(LENGTHS):
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            out[i, :length] = model.eval()(tokens[i : i + 1, :length]).logits[0].numpy()
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        first = model(tokens[:1, :12], use_cache=True)
        rest = model(tokens[:1, 12:24], past_key_values=first.past_key_values)
    return out, torch.cat([first.logits, rest.logits], dim=1)[0].numpy()


def logits(model):
    """Returns the float32 logits, those of padding zero."""
    tokens, mask = padded_tokens()
    with torch.no_grad():
        out = model.eval()(tokens, attention_mask=mask.long()).logits.float()
    return (out * mask[..., None]).numpy()


def fresh(name, extra, width=32):
    """Returns a random model, large enough that every part of it matters."""
    torch.manual_seed(0)
    usual = dict(
        vocab_size=VOCAB,
        hidden_size=width,
        intermediate_size=width + width // 2,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        bos_token_id=1,
        eos_token_id=2,
    )
    config = getattr(transformers, f"{name}Config")(**usual | extra)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    for key, value in model.named_parameters():
        if "norm" in key:
            value.data = 1 + 0.1 * torch.randn_like(value)
        else:
            value.data = torch.randn_like(value) / value.shape[-1] ** 0.5
    return model.to(torch.bfloat16)


def save(model, folder):
    """Saves as users do, into an empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)


def make(names=()):
    """Writes everything, or the folders of these names."""
    for name, (kind, extra) in FAMILIES.items():
        if names and name not in names:
            continue
        save(fresh(kind, extra), HERE / name)
        if name == "llama_dynamic":
            alone, cached = rows_alone(HERE / name)
            np.save(HERE / name / "logits.npy", alone)
            np.save(HERE / name / "cached.npy", cached)
            continue
        model = AutoModelForCausalLM.from_pretrained(HERE / name, dtype=torch.float32)
        np.save(HERE / name / "logits.npy", logits(model))
    source = HERE / "source"
    if not names:
        save(fresh("Llama", {}, width=64), source)
    for name, options in QUANTIZED.items():
        if names and name not in names:
            continue
        config = BitsAndBytesConfig(**options)
        model = AutoModelForCausalLM.from_pretrained(
            source,
            quantization_config=config,
            dtype=torch.bfloat16,
            device_map={"": "cpu"},
        )
        save(model, HERE / name)
    np.save(HERE / "tokens.npy", padded_tokens()[0].numpy().astype(np.int32))


def check(folder):
    """Loads a folder with transformers; where logits are kept, compares with them."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, device_map={"": "cpu"}
    )
    print(model)
    golden = pathlib.Path(folder) / "logits.npy"
    if golden.exists():
        theirs = np.load(golden)
        error = np.linalg.norm(logits(model) - theirs) / np.linalg.norm(theirs)
        print(json.dumps({"relative_error": float(error)}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="of folders; none: all")
    parser.add_argument("--check", metavar="FOLDER")
    arguments = parser.parse_args()
    check(arguments.check) if arguments.check else make(arguments.names)

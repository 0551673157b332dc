"""Makes tests/golden/peft_lora with PEFT itself, and checks our adapters with it.

Run with Python 3.11 and torch 2.13.0, transformers 5.23.0, peft 0.21.2 on a CPU:

    python make_peft.py                 # writes the golden files
    python make_peft.py --more          # those of modules trained whole, and of sums
    python make_peft.py --biases        # those whose biases were trained
    python make_peft.py --initial       # initial values of one matrix, and LoRA+
    python make_peft.py --check FOLDER  # loads an adapter we saved, compares logits

The base is a Llama of 2 layers with random weights, saved by transformers. Of it three
adapters are saved by PEFT, as users have them: plain, rsLoRA with a rank pattern, DoRA.
`--more` adds, with their logits in more.npz: embedding and head trained whole, on a
base whose head is `untied_head`; the same of the tied base, with the tie kept and not;
rows of the embedding; a larger vocabulary; and sums of two adapters. `--biases` adds
two of families/llama_bias, with their logits in biases.npz. `--initial` writes
initial.npz: how PiSSA, LoftQ (with bitsandbytes 0.50.2) and the orthogonal start begin
on one random matrix, and how far one step of LoRA+ moves each kind of parameter.
"""

import argparse
import contextlib
import json
import pathlib

import bitsandbytes
import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from transformers import LlamaConfig, LlamaForCausalLM

HERE = pathlib.Path(__file__).parent / "peft_lora"
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOKENS = torch.tensor([[1, 5, 9, 2, 7, 30, 63, 12], [3, 3, 8, 41, 0, 22, 17, 6]])
BIASED_TOKENS = TOKENS % 48
ADAPTERS = {
    "plain": LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=LINEAR,
        task_type="CAUSAL_LM",
        lora_dropout=0.1,
    ),
    "rslora": LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "v_proj", "down_proj"],
        task_type="CAUSAL_LM",
        use_rslora=True,
        rank_pattern={"down_proj": 2},
        alpha_pattern={"v_proj": 16, "layers.0.self_attn.q_proj": 2},
    ),
    "dora": LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "up_proj"],
        task_type="CAUSAL_LM",
        use_dora=True,
    ),
}


def base():
    """Returns the model that the adapters are of."""
    return LlamaForCausalLM.from_pretrained(HERE / "base", dtype=torch.float32).eval()


def untied_head(embedding):
    """Returns the head of the untied base."""
    return torch.roll(embedding, 1, 0)


def untied(rows=64):
    """Returns the base with a head of its own, and a vocabulary of `rows`."""
    config = LlamaConfig.from_pretrained(HERE / "base", tie_word_embeddings=False)
    model, tied = LlamaForCausalLM(config).eval(), base()
    model.load_state_dict(tied.state_dict())
    model.lm_head.weight.data = untied_head(tied.model.embed_tokens.weight.data)
    if rows > 64:
        model.resize_token_embeddings(rows)
    return model


def logits(model, tokens=TOKENS):
    """Returns the float32 logits for the fixed tokens."""
    with torch.no_grad():
        return model(tokens).logits.numpy()


def make():
    """Writes the base, the adapters and their logits."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, parameter.shape[1] ** -0.5)
    model.save_pretrained(HERE / "base")
    wanted = {"tokens": TOKENS.numpy(), "base": logits(base())}
    for name, config in ADAPTERS.items():
        adapted = get_peft_model(base(), config).eval()
        with torch.no_grad():
            for parameter_name, parameter in adapted.named_parameters():
                if "lora_B" in parameter_name:
                    parameter.normal_(0, 0.2)
                if "magnitude" in parameter_name:
                    parameter.mul_(1.25)
        config.base_model_name_or_path = "base"
        adapted.save_pretrained(HERE / name)
        wanted[name] = logits(adapted)
        print(name, "moved the logits by", np.abs(wanted[name] - wanted["base"]).max())
    np.savez(HERE / "logits.npz", **wanted)
    for readme in HERE.glob("*/README.md"):
        readme.unlink()


# Of each: the base, and what its config says besides rank and targets.
MORE = {
    "saved": (untied, dict(modules_to_save=["embed_tokens", "lm_head"])),
    "saved_tied": (base, dict(modules_to_save=["embed_tokens"])),
    "saved_ensured": (
        base,
        dict(modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    ),
    "saved_norms": (base, dict(modules_to_save=["norm", "input_layernorm"])),
    "tokens": (base, dict(trainable_token_indices=[63, 30, 5])),
    "resized": (
        lambda: untied(68),
        dict(modules_to_save=["embed_tokens", "lm_head"]),
    ),
}
SUM = ([0.7, 0.4], ("linear", "cat", "svd"))


def make_more():
    """Writes the adapters of `MORE` and of sums."""
    torch.manual_seed(1)
    wanted = {}
    for name, (model, extra) in MORE.items():
        config = LoraConfig(
            r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **extra
        )
        adapted = get_peft_model(model(), config).eval()
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        config.base_model_name_or_path = "base"
        adapted.save_pretrained(HERE / name)
        wanted[name] = logits(adapted)
    adapted = PeftModel.from_pretrained(base(), HERE / "plain", "plain").eval()
    adapted.add_adapter("other", ADAPTERS["plain"])
    with torch.no_grad():
        for parameter_name, parameter in adapted.named_parameters():
            if "lora_B.other" in parameter_name:
                parameter.normal_(0, 0.2)
    ADAPTERS["plain"].base_model_name_or_path = "base"
    adapted.save_pretrained(HERE, selected_adapters=["other"])
    weights, kinds = SUM
    for kind in kinds:
        adapted.add_weighted_adapter(
            ["plain", "other"], weights, kind, combination_type=kind
        )
        adapted.set_adapter(kind)
        wanted[kind] = logits(adapted.eval())  # new modules come in training mode
    np.savez(HERE / "more.npz", **wanted)
    for readme in [*HERE.glob("README.md"), *HERE.glob("*/README.md")]:
        readme.unlink()


def biased():
    """Returns a base with biases in attention and MLP."""
    folder = HERE.parent / "families" / "llama_bias"
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def make_biases():
    """Writes an adapter with the biases beside it, and one with all."""
    torch.manual_seed(2)
    wanted = {"base": logits(biased(), BIASED_TOKENS)}
    for bias in ("lora_only", "all"):
        config = LoraConfig(
            r=2,
            target_modules=["q_proj", "down_proj"],
            task_type="CAUSAL_LM",
            bias=bias,
        )
        adapted = get_peft_model(biased(), config).eval()
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        config.base_model_name_or_path = "llama_bias"
        adapted.save_pretrained(HERE / f"bias_{bias}")
        (HERE / f"bias_{bias}" / "README.md").unlink()
        wanted[bias] = logits(adapted, BIASED_TOKENS)
    np.savez(HERE / "biases.npz", tokens=BIASED_TOKENS.numpy(), **wanted)


@contextlib.contextmanager
def without_cuda():
    """PEFT's LoftQ computes on a GPU alone; its arithmetic is the same on a CPU."""

    def on_cpu(to):
        def moved(self, *args, **options):
            args = ["cpu" if arg == "cuda" else arg for arg in args]
            return to(self, *args, **{k: v for k, v in options.items() if v != "cuda"})

        return moved

    kinds = (torch.Tensor, bitsandbytes.nn.Params4bit)
    kept = [kind.to for kind in kinds]
    for kind in kinds:
        kind.to = on_cpu(kind.to)
    yield
    for kind, to in zip(kinds, kept, strict=True):
        kind.to = to


def make_initial():
    """Writes the initial values, as PEFT lays them out: A [rank, in], B [out, rank]."""
    torch.manual_seed(3)
    weight = torch.randn(96, 64) / 8
    found = {"weight": weight.numpy()}
    begins = {f"pissa_{alpha}": ("pissa", alpha, {}) for alpha in (8, 2)}
    for steps in (1, 5):
        how = {"loftq_config": {"loftq_bits": 4, "loftq_iter": steps}}
        begins[f"loftq_{steps}"] = "loftq", 8, how
    begins["orthogonal"] = "orthogonal", 8, {}
    for name, (init, alpha, how) in begins.items():
        model = torch.nn.Sequential(torch.nn.Linear(64, 96, bias=False))
        model[0].weight.data = weight.clone()
        config = LoraConfig(
            r=8, lora_alpha=alpha, target_modules=["0"], init_lora_weights=init, **how
        )
        with without_cuda():
            layer = get_peft_model(model, config).base_model.model[0]
        found[f"{name}_base"] = layer.base_layer.weight.detach().numpy()
        found[f"{name}_a"] = layer.lora_A["default"].weight.detach().numpy()
        found[f"{name}_b"] = layer.lora_B["default"].weight.detach().numpy()
    adapted = get_peft_model(base(), ADAPTERS["dora"])
    optimizer = create_loraplus_optimizer(
        adapted, torch.optim.SGD, lr=1e-3, loraplus_lr_ratio=16
    )
    trained = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    for parameter in trained.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for kind in ("lora_A", "lora_B", "lora_magnitude_vector"):
        moved = [(before[n] - p).mean().item() for n, p in trained.items() if kind in n]
        found[f"plus_{kind}"] = np.float32(np.mean(moved) / 1e-3)
    np.savez(HERE / "initial.npz", **found)


def check(folder):
    """Loads an adapter by PEFT and compares logits with logits.npy beside it."""
    config = json.loads((folder / "adapter_config.json").read_text())
    has_biases = config["bias"] != "none"
    adapted = PeftModel.from_pretrained(biased() if has_biases else base(), folder)
    adapted = adapted.eval()
    got = logits(adapted, BIASED_TOKENS if has_biases else TOKENS)
    ours = np.load(folder / "logits.npy")
    error = np.abs(got - ours).max() / np.abs(got).max()
    print(f"{folder.name}: r={config['r']}, max relative difference {error:.3g}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--check", type=pathlib.Path)
    parser.add_argument("--more", action="store_true")
    parser.add_argument("--biases", action="store_true")
    parser.add_argument("--initial", action="store_true")
    arguments = parser.parse_args()
    if arguments.more:
        make_more()
    elif arguments.biases:
        make_biases()
    elif arguments.initial:
        make_initial()
    elif arguments.check is None:
        make()
    else:
        check(arguments.check)

"""The Python of docs/lora.md runs, on a tiny model."""

import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import qlora_jax as ql
from qlora_jax import lora
from qlora_jax.train import next_token_loss
from tests.conftest import ROOT

pytestmark = pytest.mark.unoptimized


def adapters(frozen_model):
    """Two adapters of one base, as the page has them by then."""
    found = []
    for seed in range(2):
        key = jax.random.key(seed)
        found.append(ql.split_trainable(ql.add_lora(frozen_model, rank=4, key=key)))
    (french, frozen), (law, _) = found
    return {"french": french, "law": law, "trainable": french, "frozen": frozen}


def test_python_of_the_page_runs(capsys):
    config = ql.LlamaConfig(98, 64, 128, num_layers=2, num_heads=4, num_kv_heads=4)
    make = lambda: ql.Llama(config, rngs=nnx.Rngs(0), dtype=jnp.float32)
    tokens = jnp.arange(24).reshape(3, 8)
    names = {name: getattr(lora, name) for name in ("AdapterBank", "join_trainable")}
    names |= {"ql": ql, "jax": jax, "jnp": jnp, "lora": lora, "model": make()}
    names |= {"tokens": tokens, "next_token_loss": next_token_loss}
    names |= {"key": jax.random.key(0), "dropout_key": jax.random.key(1)}
    names |= {"batch": {"tokens": tokens}}
    text = (ROOT / "docs" / "lora.md").read_text(encoding="utf-8")
    text = text.replace("[128256, 128257]", "[96, 97]")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 5
    for block in blocks:
        if "add_lora" not in block:  # each begins with a model as the first leaves it
            names["model"] = ql.add_lora(make(), rank=4, key=jax.random.key(2))
        if "AdapterBank" in block:
            names |= adapters(make())
        exec(compile(block, "lora.md", "exec"), names)
        if "add_lora" in block:
            assert names["logits"].shape == (3, 8, 98)
    assert names["bank"].names[:2] == ("french", "law")
    printed = capsys.readouterr().out
    assert "Merged 7 weights: relative error of rounding 0 in" in printed
    assert "Loss" in printed

"""Arrays and rows of new tokens trained beside the adapters, by `fit`."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from qlora_jax import load_adapter, save_adapter
from qlora_jax.interop.peft import whole_options
from qlora_jax.lora import fold_rows, split_trainable, train_rows
from qlora_jax.train import fit
from tests.train.tiny import SMALL, adapted, batches

pytestmark = pytest.mark.unoptimized


def test_embedding_and_norms_train_whole_beside_the_adapters(tmp_path):
    model = adapted()
    config = dataclasses.replace(SMALL, also="embed|norm", dropout=0.0)
    trained = fit(model, batches(), config)
    whole, _ = split_trainable(trained, also=config.also)
    before, _ = split_trainable(model, also=config.also)
    moved = [
        bool((x != y).any())
        for x, y in zip(*map(jax.tree.leaves, (whole, before)), strict=True)
    ]
    assert all(moved) and len(moved) == 2 * 7 + 4
    # As modules of PEFT's: what the command line saves.
    options = whole_options(trained, config.also)
    assert options["bias"] == "none"
    assert set(options["modules_to_save"]) == {
        "embed_tokens",
        "norm",
        "input_layernorm",
        "post_attention_layernorm",
    }
    save_adapter(trained, tmp_path, **options)
    again = load_adapter(adapted(), tmp_path)
    np.testing.assert_array_equal(again.embed[...], trained.embed[...])
    with pytest.raises(ValueError, match="also 'wte' is found in the path of no array"):
        fit(model, batches(), dataclasses.replace(config, also="wte"))


def test_rows_of_new_tokens_train_and_no_others(tmp_path):
    new = [94, 95]
    model = train_rows(adapted(), {"embed": new})
    table = np.asarray(model.embed.array())
    config = dataclasses.replace(SMALL, dropout=0.0)
    trained = fit(model, batches(), config)
    changed = np.flatnonzero((fold_rows(trained).embed[...] != table).any(axis=1))
    assert changed.tolist() == new
    # PEFT's file knows which they are, and they come back.
    save_adapter(trained, tmp_path)
    told = json.loads((tmp_path / "adapter_config.json").read_text())
    assert told["trainable_token_indices"] == new
    base = fold_rows(model)
    again = load_adapter(base, tmp_path)
    np.testing.assert_array_equal(again.embed[...], fold_rows(trained).embed[...])

"""Adapters of PEFT read with its logits, ours written back, files that are wrong."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from qlora_jax.interop.hub import load_model
from qlora_jax.interop.peft import load_adapter, save_adapter, whole_options
from qlora_jax.lora import (
    LoraTensor,
    add_lora,
    combine_adapters,
    join_trainable,
    split_trainable,
    stack_adapters,
)
from qlora_jax.models import Llama, LlamaConfig
from tests.conftest import GOLDEN

pytestmark = pytest.mark.unoptimized

FOLDER = GOLDEN / "peft_lora"
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def base():
    return load_model(FOLDER / "base", dtype=jnp.float32)


@pytest.fixture(scope="module")
def logits():
    with np.load(FOLDER / "logits.npz") as archive:
        yield dict(archive)


def relative(got, wanted):
    return np.abs(np.asarray(got) - wanted).max() / np.abs(wanted).max()


def small(seed=0, layers=2):
    config = LlamaConfig(64, 64, 128, num_layers=layers, num_heads=4, num_kv_heads=2)
    return Llama(config, rngs=nnx.Rngs(seed))


def perturbed(model):
    """The model with no leaf of its adapters as it began."""
    trainable, frozen = split_trainable(model)
    moved = jax.tree.map(
        lambda x: x + 0.1 * jax.random.normal(KEY, x.shape, x.dtype), trainable
    )
    return join_trainable(moved, frozen)


@pytest.mark.parametrize("name", ["plain", "rslora", "dora"])
def test_logits_are_those_of_peft(base, logits, name):
    model = load_adapter(base, FOLDER / name)
    got = model(jnp.asarray(logits["tokens"], jnp.int32))
    # The adapters move the logits by more than 2; float32 through two layers.
    assert relative(got, logits[name]) < 1e-5
    assert relative(got, logits["base"]) > 0.2


def test_what_is_read_is_what_peft_wrote(base):
    model = load_adapter(base, FOLDER / "plain")
    tensors = load_file(FOLDER / "plain" / "adapter_model.safetensors")
    q = model.layers.q_proj
    assert isinstance(q, LoraTensor) and (q.rank, q.alpha) == (4, 8.0)
    prefix = "base_model.model.model.layers.1.self_attn.q_proj.lora_"
    np.testing.assert_array_equal(q.a[...][1], tensors[f"{prefix}A.weight"].T)
    np.testing.assert_array_equal(q.b[...][1], tensors[f"{prefix}B.weight"].T)
    assert isinstance(base.layers.q_proj, nnx.Param)  # stayed as it was


@pytest.mark.parametrize("name", ["plain", "dora"])
def test_an_adapter_of_peft_written_again_has_its_bytes(base, name, tmp_path):
    save_adapter(load_adapter(base, FOLDER / name), tmp_path, base_model="base")
    got = load_file(tmp_path / "adapter_model.safetensors")
    wanted = load_file(FOLDER / name / "adapter_model.safetensors")
    assert got.keys() == wanted.keys()
    for key, tensor in wanted.items():
        np.testing.assert_array_equal(got[key], tensor)
    ours, theirs = (
        json.loads((folder / "adapter_config.json").read_text())
        for folder in (tmp_path, FOLDER / name)
    )
    assert ours.keys() <= theirs.keys()
    theirs["target_modules"].sort()
    assert ours == {key: theirs[key] for key in ours}


def test_layers_of_different_scale_share_one(base):
    """Layer 0 of q_proj has alpha 2 in the file and layer 1 has alpha 8."""
    q = load_adapter(base, FOLDER / "rslora").layers.q_proj
    tensors = load_file(FOLDER / "rslora" / "adapter_model.safetensors")
    key = "base_model.model.model.layers.{}.self_attn.q_proj.lora_B.weight"
    ratios = [
        float((q.b[...][i] / tensors[key.format(i)].T * q.alpha).mean()) for i in (0, 1)
    ]
    np.testing.assert_allclose(ratios, [2, 8], rtol=1e-6)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("name", ["default", "second"])
def test_a_round_trip_is_exact(tmp_path, dora, name):
    model = perturbed(
        add_lora(
            small(),
            rank=8,
            alpha=4,
            dropout=0.05,
            rank_pattern={"down_proj": 2},
            alpha_pattern={"[kv]_proj": 7.5},
            rslora=True,
            dora=dora,
            key=KEY,
        )
    )
    save_adapter(model, tmp_path, name, base_model="some/base")
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    again = load_adapter(small(), tmp_path, name)
    for path in ("q_proj", "k_proj", "down_proj"):
        old, new = getattr(model.layers, path), getattr(again.layers, path)
        assert (new.rank, new.alpha, new.dropout) == (old.rank, old.alpha, 0.05)
        assert new.rslora
    ours, theirs = split_trainable(model)[0], split_trainable(again)[0]
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for got, wanted in zip(*map(jax.tree.leaves, (theirs, ours)), strict=True):
        np.testing.assert_array_equal(got, wanted)
    # A second load drops the adapters of the first and keeps the base.
    twice = load_adapter(again, tmp_path, name)
    assert twice.layers.q_proj.w.get_value() is again.layers.q_proj.w.get_value()


def test_an_adapter_over_quantized_weights(logits):
    base = load_model(FOLDER / "base", "nf4", dtype=jnp.float32)
    model = load_adapter(base, FOLDER / "plain")
    tokens = jnp.asarray(logits["tokens"], jnp.int32)
    # NF4 moves the weights by a tenth; the adapter is on top of that, not lost in it.
    assert relative(model(tokens), logits["plain"]) < 0.6
    assert relative(base(tokens), logits["plain"]) > 0.7


def test_saving_in_bfloat16_and_one_of_several(tmp_path):
    model = perturbed(add_lora(small(), rank=4, targets="q_proj", key=KEY))
    trainable, frozen = split_trainable(model)
    doubled = jax.tree.map(lambda x: 2 * x, trainable)
    both = join_trainable(stack_adapters([trainable, doubled]), frozen)
    with pytest.raises(ValueError, match="'layers/q_proj' holds 2 adapters and"):
        save_adapter(both, tmp_path)
    save_adapter(both, tmp_path, adapter=1, dtype=jnp.bfloat16)
    b = load_adapter(small(), tmp_path).layers.q_proj.b[...]
    wanted = (2 * model.layers.q_proj.b[...]).astype(jnp.bfloat16)
    np.testing.assert_array_equal(b, wanted.astype(jnp.float32))


def test_a_plain_tree_names_its_own_modules(tmp_path):
    tree = {"blocks": {"up": jnp.ones((3, 8, 16))}, "out": jnp.ones((16, 8))}
    tree = perturbed(add_lora(tree, rank=2, targets=["up", "out"], key=KEY))

    def module_name(path):
        return {"blocks/up": "h.{}.up", "out": "out"}[path]

    save_adapter(tree, tmp_path, module_name=module_name)
    keys = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert "base_model.model.h.2.up.lora_A.weight" in keys
    assert "base_model.model.out.lora_B.weight" in keys and len(keys) == 8
    again = load_adapter(tree, tmp_path, module_name=module_name)
    for got, wanted in zip(*map(jax.tree.leaves, (again, tree)), strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_a_failed_write_leaves_the_old_adapter(tmp_path, monkeypatch):
    model = perturbed(add_lora(small(), rank=4, targets="q_proj", key=KEY))
    save_adapter(model, tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(descriptor):
        raise OSError("No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_adapter(add_lora(small(), rank=2, key=KEY), tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_what_cannot_be_saved(base, tmp_path):
    with pytest.raises(ValueError, match="holds no adapter to save"):
        save_adapter(base, tmp_path)
    mixed = add_lora(base, rank=2, targets="q_proj", dropout=0.1, key=KEY)
    mixed = add_lora(mixed, rank=2, targets="k_proj", key=KEY)
    with pytest.raises(ValueError, match=r"one dropout for all .* \[0.0, 0.1\]"):
        save_adapter(mixed, tmp_path)


@pytest.fixture(scope="module")
def more():
    with np.load(FOLDER / "more.npz") as archive:
        yield dict(archive)


@pytest.fixture(scope="module")
def untied(base, tmp_path_factory):
    """The base with a head of its own, that of make_peft.py."""
    folder = tmp_path_factory.mktemp("untied") / "base"
    shutil.copytree(FOLDER / "base", folder)
    config = json.loads((folder / "config.json").read_text())
    text = json.dumps(config | {"tie_word_embeddings": False})
    (folder / "config.json").write_text(text)
    tensors = load_file(folder / "model.safetensors")
    head = np.roll(tensors["model.embed_tokens.weight"], 1, axis=0)
    save_file(tensors | {"lm_head.weight": head}, folder / "model.safetensors")
    return load_model(folder, dtype=jnp.float32)


WHOLE = {
    "saved": ("untied", ["embed_tokens", "lm_head"]),
    "saved_tied": ("base", None),  # not written again: the tie is gone
    "saved_ensured": ("base", ["embed_tokens"]),
    "saved_norms": ("base", ["norm", "input_layernorm"]),
    "resized": ("untied", ["embed_tokens", "lm_head"]),
}


@pytest.mark.parametrize("name", WHOLE)
def test_modules_trained_whole(request, logits, more, name, tmp_path):
    """PEFT's logits; and written again, its tensors."""
    which, modules = WHOLE[name]
    model = load_adapter(request.getfixturevalue(which), FOLDER / name)
    tokens = jnp.asarray(logits["tokens"], jnp.int32)
    assert relative(model(tokens), more[name]) < 1e-5
    assert model.config.vocab_size == more[name].shape[-1]
    assert model.config.tie_embeddings == (name in ("saved_ensured", "saved_norms"))
    if modules is None:
        return
    save_adapter(model, tmp_path, modules_to_save=modules, base_model="base")
    got = load_file(tmp_path / "adapter_model.safetensors")
    wanted = load_file(FOLDER / name / "adapter_model.safetensors")
    assert got.keys() == wanted.keys()
    for key, tensor in wanted.items():
        np.testing.assert_array_equal(got[key], tensor, err_msg=key)
    ours, theirs = (
        json.loads((folder / "adapter_config.json").read_text())
        for folder in (tmp_path, FOLDER / name)
    )
    assert ours.get("ensure_weight_tying", False) == theirs["ensure_weight_tying"]
    # PEFT adds "model.embed_tokens" to "embed_tokens" where it keeps the tie.
    assert set(ours["modules_to_save"]) <= set(theirs["modules_to_save"])


def test_rows_of_new_tokens(base, logits, more, tmp_path):
    model = load_adapter(base, FOLDER / "tokens")
    tokens = jnp.asarray(logits["tokens"], jnp.int32)
    assert relative(model(tokens), more["tokens"]) < 1e-5
    changed = np.flatnonzero((model.embed[...] != base.embed[...]).any(axis=1))
    assert changed.tolist() == [5, 30, 63]
    save_adapter(model, tmp_path, token_indices=[63, 30, 5])
    got = load_file(tmp_path / "adapter_model.safetensors")
    wanted = load_file(FOLDER / "tokens" / "adapter_model.safetensors")
    assert got.keys() == wanted.keys()
    for key, tensor in wanted.items():
        np.testing.assert_array_equal(got[key], tensor, err_msg=key)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["trainable_token_indices"] == [63, 30, 5]
    with pytest.raises(ValueError, match=r"\[64\] must lie in \[0, 64\)"):
        save_adapter(model, tmp_path, token_indices=[64])


def test_what_is_trained_whole_stays_in_the_type_of_the_base(base):
    model = load_adapter(load_model(FOLDER / "base", "nf4"), FOLDER / "saved_ensured")
    assert model.embed[...].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    "names, words",
    [
        (["wte"], r"'wte' is of no module; there are lm_head, model\.embed_tokens"),
        (["q_proj"], r"q_proj\.weight is LoraTensor; only plain arrays"),
    ],
)
def test_modules_to_save_that_are_none(untied, tmp_path, names, words):
    model = load_adapter(untied, FOLDER / "plain")
    with pytest.raises(ValueError, match=words):
        save_adapter(model, tmp_path, modules_to_save=names)


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("model.embed_tokens.weight", np.ones((64, 5)), r"is \[64, 5\] as \[in, out\]"),
        ("model.embed_tokens.weight", np.ones((70, 64)), "70 and 64 tokens"),
        ("model.wte.weight", np.ones((64, 64)), r"'model\.wte\.weight' is of a module"),
        (
            "model.embed_tokens.token_adapter.trainable_tokens_delta",
            np.ones((2, 64)),
            "of which trainable_token_indices or the model knows nothing",
        ),
    ],
)
def test_whole_modules_that_do_not_fit(untied, tmp_path, key, value, words):
    shutil.copytree(FOLDER / "plain", tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(file) | {f"base_model.model.{key}": value.astype(np.float32)}
    save_file(tensors, file)
    with pytest.raises(ValueError, match=words):
        load_adapter(untied, tmp_path / "a")


@pytest.mark.parametrize("method", ["linear", "cat", "svd"])
def test_sums_of_adapters_are_those_of_peft(base, logits, more, method):
    """combine_adapters against add_weighted_adapter, of 0.7 and 0.4."""
    (first, frozen), (second, _) = (
        split_trainable(load_adapter(base, FOLDER / name))
        for name in ("plain", "other")
    )
    both = combine_adapters([first, second], [0.7, 0.4], frozen, method=method)
    model = join_trainable(both, frozen)
    got = model(jnp.asarray(logits["tokens"], jnp.int32))
    assert relative(got, more[method]) < 1e-4
    assert relative(got, logits["plain"]) > 0.05


def test_an_adapter_from_the_hub(base, monkeypatch, logits):
    import huggingface_hub

    asked = []

    def download(name, **options):
        asked.append((name, options["revision"]))
        return str(FOLDER / "plain")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    model = load_adapter(base, "nobody-has/this-name", revision="v2")
    assert asked == [("nobody-has/this-name", "v2")]
    tokens = jnp.asarray(logits["tokens"], jnp.int32)
    assert relative(model(tokens), logits["plain"]) < 1e-5


@pytest.fixture(scope="module")
def biased():
    return load_model(GOLDEN / "families" / "llama_bias", dtype=jnp.float32)


@pytest.fixture(scope="module")
def biased_logits():
    with np.load(FOLDER / "biases.npz") as archive:
        yield dict(archive)


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_biases(biased, biased_logits, bias, tmp_path):
    """PEFT's logits; and written again, its tensors and what its config says."""
    model = load_adapter(biased, FOLDER / f"bias_{bias}")
    tokens = jnp.asarray(biased_logits["tokens"], jnp.int32)
    assert relative(model(tokens), biased_logits[bias]) < 1e-5
    assert relative(model(tokens), biased_logits["base"]) > 0.1
    save_adapter(model, tmp_path, bias=bias, base_model="llama_bias")
    got = load_file(tmp_path / "adapter_model.safetensors")
    wanted = load_file(FOLDER / f"bias_{bias}" / "adapter_model.safetensors")
    assert got.keys() == wanted.keys()
    for key, tensor in wanted.items():
        np.testing.assert_array_equal(got[key], tensor, err_msg=key)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["bias"] == bias


@pytest.mark.parametrize(
    "also, bias, modules",
    [
        ("(q|down)_proj_bias$", "lora_only", []),
        ("bias$", "all", []),
        ("bias$|norm$", "all", ["input_layernorm", "post_attention_layernorm", "norm"]),
        ("embed", "none", ["embed_tokens"]),
    ],
)
def test_what_is_trained_whole_says_how_it_is_saved(biased, also, bias, modules):
    model = add_lora(biased, rank=2, targets="(q|down)_proj$", key=KEY)
    options = whole_options(model, also)
    assert options == {"modules_to_save": modules, "bias": bias}


def test_trained_biases_come_back(biased, tmp_path):
    model = add_lora(biased, rank=2, targets="(q|down)_proj$", key=KEY)
    trainable, frozen = split_trainable(model, also="bias$")
    moved = join_trainable(jax.tree.map(lambda x: x + 1, trainable), frozen)
    save_adapter(moved, tmp_path, **whole_options(moved, "bias$"))
    again = load_adapter(biased, tmp_path)
    for got, wanted in zip(*map(jax.tree.leaves, (again, moved)), strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_biases_that_are_none(base, tmp_path):
    model = load_adapter(base, FOLDER / "plain")
    with pytest.raises(ValueError, match="no bias to save, the model has none"):
        save_adapter(model, tmp_path, bias="all")
    with pytest.raises(ValueError, match="bias='some' must be one of none, lora_only"):
        save_adapter(model, tmp_path, bias="some")  # type: ignore

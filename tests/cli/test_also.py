"""Arrays trained whole by the command line, and written into its adapter."""

import json

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from qlora_jax.cli.main import main
from tests.cli.test_finetune import SMALL
from tests.interop.folders import FAMILIES, byte_tokenizer, write_folder

pytestmark = pytest.mark.unoptimized


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Gives the command that finetunes a model of a family in two steps."""
    monkeypatch.setenv("QLORA_JAX_CACHE", str(tmp_path / "cache"))

    def made(family="llama", **more):
        write_folder(tmp_path / "model", FAMILIES[family])
        rows = [{"instruction": f"Say {i}", "output": f"{i}."} for i in range(24)]
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        settings = SMALL | {"steps": 2, "eval_every": 0, "samples": 0} | more
        settings |= {"model": str(tmp_path / "model")}
        settings |= {"data": str(tmp_path / "rows.jsonl")}
        config = tmp_path / "config.yaml"
        config.write_text(yaml.safe_dump(settings))
        return ["finetune", str(config), "--out", str(tmp_path / "run")]

    return made


def written(tmp_path):
    """The config and the tensors of the adapter, and the tensors of the base."""
    adapter = tmp_path / "run" / "adapter"
    told = json.loads((adapter / "adapter_config.json").read_text())
    saved = load_file(adapter / "adapter_model.safetensors")
    return told, saved, load_file(tmp_path / "model" / "model.safetensors")


def test_embedding_and_norms_are_trained_and_saved(command, tmp_path, capsys):
    run = command()
    # What cannot be trained is said before anything is.
    assert main([*run, "--also", "wte"]) != 0
    assert "also 'wte' is found in the path of no array" in capsys.readouterr().err
    assert main([*run, "--also", "embed|norm$"]) == 0
    assert ", and embed|norm$" in capsys.readouterr().out
    _, saved, base = written(tmp_path)
    names = {key.removeprefix("base_model.model.") for key in saved} & set(base)
    assert "model.embed_tokens.weight" in names and len(names) > 2
    for name in names:
        assert not np.array_equal(saved[f"base_model.model.{name}"], base[name]), name


def test_rows_of_tokens_ranks_and_alphas_by_pattern(command, tmp_path, capsys):
    first, second = sorted(byte_tokenizer().encode("Sa").ids)
    run = command(rank_pattern="down_proj=1", train_rows=[second, first])
    for wrong in ("down_proj", "=3", "q=x", "q=-1"):
        assert main([*run, "--rank-pattern", wrong]) == 2
        assert f"rank_pattern: '{wrong}' is not like" in capsys.readouterr().err
    assert main([*run, "--alpha-pattern", "[kv]_proj=4.5", "o_proj=2"]) == 0
    assert ", and rows of 2 tokens" in capsys.readouterr().out
    told, saved, base = written(tmp_path)
    assert told["rank_pattern"] == {"down_proj": 1}
    assert told["alpha_pattern"] == {"k_proj": 4.5, "v_proj": 4.5, "o_proj": 2}
    assert told["trainable_token_indices"] == [first, second]
    (trained,) = (v for k, v in saved.items() if k.endswith("trainable_tokens_delta"))
    rows = base["model.embed_tokens.weight"][[first, second]]
    assert trained.shape == rows.shape and (trained != rows).any(axis=1).all()


def test_biases_are_trained_and_saved(command, tmp_path):
    run = command("qwen2")
    assert main([*run, "--also", "bias$"]) == 0
    told, saved, base = written(tmp_path)
    assert told["bias"] == "lora_only"
    biases = {k: v for k, v in saved.items() if k.endswith(".base_layer.bias")}
    assert len(biases) == sum(name.endswith("bias") for name in base) > 0
    for key, bias in biases.items():
        name = key.removeprefix("base_model.model.").replace(".base_layer", "")
        assert not np.array_equal(bias, base[name]), name

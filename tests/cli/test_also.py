"""Arrays trained whole by the command line, and written into its adapter."""

import json

import numpy as np
import yaml
from safetensors.numpy import load_file

from qlora_jax.cli.main import main
from tests.cli.test_finetune import SMALL
from tests.interop.folders import write_folder


def test_embedding_and_norms_are_trained_and_saved(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("QLORA_JAX_CACHE", str(tmp_path / "cache"))
    write_folder(tmp_path / "model")
    rows = [{"instruction": f"Say {i}", "output": f"{i}."} for i in range(24)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = SMALL | {"steps": 2, "eval_every": 0, "samples": 0}
    settings |= {"model": str(tmp_path / "model"), "data": str(tmp_path / "rows.jsonl")}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    run = ["finetune", str(tmp_path / "config.yaml"), "--out", str(tmp_path / "run")]
    # What cannot be trained is said before anything is.
    assert main([*run, "--also", "wte"]) != 0
    assert "also 'wte' is found in the path of no array" in capsys.readouterr().err
    assert main([*run, "--also", "embed|norm$"]) == 0
    assert ", and embed|norm$" in capsys.readouterr().out
    saved = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    base = load_file(tmp_path / "model" / "model.safetensors")
    names = {key.removeprefix("base_model.model.") for key in saved} & set(base)
    assert "model.embed_tokens.weight" in names and len(names) > 2
    for name in names:
        assert not np.array_equal(saved[f"base_model.model.{name}"], base[name]), name

"""The page on finetuning: its settings are read, its code runs on a tiny model."""

import json
import re
import shlex
from typing import Any

import pytest
import yaml

from qlora_jax.cli.finetune_options import Finetune, options
from qlora_jax.data import as_sources
from qlora_jax.sharding import mesh_of
from tests.conftest import ROOT
from tests.interop.folders import write_folder

pytestmark = pytest.mark.unoptimized

PAGE = (ROOT / "docs" / "finetuning.md").read_text(encoding="utf-8")


def test_its_settings_are_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (text,) = re.findall(r"```yaml\n# mine.yaml\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "mine.yaml").write_text(text)
    (command,) = re.findall(r"^qlora-jax finetune (mine.yaml .*)$", PAGE, re.MULTILINE)
    args = options(shlex.split(command))
    settings, said = args.settings(), yaml.safe_load(text)
    said["learning_rate"] = float(said["learning_rate"])  # text, to YAML
    assert {name: settings[name] for name in said} == said
    assert (args.rank, args.out, args.dropout) == (32, "runs/mine", 0.1)
    assert [s.weight for s in as_sources(args.settings()["data"])] == [1, 2]


def test_its_settings_are_there():
    (table,) = re.findall(r"^\| \| \|\n\|---\|---\|\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
    names = re.findall(r"`(\w+)`", "".join(re.findall(r"^\|[^|]*", table, re.M)))
    assert len(names) > 10
    assert set(names) <= {*Finetune.__dataclass_fields__}


def test_its_code_runs(tmp_path, monkeypatch):
    pytest.importorskip("grain", reason="needs grain (the train extra)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QLORA_JAX_CACHE", str(tmp_path / "cache"))
    write_folder(tmp_path / "model")
    rows = [{"instruction": f"Say {i}", "output": f"{i}."} for i in range(80)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source, on_several = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert source.count("SmolLM2-135M-Instruct") == 2
    source = source.replace("SmolLM2-135M-Instruct", "model")
    smaller = {"steps=200": "steps=2", "rank=16": "rank=2", "seq_len=256": "seq_len=64"}
    for given, tiny in {**smaller, "eval_every=50": "eval_every=1"}.items():
        assert given in source
        source = source.replace(given, tiny)
    names: dict[str, Any] = {}
    exec(compile(source, "finetuning.md", "exec"), names)
    lines = (tmp_path / "runs" / "notebook" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 1, 2, 2]
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    for given, tiny in {"folder/": "model", "steps=200": "steps=2", "64": "2"}.items():
        assert given in on_several
        on_several = on_several.replace(given, tiny)
    on_several = on_several.replace("seq_len=256", "seq_len=64")
    exec(compile(on_several, "finetuning.md", "exec"), names)
    mesh = mesh_of(names["model"])
    assert mesh is not None and dict(mesh.shape) == {"data": 1, "fsdp": 2, "model": 2}

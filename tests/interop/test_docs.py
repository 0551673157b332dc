"""The Python of docs/checkpoints.md runs, on a tiny model."""

import re
import shutil

from qlora_jax.interop.convert import convert_model
from tests.conftest import GOLDEN, ROOT


def test_python_of_the_page_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(GOLDEN / "peft_lora" / "base", "folder")
    shutil.copytree(GOLDEN / "peft_lora" / "plain", "adapter")
    convert_model("folder", "model.gguf")
    text = (ROOT / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    (source,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    hub = '"meta-llama/Llama-3.1-8B", quantize="nf4", revision="main"'
    assert hub in source
    source = source.replace(hub, '"folder", quantize="nf4"')
    source = source.replace('convert_model("model.gguf", "folder/")', "")
    source += 'convert_model("model.gguf", "from-gguf/")\n'
    exec(compile(source, "checkpoints.md", "exec"), {})
    made = {path.name for path in tmp_path.iterdir() if path.is_dir()}
    assert made == {"folder", "adapter", "out", "folder-nf4", "merged", "from-gguf"}
    assert "parameters in" in capsys.readouterr().out

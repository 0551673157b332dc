"""The smaller commands, each on a tiny model."""

import io
import json
import re

import jax
import jax.numpy as jnp
import pytest

from qlora_jax import (
    add_lora,
    join_trainable,
    load_model,
    save_adapter,
    split_trainable,
)
from qlora_jax.cli.main import main
from tests.interop.folders import write_folder

pytestmark = pytest.mark.unoptimized


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("commands") / "model"
    write_folder(folder)
    return str(folder)


def said(capsys):
    return capsys.readouterr().out


def test_a_prompt_is_answered(model, capsys, tmp_path, monkeypatch):
    command = ["generate", "--model", model, "--max-new-tokens", "5"]
    assert main([*command, "--prompt", "Why?"]) == 0
    answer = said(capsys)
    assert main([*command, "--prompt", "Why?"]) == 0
    assert said(capsys) == answer
    monkeypatch.setattr("sys.stdin", io.StringIO("Why?"))
    assert main([*command, "--prompt", "-"]) == 0
    assert said(capsys) == answer
    assert main([*command, "--prompt", "Why?", "--raw"]) == 0
    assert said(capsys) != answer
    prompts, out = tmp_path / "p.jsonl", tmp_path / "answers.jsonl"
    rows = [{"prompt": "Why?"}, {"prompt": "a\u2028b"}, {"prompt": "Who?"}]
    prompts.write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in rows))
    files = ["--file", str(prompts), "--out", str(out), "--batch-size", "2"]
    assert main([*command, *files]) == 0
    found = [json.loads(line) for line in out.read_text().split("\n")[:-1]]
    assert [{"prompt": row["prompt"]} for row in found] == rows
    assert found[0]["answer"] == answer.strip("\n")


def test_wrong_prompts(model, capsys, tmp_path):
    command = ["generate", "--model", model]
    (tmp_path / "p.jsonl").write_text('{"prompt": "x"}\n\n{"prompt": 3}')
    for arguments, words in [
        ([], "give one of --prompt TEXT and --file FILE"),
        (["--file", "absent"], "absent cannot be read"),
        (["--file", str(tmp_path / "p.jsonl")], "line 3 has no text in a field prompt"),
        (["--prompt", "x", "--top-p", "2"], "top_p=2.0 in (0, 1]"),
        (["--prompt", "x", "--chat-template", "no"], "must be Jinja source or one of"),
    ]:
        assert main([*command, *arguments]) == 2
        assert words in capsys.readouterr().err


def test_a_conversation_goes_on_until_it_is_reset(model, capsys, monkeypatch):
    lines = ["Why?", "", "Why?", "/reset", "Why?", "/exit", "never"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    command = ["chat", "--model", model, "--temperature", "0", "--max-new-tokens", "4"]
    assert main(command) == 0
    first = said(capsys)
    monkeypatch.setattr("sys.stdin", io.StringIO("Why?\n"))  # and the end
    assert main(command) == 0
    alone = said(capsys)
    assert first.startswith(alone) and first.endswith(alone)
    assert len(first) > 2 * len(alone)


def test_perplexity_and_mmlu(model, capsys, tmp_path):
    text, questions = tmp_path / "a.txt", tmp_path / "q.jsonl"
    text.write_text("To be, or not to be. " * 20)
    row = {"subject": "law", "question": "Who?", "choices": list("wxyz"), "answer": "B"}
    questions.write_text("\n".join([json.dumps(row)] * 3))
    out = tmp_path / "numbers.json"
    command = ["eval", "--model", model, "--out", str(out), "--text", str(text)]
    command += ["--window", "32", "--stride", "16", "--mmlu", str(questions)]
    assert main([*command, "--shots", str(questions)]) == 0
    shown, numbers = said(capsys), json.loads(out.read_text())
    assert f"Perplexity {numbers['perplexity']:.3f}" in shown
    assert numbers["questions"] == 3 and numbers["subjects"].keys() == {"law"}
    assert numbers["tokens"] == 31 + 16 * (numbers["windows"] - 1)
    for arguments, words in [
        ([], "say what to measure: --text FILE, --mmlu FILE"),
        (["--text", "absent"], "absent cannot be read"),
        (["--mmlu", str(text)], "line 1 is no question of MMLU"),
    ]:
        assert main(["eval", "--model", model, *arguments]) == 2
        assert words in capsys.readouterr().err


def test_rows_are_shown_as_the_model_sees_them(model, capsys, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"instruction": "Say 1", "output": "One."}')
    assert main(["data", "show", str(rows), "--model", model]) == 0
    shown = said(capsys)
    assert "Say 1" in shown and "One." in shown
    assert main(["data", "formats"]) == 0
    assert "alpaca" in said(capsys)
    assert main(["data", "show"]) == 2
    assert "say what to show: qlora-jax data show FILE" in capsys.readouterr().err
    assert main(["data", "show", "absent.jsonl", "--model", model]) == 2
    assert "There is no data file absent.jsonl" in capsys.readouterr().err
    assert main(["data", "formats", "--all"]) == 2
    assert "data formats takes no '--all'" in capsys.readouterr().err
    assert main(["data"]) == 2 and main(["data", "-h"]) == 0


def test_models_are_inspected_converted_merged_and_quantized(model, capsys, tmp_path):
    assert main(["inspect", model]) == 0
    assert "model.layers.0.self_attn.q_proj.weight" in said(capsys)
    gguf, small = str(tmp_path / "m.gguf"), str(tmp_path / "nf4")
    assert main(["convert", model, gguf, "--type", "F32"]) == 0
    assert main(["quantize", model, small]) == 0
    assert said(capsys).endswith(f"Written: {small}\n")
    for path in (gguf, small):
        assert main(["inspect", path]) == 0
    assert main(["convert", "absent", gguf]) == 2
    assert "There is no model at absent" in capsys.readouterr().err
    assert main(["merge", model, "absent", str(tmp_path / "x")]) == 2


def test_a_merge_tells_what_it_does_to_a_text(model, capsys, tmp_path):
    lt = add_lora(load_model(model, dtype=jnp.float32), rank=2, key=jax.random.key(0))
    trainable, frozen = split_trainable(lt)
    moved = jax.tree.map(lambda x: x + 0.1, trainable)
    save_adapter(join_trainable(moved, frozen), tmp_path / "adapter")
    text, out = tmp_path / "a.txt", tmp_path / "out"
    text.write_text("To be, or not to be. " * 20)
    command = ["merge", model, str(tmp_path / "adapter"), str(out), "--quantize", "nf4"]
    assert main([*command, "--text", "absent"]) == 2 and not out.exists()
    options = ["--text", str(text), "--window", "32"]
    capsys.readouterr()
    assert main([*command, *options]) == 0
    shown = said(capsys)
    assert "Merged 21 weights: relative error of rounding 0.0" in shown
    before, after = re.search(r"Loss on .*: ([\d.]+) -> ([\d.]+) \(", shown).groups()
    for path, adapter, loss in (
        (out, [], after),
        (model, ["--adapter", command[2]], before),
    ):
        arguments = ["--model", str(path), *adapter]
        measured = ["--text", str(text), "--window", "32", "--windows", "16"]
        assert main(["eval", *arguments, *measured]) == 0
        assert f"(loss {loss} nats)" in said(capsys)

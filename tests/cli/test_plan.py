import json

from qlora_jax.cli.main import main
from qlora_jax.interop.hub import load_config
from qlora_jax.plan import plan_memory
from qlora_jax.train import TrainConfig
from tests.interop.folders import LLAMA


def test_a_plan_needs_the_config_alone(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    command = ["plan", "--model", str(tmp_path), "--rank", "4"]
    assert main(command) == 0
    first = capsys.readouterr().out
    assert "frozen weights, nf4" in first and "on the host" in first
    assert main([*command, "--no-paged", "--quantize", "int8"]) == 0
    second = capsys.readouterr().out
    assert "frozen weights, int8" in second and "optimizer state" in second


def test_a_plan_of_layers_one_by_one_counts_what_the_last_keeps(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    command = ["plan", "--model", str(tmp_path), "--rank", "4", "--seq-len", "2048"]
    printed = []
    for flag in ("--no-unroll", "--unroll"):
        assert main([*command, flag]) == 0
        printed.append(capsys.readouterr().out.strip())
    train = TrainConfig(rank=4, seq_len=2048, batch_size=1, dropout=0.0, unroll=True)
    assert printed[1] == str(plan_memory(load_config(str(tmp_path)), train))
    assert printed[0] != printed[1]


def test_a_model_that_is_not_there(tmp_path, capsys):
    assert main(["plan", "--model", str(tmp_path / "absent")]) == 2
    assert "There is no model at" in capsys.readouterr().err
    assert main(["plan", "--model", str(tmp_path)]) == 2
    assert "config.json is missing" in capsys.readouterr().err


def test_a_rank_above_a_side_of_a_weight_is_said_in_one_line(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    assert main(["plan", "--model", str(tmp_path)]) == 2  # of rank 64
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("qlora-jax: rank=64 of 'k_proj' must be from 1 to 32")

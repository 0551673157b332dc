import dataclasses
import re

import pytest
import yaml

from qlora_jax.cli.finetune_options import GROUPS, Finetune, options
from qlora_jax.cli.main import main
from qlora_jax.cli.presets import PRESETS


def test_flags_change_a_file_which_changes_a_preset(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(
        "learning-rate: 3e-4\nrank: 8\ndata: [a.jsonl, {path: b, weight: 2}]"
    )
    args = options([str(path), "--preset", "guanaco-33b", "--rank", "4"])
    assert (args.rank, args.learning_rate, args.dropout) == (4, 3e-4, 0.05)
    assert args.settings()["data"] == ["a.jsonl", {"path": "b", "weight": 2}]
    # As a run's config.yaml has it, it reads back as it was.
    path.write_text(yaml.safe_dump(args.settings()))
    assert options([str(path)]) == args


@pytest.mark.parametrize(
    "name, rate, dropout",
    [
        ("guanaco-7b", 2e-4, 0.1),
        ("guanaco-13b", 2e-4, 0.1),
        ("guanaco-33b", 1e-4, 0.05),
        ("guanaco-65b", 1e-4, 0.05),
    ],
)
def test_presets_are_table_9_of_the_paper(name, rate, dropout):
    args = options([f"--preset={name}"])
    assert (args.learning_rate, args.dropout) == (rate, dropout)
    assert (args.rank, args.alpha, args.batch_size, args.steps) == (64, 16, 16, 1875)
    assert (args.max_grad_norm, args.b2, args.schedule) == (0.3, 0.999, "constant")
    assert args.group_by_length and args.target_max_len == 512
    assert args.quantize == "nf4" and args.double_quant and args.paged
    assert PRESETS[name].keys() <= {f.name for f in dataclasses.fields(Finetune)}


def test_every_flag_has_help(capsys):
    with pytest.raises(SystemExit) as end:
        main(["finetune", "--help"])
    assert not end.value.code
    text = re.sub(r"\s+", " ", re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().out))
    parts = re.split(r" (?=--[a-z])", text)
    for field in dataclasses.fields(Finetune):
        flag = "--" + field.name.replace("_", "-")
        (own,) = [p for p in parts if re.match(rf"{flag}[ ,]", p)]
        if isinstance(field.default, bool):  # "--x, --no-x help"
            own = parts[parts.index(own) + 1]
        assert re.search(r"[a-z]{2,} [a-z]+.*\(default", own), own


def test_the_help_has_every_setting_in_a_group_and_names_the_presets(capsys):
    grouped = [name for names in GROUPS.values() for name in names]
    assert sorted(grouped) == sorted(f.name for f in dataclasses.fields(Finetune))
    with pytest.raises(SystemExit):
        main(["finetune", "--help"])
    text = capsys.readouterr().out
    assert text.index("--model") < text.index("--data ") < text.index("--rank")
    for name in GROUPS:
        assert f"{name} options" in text
    assert "guanaco-7b, guanaco-13b, -33b or -65b" in text
    assert list(PRESETS) == [f"guanaco-{size}b" for size in (7, 13, 33, 65)]

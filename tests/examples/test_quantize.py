import pytest

from examples.quantize import show_one_matrix, train_adapters

pytestmark = pytest.mark.unoptimized


def test_adapters_over_frozen_nf4_learn(capsys):
    first, last = train_adapters()
    assert first > 0.4
    assert last < 0.02  # the loss that the example states
    assert "optimizer state in pinned_host memory" in capsys.readouterr().out


def test_shows_codes_bits_and_errors(capsys):
    show_one_matrix()
    out = capsys.readouterr().out
    assert "4.127 bits a parameter" in out
    errors = {
        line.split("  ")[0]: float(line.split()[-1])
        for line in out.splitlines()
        if line.startswith(("nf4", "fp4", "int"))
    }
    assert errors["nf4"] < errors["nf4 + DQ"] < errors["int4"] < errors["fp4"]

import sys

import pytest

from qlora_jax.interop import progress
from qlora_jax.interop.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets."""
    time = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: time[0])
    return time


def test_a_line_every_five_seconds(clock, capsys):
    with Progress("Loading m", 8_000_000_000) as shown:
        for second in range(1, 9):
            clock[0] = float(second)
            shown.advance(1_000_000_000)
    assert capsys.readouterr().err == (
        "Loading m: 5.00 of 8.00 GB, 1.00 GB/s, 5 s, 3 s left\n"
    )


def test_what_is_small_is_told_in_megabytes(clock, capsys):
    with Progress("Loading m", 4_000_000) as shown:
        clock[0] = 8.0
        shown.advance(1_000_000)
    assert capsys.readouterr().err == (
        "Loading m: 1.00 of 4.00 MB, 0.12 MB/s, 8 s, 24 s left\n"
    )


def test_what_is_quick_prints_nothing_unless_asked(clock, capsys):
    for show, expected in ((None, ""), (False, ""), (True, "x: 0.00 of 0.00 MB, 0.0")):
        with Progress("x", 10, show) as shown:
            clock[0] += 1
            shown.advance(10)
        assert capsys.readouterr().err.startswith(expected)
        assert bool(expected) == (show is True)


def test_false_is_silent_however_long(clock, capsys):
    with Progress("x", 10, False) as shown:
        clock[0] += 100
        shown.advance(10)
    assert capsys.readouterr().err == ""


def test_a_bar_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    with Progress("Loading m", 4_000_000) as shown:
        shown.advance(1_000_000)
        shown.advance(3_000_000)
    drawn = capsys.readouterr().err
    assert "Loading m" in drawn and "4.0/4.0 MB" in drawn and "left" in drawn


def test_a_bar_has_room_beside_a_long_path(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    with Progress(f"Loading /a/{'long/' * 20}way/to/stories260K", 4_000_000) as shown:
        shown.advance(4_000_000)
    drawn = capsys.readouterr().err
    assert "Loading …ng/way/to/stories260K " in drawn and "4.0/4.0 MB" in drawn

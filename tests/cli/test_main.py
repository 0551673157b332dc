import errno
import threading

import pytest

from qlora_jax.cli import main as module
from qlora_jax.cli.main import COMMANDS, main


def test_help_lists_the_commands(capsys):
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"  {name} " in said for name in COMMANDS)
    assert main([]) == 2


def test_an_unknown_command_names_the_nearest(capsys):
    assert main(["finetun"]) == 2
    words = "qlora-jax: there is no command 'finetun'. Did you mean 'finetune'?\n"
    assert capsys.readouterr().err == words
    assert main(["xyz"]) == 2


@pytest.mark.parametrize("name", [n for n in COMMANDS if n != "data"])
def test_every_command_has_help(name, capsys):
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    assert not end.value.code
    assert capsys.readouterr().out.startswith(f"usage: qlora-jax {name}")


@pytest.mark.parametrize(
    "error, code, words",
    [
        (ValueError("the call is wrong."), 2, "qlora-jax: the call is wrong."),
        (NotImplementedError("not yet."), 2, "qlora-jax: not yet."),
        (OSError(errno.ENOSPC, "No space left"), 1, "No space left"),
        (FloatingPointError("no number."), 1, "qlora-jax: no number."),
        (KeyboardInterrupt(), 130, "qlora-jax: interrupted."),
        (ModuleNotFoundError("No module named 'grain'", name="grain"), 2,
         "No module named 'grain'. Install what the command line needs: pip install"),
    ],
)  # fmt: skip
def test_errors_are_one_line_and_a_code(error, code, words, monkeypatch, capsys):
    class Failing:
        @staticmethod
        def main(argv):
            raise error

    monkeypatch.setattr(module.importlib, "import_module", lambda name: Failing)
    assert main(["finetune"]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


def test_what_is_broken_here_is_not_hidden(monkeypatch):
    def broken(name):
        raise ModuleNotFoundError("No module named x", name="qlora_jax.cli.x")

    monkeypatch.setattr(module.importlib, "import_module", broken)
    with pytest.raises(ModuleNotFoundError):
        main(["finetune"])


def test_threads_that_write_say_nothing_of_their_own(capsys):
    error = RuntimeError("cannot schedule")
    arguments = (type(error), error, None)
    thread = threading.Thread(target=module._tell_of_main_thread, args=arguments)
    thread.start()
    thread.join()
    assert capsys.readouterr().err == ""
    module._tell_of_main_thread(*arguments)
    assert "RuntimeError: cannot schedule" in capsys.readouterr().err

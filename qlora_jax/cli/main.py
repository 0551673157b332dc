"""`qlora-jax`: finds the subcommand, and says what went wrong in one line."""

import difflib
import importlib
import logging
import os
import sys
import threading
from collections.abc import Sequence
from importlib import metadata
from typing import Any

from qlora_jax.one_gpu import use_one_gpu

PROGRAM = "qlora-jax"
# Subcommand -> its module here, imported when it is asked for, and what it does.
COMMANDS = {
    "finetune": ("finetune", "finetune a model: QLoRA from a checkpoint to an adapter"),
    "generate": ("generate", "continue a prompt, or the prompts of a file"),
    "chat": ("chat", "talk with a model"),
    "eval": ("evaluate", "perplexity of a text, accuracy on MMLU"),
    "data": ("data", "show rows as the model sees them; list the formats"),
    "convert": ("convert", "write a model as a Hugging Face folder or a GGUF file"),
    "merge": ("merge", "write a model with an adapter merged into it"),
    "quantize": ("quantize", "write a model in 4 or 8 bits, as bitsandbytes does"),
    "plan": ("plan", "tell what finetuning a model will take of memory"),
    "inspect": ("inspect", "list the tensors of a model or adapter"),
}
# What a wrong call and what a failure on the way exits with.
WRONG_CALL, FAILURE, INTERRUPTED = 2, 1, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand.

    Args:
        argv: the command line without the name of the program; None for this one's.

    Returns:
        The exit code: 0, 2 for a wrong call, 1 for what failed on the way.
    """
    if argv is None:
        argv = sys.argv[1:]
        _quiet_writers()
    argv = list(argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(_help())
        return 0 if argv else WRONG_CALL
    if argv[0] == "--version":
        print(f"{PROGRAM} {metadata.version('qlora-jax')}")
        return 0
    name, *rest = argv
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"Did you mean {near[0]!r}?" if near else f"See {PROGRAM} --help."
        return _say(f"there is no command {name!r}. {hint}", WRONG_CALL)
    use_one_gpu()
    try:
        module = importlib.import_module(f"qlora_jax.cli.{COMMANDS[name][0]}")
        return module.main(rest)
    except ImportError as error:
        if error.name and error.name.split(".")[0] == "qlora_jax":
            raise
        return _say(f"{error}. {_extra(error)}", WRONG_CALL)
    except (ValueError, NotImplementedError) as error:
        return _say(str(error), WRONG_CALL)
    except BrokenPipeError:
        # Whoever read this has stopped: nothing is left to say, nor at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (OSError, FloatingPointError) as error:
        return _say(str(error), FAILURE)
    except KeyboardInterrupt:
        return _say("interrupted.", INTERRUPTED)


def _quiet_writers() -> None:
    """Keeps the threads that write checkpoints from telling what is told once.

    A write that fails is raised where it is waited for; the pieces of it that are still
    under way then fail too, each with a traceback of its own, wherever it is noticed:
    by Python, by the loop of events, or where C++ calls Python and has nobody to tell.
    """
    sys.excepthook, sys.unraisablehook = _tell_of_main_thread, _tell_unless_closed
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)


def _tell_unless_closed(unraisable: Any) -> None:
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def _tell_of_main_thread(kind: Any, error: Any, trace: Any) -> None:
    in_main = threading.current_thread() is threading.main_thread()
    if in_main and str(error) != "Event loop is closed":
        sys.__excepthook__(kind, error, trace)


def _say(message: str, code: int) -> int:
    print(f"{PROGRAM}: {message}", file=sys.stderr)
    return code


def _extra(error: ImportError) -> str:
    if "pip install" in str(error):
        return ""
    return "Install what the command line needs: pip install 'qlora-jax[train]'."


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join([
        f"usage: {PROGRAM} COMMAND [OPTIONS]",
        "",
        "QLoRA for JAX: finetune large language models, the base in 4 bits.",
        "",
        *lines,
        "",
        f"{PROGRAM} COMMAND --help tells the options of a command.",
    ])  # fmt: skip

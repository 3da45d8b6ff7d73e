"""The command `swincompress`: finds the sub-command, imports only what it needs, turns user errors into one line.

The exit codes are 0 (done), 1 (a check of the command failed), 2 (the user's input was wrong), 130 (interrupted) and
143 (terminated).
"""

from __future__ import annotations

import atexit
import gc
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Protocol

from swincompress_pl import __version__
from swincompress_pl.cli.messages import short
from swincompress_pl.dependencies import missing_package
from swincompress_pl.printable import printable
from swincompress_pl.registry import UnsupportedNetworkError

PROGRAM = "swincompress"
USER_ERROR = 2
_INTERRUPTED = 130
# What a user can correct. Anything else is a defect and keeps its traceback.
_USER_ERRORS = (ValueError, OSError, ImportError, UnsupportedNetworkError)


class Command(Protocol):
    """A module of this package: one sub-command, or several that share their arguments."""

    def main(self, name: str, arguments: Sequence[str]) -> int:
        """Runs a sub-command.

        Args:
            name: Name of the sub-command.
            arguments: The arguments that follow it.

        Returns:
            The exit code.
        """
        ...


# sub-command -> (module, one line of help)
COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("demo", "the whole job in minutes: train, prune, quantize, export, measure, report"),
    "fit": ("early", "train and compress a model as a YAML config says"),
    "validate": ("early", "evaluate a model or checkpoint on the hold-out"),
    "test": ("early", "evaluate a model or checkpoint on the test images"),
    "estimate": ("early", "say what a fit will cost, from a few measured batches"),
    "export": ("export", "write a quantized checkpoint as an artifact for the integer engine"),
    "bench": ("bench", "measure an artifact, alone or against other runtimes, or one kernel"),
    "classify": ("classify", "classify pictures by an artifact"),
    "inspect": ("inspect", "show what an artifact or a checkpoint holds"),
    "report": ("report", "render the report of a run directory again"),
    "completion": ("completion", "print a script that completes commands and options in bash or zsh"),
}

_HELP = f"""\
usage: {PROGRAM} [--version] [--debug] COMMAND ...

Compresses vision transformers, from training to an integer engine.

commands:
{{commands}}

options:
  --version   the version
  --debug     show the traceback of an error
  -h, --help  this text; `{PROGRAM} COMMAND --help` explains a command

example:
  {PROGRAM} demo --output runs/demo
  {PROGRAM} fit -c configs/digits_swin.yaml
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command `swincompress`.

    Args:
        arguments: The arguments that follow the program's name; None for those of the process.

    Returns:
        The exit code: 0 done, 1 a check of the command failed, 2 the user's input was wrong, 130 interrupted, and 143
        terminated.
    """
    if arguments is None:  # a process of its own: at its end, Python need not look for garbage among torch's objects
        atexit.register(gc.freeze)
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [argument for argument in given if argument != "--debug"]
    if not given or given[0] in ("-h", "--help"):
        lines = (f"  {name:<10} {line}" for name, (_, line) in COMMANDS.items())
        print(_HELP.format(commands="\n".join(lines)), end="")
        return 0 if given else USER_ERROR
    if given[0] == "--version":
        print(f"{PROGRAM} {__version__}")
        return 0
    if given[0] not in COMMANDS:
        return _fail(f"unknown command {given[0]!r}; commands are {', '.join(COMMANDS)}")
    return _run(given[0], given[1:], debug)


def _run(name: str, arguments: list[str], debug: bool) -> int:
    try:
        command: Command = importlib.import_module(f"{__name__}.{COMMANDS[name][0]}")
        return command.main(name, arguments)
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:
        # The reader (head, less) has ended; this keeps Python from complaining about it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if debug or not _is_user_error(error):
            raise
        return _fail(f"{name}: {_one_line(error)}")


def _is_user_error(error: Exception) -> bool:
    return isinstance(error, _USER_ERRORS) or type(error).__name__ == "MisconfigurationException"


def _one_line(error: Exception) -> str:
    text = missing_package(error) or printable(" ".join(short(str(error)).split()))
    if text and not text.endswith(":"):
        return text
    while error.__cause__ is not None and isinstance(error.__cause__, Exception):  # an error without words
        error = error.__cause__
    return f"{text} {type(error).__name__}".strip()


def _fail(message: str) -> int:
    print(f"{PROGRAM}: error: {message}", file=sys.stderr)
    return USER_ERROR

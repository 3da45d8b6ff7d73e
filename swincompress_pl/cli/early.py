"""What can be wrong with `fit`, `validate`, `test` and `estimate` before torch is imported, which takes seconds."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from swincompress_pl.cli.options import CONFIG_KEYS, OPTIONS, trainer_arguments

_MODULES = {"estimate": "estimate"}
_WITH_ARGUMENTS = ("trainer", "model", "data")
# What Lightning takes in place of a checkpoint's path.
_CHECKPOINT_WORDS = ("best", "last", "hpc", "null", "")
_CALLBACKS = (
    "the callbacks are a list, and the command line cannot change one of them. Put the whole list into a second file "
    "(-c recipe.yaml -c callbacks.yaml), or append a callback and then set its arguments: --trainer.callbacks+=CLASS "
    "--trainer.callbacks.{name} VALUE"
)


def main(name: str, arguments: Sequence[str]) -> int:
    """Runs the command if nothing is wrong with its options and its config that can be seen without torch.

    Args:
        name: Name of the sub-command.
        arguments: The arguments that follow it.

    Returns:
        The exit code.
    """
    check(name, arguments)
    module = importlib.import_module(f"swincompress_pl.cli.{_MODULES.get(name, 'train')}")
    code: int = module.main(name, arguments)
    return code


def check(name: str, arguments: Sequence[str]) -> None:
    """Checks names of options, and the config files and the checkpoint that they name.

    Args:
        name: Name of the sub-command.
        arguments: The arguments that follow it.

    Raises:
        ValueError: If an option or a key of a config is unknown, or a config is no YAML mapping.
        FileNotFoundError: If a config or the checkpoint to resume from is missing.
    """
    if any(argument in ("-h", "--help") for argument in arguments):
        return
    appended = False
    checkpoint: tuple[str, Path] | None = None
    for option, value in _options(arguments):
        if option == "--config":
            checkpoint = _check_config(value) or checkpoint
        elif option == "--ckpt_path":
            checkpoint = (value, Path())
        else:
            _check_option(name, option, appended)
        appended = appended or option.removesuffix("+") == "--trainer.callbacks"
    if checkpoint is not None and name == "estimate":
        raise ValueError(f"ckpt_path={checkpoint[0]!r}: an estimate is for a fit from its beginning; leave it out")
    if checkpoint is not None:
        _check_checkpoint(*checkpoint)


def _options(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The options with their values, "" if they have none."""
    for place, argument in enumerate(arguments):
        following = arguments[place + 1] if place + 1 < len(arguments) else ""
        if argument == "--":
            return
        if argument.startswith("--"):
            option, equals, value = argument.partition("=")
            yield option, value if equals else following
        elif argument.startswith("-c"):
            yield "--config", argument.removeprefix("-c").removeprefix("=") or following


def _check_option(command: str, option: str, appended: bool) -> None:
    name, _, rest = option.removeprefix("--").removesuffix("+").partition(".")
    known = OPTIONS[command]
    if name not in _WITH_ARGUMENTS:
        if not any(each.startswith(option) for each in known):  # the parser completes what is cut short
            raise ValueError(f"unknown option {option}{_meant(option, known)}; see swincompress {command} --help")
        return
    argument, _, part = rest.partition(".")
    if name == "trainer" and argument and trainer_arguments() and argument not in {*trainer_arguments(), "help"}:
        known = tuple(f"--trainer.{each}" for each in trainer_arguments())
        raise ValueError(f"unknown option {option}{_meant(option, known)}; see swincompress {command} --help")
    if name == "trainer" and argument == "callbacks" and part and not appended:
        raise ValueError(f"{option}: {_CALLBACKS.format(name=part)}")


def _check_config(value: str) -> tuple[str, Path] | None:
    """Checks a config; returns the checkpoint that it names, and the folder that its path is relative to."""
    file = Path(value)
    if not value or value.startswith("-"):
        raise ValueError("-c names no config; give a YAML file, e.g. -c configs/digits_swin.yaml")
    if "\n" in value or ": " in value or value.startswith("{"):
        return None  # YAML itself, which Lightning's command line takes as well
    if not file.is_file():
        raise FileNotFoundError(f"-c {value}: {_missing(file)}")
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"-c {value}: not YAML: {error}") from error
    if config is not None and not isinstance(config, dict):
        raise ValueError(f"-c {value}: a YAML mapping with model, data and trainer is expected; see configs/")
    _check_keys(value, "", config or {}, CONFIG_KEYS)
    trainer = (config or {}).get("trainer")
    if isinstance(trainer, dict) and trainer_arguments():
        _check_keys(value, "trainer.", trainer, trainer_arguments())
    checkpoint = (config or {}).get("ckpt_path")
    return (checkpoint, file.parent) if isinstance(checkpoint, str) else None


def _check_keys(file: str, prefix: str, config: dict[Any, Any], known: Iterable[str]) -> None:
    for key in config:
        if key not in set(known):
            raise ValueError(f"-c {file}: unknown key {prefix}{key}{_meant(str(key), known)}")


def _check_checkpoint(value: str, folder: Path) -> None:
    if is_no_path(value) or (folder / value).exists() or Path(value).exists():
        return
    raise FileNotFoundError(f"ckpt_path {value}: {_missing(folder / value)}")


def is_no_path(checkpoint: str) -> bool:
    """Whether Lightning takes a `ckpt_path` for a word, an address or the name of a stored model."""
    return checkpoint in _CHECKPOINT_WORDS or "://" in checkpoint or checkpoint.startswith("registry")


def _missing(file: Path) -> str:
    if file.is_dir():
        return "is a folder; name a file in it"
    return f"there is no such file in {file.parent.resolve()}{_beside(file)}"


def _beside(missing: Path) -> str:
    """The files of the same kind beside a missing one, as the end of a message."""
    there = sorted(missing.parent.glob(f"*{missing.suffix}")) if missing.suffix and missing.parent.is_dir() else []
    return f"; there are {', '.join(file.name for file in there[:5])}" if there else ""


def _meant(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f", did you mean {close[0]}?" if close else ""

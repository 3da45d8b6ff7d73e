"""The parser of `fit`, `validate`, `test` and `estimate`: its errors are one line, and what it reads is up to date."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import yaml  # type: ignore[import-untyped]
from jsonargparse import DefaultHelpFormatter, get_loader, set_loader
from lightning.pytorch.cli import LightningArgumentParser

import swincompress_pl.callbacks
import swincompress_pl.data
import swincompress_pl.models  # so that configs may name their classes without the module
from swincompress_pl._deprecated import current_arguments
from swincompress_pl.cli.paths import with_absolute_paths


class HelpFormatter(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of examples as they are."""


class OneLineParser(LightningArgumentParser):
    """Lightning's parser, whose errors are raised and not printed below the usage, which is some hundred lines."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raises a ValueError.

        Args:
            message: What is wrong.
            ex: The error that tells it.
        """
        raise ValueError(message) from ex


@functools.cache
def _load_yaml() -> Callable[[str], Any]:
    load: Callable[[str], Any] = get_loader("yaml")
    return load


def read_configs(default_model: str) -> None:
    """Makes all configs that are read from now on have current names, and absolute paths of weights and data.

    Args:
        default_model: Path of the model's class, where a config names none.
    """
    load, working = _load_yaml(), Path.cwd()

    def read(text: str) -> Any:
        config = by_current_names(load(text))
        # jsonargparse reads a file in its folder
        return with_absolute_paths(config, Path.cwd(), working, default_model) if isinstance(config, dict) else config

    set_loader("yaml", read, exceptions=(yaml.YAMLError,))


def by_current_names(config: Any) -> Any:
    """A config, or a part of one, with the arguments of our callbacks under their present names."""
    if isinstance(config, list):
        return [by_current_names(part) for part in config]
    if not isinstance(config, dict):
        return config
    config = {key: by_current_names(part) for key, part in config.items()}
    name = str(config.get("class_path", "")).rpartition(".")[2]
    if name in swincompress_pl.callbacks.__all__ and isinstance(config.get("init_args"), dict):
        kind = getattr(swincompress_pl.callbacks, name)
        config["init_args"] = current_arguments(kind.__init__, config["init_args"])
    return config

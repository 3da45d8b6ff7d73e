"""The options of every command and the keys of a config, as plain data: for completion and checks without torch.

A test compares them with the parsers.
"""

from __future__ import annotations

import ast
import functools
from importlib.util import find_spec
from pathlib import Path

_OF_A_FIT = (
    "--help",
    "--config",
    "--print_config",
    "--seed_everything",
    "--trainer",
    "--model",
    "--model.help",
    "--data",
    "--data.help",
    "--ckpt_path",
    "--report",
    "--weights_only",
)
OPTIONS: dict[str, tuple[str, ...]] = {
    "demo": ("--help", "--output", "--model", "--seed", "--threads"),
    "fit": _OF_A_FIT,
    "validate": (*_OF_A_FIT, "--verbose"),
    "test": (*_OF_A_FIT, "--verbose"),
    "estimate": (*_OF_A_FIT, "--batches", "--devices", "--json"),
    "export": (
        "--help",
        "--output",
        "--compression",
        "--reference-check",
        "--quantize",
        "--bits",
        "--data",
        "--data-root",
        "--images",
        "--model-class",
        "--model-attribute",
        "--form",
        "--float",
        "--verify",
        "--reduce-range",
        "--gather-elements",
    ),
    "bench": (
        "--help",
        "--threads",
        "--batch",
        "--artifact",
        "--against",
        "--implementation",
        "--rounds",
        "--operations",
        "--kernel",
        "--shape",
        "--json",
    ),
    "classify": ("--help", "--top", "--exif", "--threads", "--json"),
    "inspect": ("--help", "--json"),
    "report": ("--help",),
    "completion": ("--help",),
}
# Of any command that reads a config: one command reads the configs of the others.
CONFIG_KEYS = tuple(
    dict.fromkeys(
        option.removeprefix("--")
        for command in ("fit", "test", "estimate")
        for option in OPTIONS[command]
        if "." not in option and option not in ("--help", "--config", "--print_config")
    )
)


@functools.cache
def trainer_arguments() -> frozenset[str]:
    """The arguments of Lightning's Trainer, read from its source; nothing if that is not where it is expected.

    Importing the Trainer takes seconds, reading its source does not.
    """
    spec = find_spec("lightning")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        file = Path(folder) / "pytorch" / "trainer" / "trainer.py"
        if file.is_file():
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ClassDef) and node.name == "Trainer":
                    return frozenset(_arguments_of(node)) - {"self"}
    return frozenset()


def _arguments_of(kind: ast.ClassDef) -> list[str]:
    for node in kind.body:
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            return [argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)]
    return []

"""Every block of README.md and docs/: Python runs, commands and configs are parsed, C++ is compiled.

A page's Python runs in order in one namespace, in an empty folder; a block with a title is written there as a file. The
comment on the line before a block says otherwise (tests/test_tutorials.py runs the tutorials):

    <!-- not run: needs two GPUs -->    only parsed, and its names and arguments looked up
    <!-- run -->                        before commands: they are run, too
    <!-- output -->                     what the Python before it prints
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import io
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonargparse
import pytest
import yaml  # type: ignore[import-untyped]
from support.docs_blocks import ROOT, Block, all_blocks, blocks_of, pages
from support.docs_names import wrong_names

from swincompress_pl import cli
from swincompress_pl.cli import early

# Pages whose Python takes longer than about five seconds, as it trains networks.
SLOW = {
    "README.md",
    "docs/explanation/quantization.md",
    "docs/how-to/own_data.md",
    "docs/how-to/plain_pytorch.md",
    "docs/how-to/read_a_report.md",
    "docs/how-to/resume.md",
}
SHELL = ("bash", "sh", "shell", "console")
OTHERS = ("", "text", "cmake", "toml", "json", "diff", "bibtex", "mermaid")
STAND_IN = "configs/digits_swin.yaml"
TOP_LEVEL = {"seed_everything", "model", "data", "trainer", "ckpt_path", "weights_only"}


def in_page_order(language: str, *, runs: bool) -> list[Any]:
    marks = [pytest.mark.slow]
    found = [page for page in pages() if any(block.language == language for block in blocks_of(page))]
    if runs:
        found = [page for page in found if not page.startswith("docs/tutorials/")]
    return [pytest.param(page, marks=marks if page in SLOW and runs else [], id=page) for page in found]


def place(block: Block) -> str:
    return block.place


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, beside which the repository's own folders are found."""
    for name in ("configs", "benchmarks", "examples", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def write_files(page: str, folder: Path) -> None:
    """The blocks of a page that are files."""
    for block in blocks_of(page):
        if block.title is not None:
            file = folder / block.title
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block.text, encoding="utf-8")


def test_blocks_are_found() -> None:
    assert len(all_blocks("python")) > 20
    assert len(all_blocks(*SHELL)) > 5
    unknown = [block.place for page in pages() for block in blocks_of(page)
               if block.language not in ("python", "yaml", "cpp", *SHELL, *OTHERS)]  # fmt: skip
    assert not unknown, f"no check for the language of {unknown}"


def test_reasons_are_given() -> None:
    marked = [block for page in pages() for block in blocks_of(page) if block.mark == "not run"]
    assert not [block.place for block in marked if not block.reason]


# Python


@pytest.mark.parametrize("page", in_page_order("python", runs=False))
def test_names_and_arguments_are_there(page: str) -> None:
    known: dict[str, Any] = {}
    for block in blocks_of(page):
        if block.language == "python":
            assert not list(wrong_names(block.text, known)), block.place


@pytest.mark.parametrize("page", in_page_order("python", runs=True))
def test_python_runs(page: str, folder: Path) -> None:
    write_files(page, folder)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    printed = ""
    for block in blocks_of(page):
        if block.language == "python" and block.mark != "not run" and block.title is None:
            tree = ast.parse(block.text, block.place)
            ast.increment_lineno(tree, block.line - 1)
            with contextlib.redirect_stdout(io.StringIO()) as stream:
                exec(compile(tree, page, "exec"), namespace)
            printed = stream.getvalue()
        elif block.language in SHELL and block.mark == "run":
            command = ["bash", "-e", "-c", block.text]
            done = subprocess.run(command, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, f"{block.place}: {done.stderr}"
            printed = done.stdout
        elif block.mark == "output":
            assert block.text.split() == printed.split(), f"{block.place}: printed\n{printed}"


# Commands


class Parsed(Exception):  # noqa: N818  # nothing is wrong
    """The arguments of a command were accepted."""


@pytest.fixture
def parsing_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands end when they have read their arguments."""
    parsing = False  # jsonargparse parses parts of an argument by parsers inside

    def ending(original: Any) -> Any:
        def parse(self: Any, *args: Any, **given: Any) -> Any:
            nonlocal parsing
            if parsing:
                return original(self, *args, **given)
            parsing = True
            try:
                original(self, *args, **given)
            finally:
                parsing = False
            raise Parsed

        return parse

    for parser in (argparse.ArgumentParser, jsonargparse.ArgumentParser):
        monkeypatch.setattr(parser, "parse_args", ending(parser.parse_args))
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(cli, "_USER_ERRORS", ())
    monkeypatch.setattr(early, "_check_checkpoint", lambda *_: None)  # those of the reader's fits


def commands_in(text: str) -> Iterator[list[str]]:
    """The single commands of a shell block, as words, without prompts, comments and variables set before them; the
    variable of a loop has its first value."""
    text = re.sub(r"^\$ ", "", text.replace("\\\n", " "), flags=re.MULTILINE)
    for name, first in re.findall(r"^for (\w+) in (\S+)", text, flags=re.MULTILINE):
        text = text.replace(f"${name}", first)
    for line in text.splitlines():
        for part in re.split(r"&&|\|\||[|;](?= )", line):
            words = shlex.split(part, comments=True)
            while words and re.fullmatch(r"\w+=.*", words[0]):
                words = words[1:]
            words = words[: next((at for at, word in enumerate(words) if word in (">", ">>")), None)]
            if words:
                yield words


def ours(words: list[str]) -> tuple[str, list[str]] | None:
    """(module or "swincompress", its arguments) of what a command runs of this repository, maybe by way of torchrun or
    srun."""
    for number, word in enumerate(words):
        if word == "swincompress" and (number == 0 or words[0] in ("srun", "torchrun", "time", "mpirun")):
            return word, words[number + 1 :]
        if word == "-m" and number + 1 < len(words):
            module = words[number + 1]
            if module in ("swincompress_pl", "swincompress_pl.cli"):
                return "swincompress", words[number + 2 :]
            if module.startswith("benchmarks."):
                return module, words[number + 2 :]
    return None


def is_accepted(words: list[str]) -> bool:
    """Whether the parser of what `words` run takes them; True for what is not ours."""
    module, arguments = ours(words) or ("", [])
    if not module or (module == "swincompress" and arguments[:1] in ([], ["--version"], ["--help"])):
        return True
    try:
        if module == "swincompress":
            cli.main(arguments)
        else:
            sys.argv[:] = [module, *arguments]
            runpy.run_module(module, run_name="__main__")
    except Parsed:
        return True
    except SystemExit as end:
        return end.code == 0  # --help
    except ValueError as error:
        print(error)  # beside the failure
    return False


@pytest.mark.parametrize("block", all_blocks(*SHELL), ids=place)
def test_commands_are_accepted(block: Block, folder: Path, parsing_only: None) -> None:
    write_files(block.page, folder)
    for words in commands_in(block.text):
        if block.mark == "not run":  # configs of the reader's own: any will do
            words = [word if not word.endswith(".yaml") or Path(word).exists() else STAND_IN for word in words]
        scripts = [word for word in words if word.endswith(".py")] if words[0].startswith("python") else []
        assert all((folder / script).exists() for script in scripts), f"{block.place}: {scripts}"
        assert is_accepted(words), f"{block.place}: {shlex.join(words)}"


# Configs, C++, data


@pytest.mark.parametrize("block", all_blocks("yaml"), ids=place)
def test_configs_are_accepted(block: Block, folder: Path, parsing_only: None) -> None:
    content = yaml.safe_load(block.text)
    if block.mark == "not run":
        return
    assert content.keys() <= TOP_LEVEL, block.place
    (folder / "block.yaml").write_text(block.text, encoding="utf-8")
    base = [] if {"model", "data"} <= content.keys() else ["-c", STAND_IN]
    with pytest.raises(Parsed):
        cli.main(["fit", *base, "-c", "block.yaml"])


@pytest.mark.parametrize("block", all_blocks("cpp"), ids=place)
def test_cpp_compiles(block: Block, folder: Path) -> None:
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    (folder / "block.cpp").write_text(block.text, encoding="utf-8")
    include = ROOT / "swincompress_pl/accel/csrc/include"
    command = [compiler, "-std=c++17", "-Wall", "-Werror", "-fsyntax-only", f"-I{include}", "block.cpp"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{block.place}: {done.stderr}"


@pytest.mark.parametrize("block", all_blocks("json", "toml"), ids=place)
def test_data_is_data(block: Block) -> None:
    {"json": json.loads, "toml": tomllib.loads}[block.language](block.text)


# The checks themselves


@pytest.mark.parametrize(
    ("source", "wrong"),
    [
        ("from swincompress_pl.quant import quantise", "quantise"),
        ("from swincompress_pl import accel\naccel.exportt(1)", "exportt"),
        ("from swincompress_pl import prune\nprune(n, h, tolerence=1)", "tolerence"),
        ("import swincompress_pl\nswincompress_pl.quantize(n, l, images=3)", "images"),
        ("from swincompress_pl.callbacks import CompressedCheckpoint\nCompressedCheckpoint(monitr='x')", "monitr"),
    ],
)
def test_wrong_names_are_found(source: str, wrong: str) -> None:
    assert wrong in " ".join(wrong_names(source, {}))


def test_right_names_pass() -> None:
    source = "from swincompress_pl.callbacks import CompressedCheckpoint\nCompressedCheckpoint(monitor='x', mode='max')"
    assert not list(wrong_names(source, {}))


@pytest.mark.parametrize(
    "command",
    [
        "swincompress export a.ckpt",
        "swincompress bench model.safetensors --tread 2",
        "CUDA_VISIBLE_DEVICES=0 torchrun -m swincompress_pl.cli fit -c configs/digits_swin.yaml --trainer.epoch_s 3",
        "python -m benchmarks.spiking sped",
    ],
)
def test_wrong_options_are_found(command: str, folder: Path, parsing_only: None) -> None:
    (words,) = commands_in(command)
    assert not is_accepted(words)

"""What is found before torch is imported, the options as plain data, completion, and `python -m swincompress_pl`."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
from lightning.pytorch import Trainer
from support.parsers import parser_of

from swincompress_pl import __version__, cli
from swincompress_pl.cli import completion, options
from swincompress_pl.cli.early import check

REPOSITORY = Path(__file__).resolve().parent.parent
DIGITS = str(REPOSITORY / "configs" / "digits_swin.yaml")
# Runs the command, and fails if anything heavy was imported on the way.
WATCHED = """
import sys
from swincompress_pl.cli import main
code = main(sys.argv[1:])
heavy = {'torch', 'lightning', 'jsonargparse', 'timm'} & set(sys.modules)
assert not heavy, heavy
sys.exit(code)
"""


def test_a_wrong_path_is_found_without_torch(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", WATCHED, "fit", "-c", "gone.yaml"],
        cwd=tmp_path, env={"PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr == f"swincompress: error: fit: -c gone.yaml: there is no such file in {tmp_path}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-c"], "-c names no config"),
        (["-c", str(REPOSITORY / "configs")], "is a folder; name a file in it"),
        (["-c", DIGITS.replace("digits_swin", "digits")], "there are deit_tiny_imagenet.yaml, digits_swin.yaml"),
        ([f"-c{DIGITS}", "--nonsense", "3"], "unknown option --nonsense; see swincompress fit --help"),
        (["--config", DIGITS, "--trainer.max_epoch=3"], "--trainer.max_epoch, did you mean --trainer.max_epochs?"),
        ([f"--config={DIGITS}", "--ckpt_path", "gone.ckpt"], "ckpt_path gone.ckpt: there is no such file in "),
        (["-c", DIGITS, "--trainer.callbacks.tolerance", "2.0"], "the callbacks are a list, and the command line"),
    ],
)
def test_mistakes_in_options(arguments: list[str], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        check("fit", arguments)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("trainer: [", "not YAML"),
        ("- 1", "a YAML mapping with model, data and trainer is expected"),
        ("modle: {}", "unknown key modle, did you mean model?"),
        ("trainer: {max_epoch: 3}", "unknown key trainer.max_epoch, did you mean max_epochs?"),
        ("ckpt_path: gone.ckpt", "ckpt_path gone.ckpt: there is no such file in "),
    ],
)
def test_mistakes_in_a_config(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(content, encoding="utf-8")
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        check("fit", ["-c", str(file)])
    assert message in str(caught.value)


def test_an_estimate_takes_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ckpt_path='last.ckpt': an estimate is for a fit from its beginning"):
        check("estimate", ["-c", DIGITS, "--ckpt_path", "last.ckpt"])


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help", "--nonsense"],
        ["-c", DIGITS, "--ckpt_path", "last", "--model.model", "vit", "--data", "Digits", "--data.help", "Digits"],
        ["-c", DIGITS, "--ckpt_path", "s3://bucket/a.ckpt", "--seed", "3", "--trainer.max_epochs", "-1"],
        ["-c", DIGITS, "--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor", "val/top1"],
        ["-c", "trainer: {max_epochs: 2}", "--trainer", "trainer.yaml", "--print_config"],
    ],
)
def test_what_may_be_right_is_left_to_the_parser(arguments: list[str]) -> None:
    check("fit", arguments)


def test_a_checkpoint_may_be_a_folder_and_lie_beside_its_config(tmp_path: Path) -> None:
    (tmp_path / "sharded.ckpt").mkdir()
    (tmp_path / "config.yaml").write_text("ckpt_path: sharded.ckpt", encoding="utf-8")
    check("fit", ["-c", str(tmp_path / "config.yaml")])


@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_the_options_are_the_parsers(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    there = {
        next(name for name in action.option_strings if name.startswith("--"))
        for action in parser_of(command, monkeypatch)._actions
        if action.option_strings and not action.option_strings[0].startswith(("--trainer.", "--print_shtab"))
    }
    assert set(options.OPTIONS[command]) == there


def test_the_trainers_arguments_are_read_from_its_source() -> None:
    assert options.trainer_arguments() == set(inspect.signature(Trainer).parameters)


@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        (["swincompress", "val"], ["validate"]),
        (["swincompress", "fit", "--ckpt"], ["--ckpt_path"]),
        (["swincompress", "fit", "--trainer.max_ep"], ["--trainer.max_epochs"]),
        (["swincompress", "export", "--model-a"], ["--model-attribute"]),
        (["swincompress", "inspect", "mod"], ["model.safetensors"]),
    ],
)
def test_bash_completes(tmp_path: Path, typed: list[str], completed: list[str]) -> None:
    (tmp_path / "model.safetensors").touch()
    words = " ".join(f'"{word}"' for word in typed)
    lines = f'COMP_WORDS=({words}); COMP_CWORD={len(typed) - 1}; _swincompress; printf "%s\\n" "${{COMPREPLY[@]}}"'
    run = subprocess.run(
        ["bash", "-c", f"{completion.script('bash')}\n{lines}"],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert run.stdout.split() == completed


def test_zsh_runs_the_same_functions() -> None:
    assert completion.script("zsh").endswith(completion.script("bash"))
    assert "bashcompinit" in completion.script("zsh")


def test_the_package_is_the_command() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "swincompress_pl", "--version"], capture_output=True, text=True, check=True
    )
    assert run.stdout == f"swincompress {__version__}\n"

"""Paths of weights and data in a config are relative to its folder, those of outputs to the working directory."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from swincompress_pl import cli
from swincompress_pl.cli.paths import path_arguments, with_absolute_paths

MODULE = """
from pathlib import Path
from lightning import Callback
from swincompress_pl.data import Digits
from swincompress_pl.models import CompressibleClassifier

class Mine(CompressibleClassifier):
    pass

class Mine2(Mine):
    def __init__(self, *, extra: "Path | None" = None, **others) -> None:
        super().__init__(**others)

class Pictures(Digits):
    def __init__(self, folder: str | Path, **others) -> None:
        super().__init__(**others)
        assert Path(folder, "here").is_file()

class Say(Callback):
    def on_train_start(self, trainer, pl_module) -> None:
        print("said")
"""
SWIN = {"img_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 16, "depths": [1], "num_heads": [2]}


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """A config in conf/ with the images beside it, and classes of a module in the working directory."""
    name = f"users_{abs(hash(request.node.name))}"
    (tmp_path / f"{name}.py").write_text(MODULE, encoding="utf-8")
    (tmp_path / "conf" / "images").mkdir(parents=True)
    (tmp_path / "conf" / "images" / "here").touch()
    content: dict[str, Any] = {
        "model": {
            "class_path": f"{name}.Mine",
            "init_args": {"model": "SwinTransformer", "num_classes": 10, "model_kwargs": SWIN},
        },
        "data": {"class_path": f"{name}.Pictures", "init_args": {"folder": "images", "batch_size": 32, "holdout": 60}},
        "trainer": {
            "max_epochs": 1,
            "limit_train_batches": 2,
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": "out",
            "callbacks": [{"class_path": f"{name}.Say"}],
        },
    }
    path = tmp_path / "conf" / "config.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    # As the installed command has it: the working directory is not in sys.path.
    monkeypatch.setattr(sys, "path", [each for each in sys.path if each not in ("", str(tmp_path))])
    monkeypatch.setattr(sys, "argv", ["swincompress"])
    return path


def test_a_fit_of_ones_own_classes_and_its_stored_config(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main(["fit", "-c", "conf/config.yaml"]) == 0
    assert "said" in capsys.readouterr().out
    (stored,) = Path("out").rglob("config.yaml")
    assert yaml.safe_load(stored.read_text("utf-8"))["data"]["init_args"]["folder"] == str(config.parent / "images")
    (checkpoint,) = Path("out").rglob("*.ckpt")
    kind = yaml.safe_load(config.read_text("utf-8"))["model"]["class_path"]
    quantize = ["--quantize", "max", "--images", "16", "--data", "conf/config.yaml", "--model-class", kind]
    assert cli.main(["export", str(checkpoint), "-o", "m.safetensors", "--reference-check", "1", *quantize]) == 0


def test_what_is_printed_starts_a_fit(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        cli.main(["fit", "-c", str(config), "--trainer.logger", "false", "--print_config"])
    assert not leaving.value.code
    printed = capsys.readouterr().out
    Path("printed.yaml").write_text(printed, encoding="utf-8")
    assert yaml.safe_load(printed)["model"]["init_args"]["optimization"]["lr"] == 0.001  # defaults, too
    assert cli.main(["fit", "-c", "printed.yaml"]) == 0


def test_paths_of_the_command_line_are_of_the_working_directory(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (config.parent.parent / "images").mkdir()
    assert cli.main(["fit", "-c", str(config), "--data.folder", "images"]) == 2  # there is no image
    assert ".Pictures: AssertionError" in capsys.readouterr().err


def resolved(config: dict[str, Any], folder: Path, working: Path) -> dict[str, Any]:
    return with_absolute_paths(config, folder, working, "swincompress_pl.models.CompressibleClassifier")


def test_a_path_of_the_working_directory_is_read_with_a_warning(tmp_path: Path) -> None:
    folder, working = tmp_path / "conf", tmp_path / "work"
    (working / "images").mkdir(parents=True)
    block = {"data": {"class_path": "swincompress_pl.data.ImageNetFolder", "init_args": {"root": "images"}}}
    with pytest.warns(UserWarning, match="root: images is not in .*conf, the folder of the config"):
        assert resolved(block, folder, working)["data"]["init_args"] == {"root": str(working / "images")}
    (folder / "images").mkdir(parents=True)
    assert resolved(block, folder, working)["data"]["init_args"] == {"root": str(folder / "images")}


def test_which_paths_are_resolved(tmp_path: Path) -> None:
    (tmp_path / "last.ckpt").touch()
    given = {
        "model": {"init_args": {"model": "vit", "checkpoint_path": "w.pth"}},
        "data": {"class_path": "CIFAR10", "init_args": {"root": "~/a", "cache_dir": "/c", "seed": 3}},
        "trainer": {"default_root_dir": "runs", "callbacks": [{"class_path": "A", "init_args": {"dirpath": "x"}}]},
        "ckpt_path": "last.ckpt",
    }
    found = resolved(given, tmp_path, tmp_path)
    assert found["model"]["init_args"] == {"model": "vit", "checkpoint_path": str(tmp_path / "w.pth")}
    assert found["data"]["init_args"] == {"root": str(Path("~/a").expanduser()), "cache_dir": "/c", "seed": 3}
    assert found["trainer"] == given["trainer"]
    assert found["ckpt_path"] == str(tmp_path / "last.ckpt")
    assert resolved({"ckpt_path": "best"}, tmp_path, tmp_path) == {"ckpt_path": "best"}
    remote = {"data": {"class_path": "CIFAR10", "init_args": {"root": "s3://bucket/a"}}}
    assert resolved(remote, tmp_path, tmp_path) == remote


def test_a_part_of_a_config_is_resolved(tmp_path: Path) -> None:
    part = {"class_path": "swincompress_pl.data.CIFAR10", "init_args": {"root": "a"}}
    assert resolved(part, tmp_path, tmp_path)["init_args"] == {"root": str(tmp_path / "a")}


@pytest.mark.parametrize("name", [None, "Gone", "gone.Gone", "swincompress_pl.callbacks.PrimeSVT", 3])
def test_other_classes_have_no_paths(name: Any) -> None:
    assert path_arguments(name) == set()


def test_inherited_arguments_count(config: Path) -> None:
    name = yaml.safe_load(config.read_text("utf-8"))["model"]["class_path"]
    sys.path.append(str(config.parent.parent))
    assert path_arguments(name) == {"checkpoint_path"}
    assert path_arguments(f"{name}2") == {"checkpoint_path", "extra"}

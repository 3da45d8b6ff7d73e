"""`swincompress estimate`: every part of the fit is there as often as the fit does it, and the arithmetic holds."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]
from lightning import Trainer

from swincompress_pl.cli import USER_ERROR, estimate, main, measured_fit
from swincompress_pl.cli.measured_fit import EpochTime, SearchTime
from swincompress_pl.cli.signals import EndedBySignal, ended_by_signals

CALLBACKS = "swincompress_pl.callbacks"
DEEPER = ("--model.model_kwargs.depths", "[4]")


def config(tmp_path: Path, *callbacks: dict[str, Any], **trainer: Any) -> str:
    network = {"img_size": 32, "patch_size": 8, "window_size": 2, "embed_dim": 16, "depths": [1], "num_heads": [2]}
    settings = {
        "model": {
            "class_path": "swincompress_pl.models.CompressibleClassifier",
            "init_args": {"model": "SwinTransformer", "num_classes": 10, "model_kwargs": network},
        },
        "data": {"class_path": "swincompress_pl.data.Digits", "init_args": {"batch_size": 64}},
        "trainer": {"default_root_dir": str(tmp_path / "runs"), "callbacks": list(callbacks)} | trainer,
    }
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(settings))
    return str(file)


def callback(name: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": f"{CALLBACKS}.{name}", "init_args": arguments}


def test_the_parts_of_a_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rounds = callback("AdaptiveIterativePruning", start_epoch=2, every_n_epochs=3, round_to=1, step=0.3, max_rounds=2)
    quantizer = callback("QuantizationAwareTraining", start_epoch=9, calibration_images=8, method="max")
    keeper = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {}}
    file = config(tmp_path, rounds, quantizer, keeper, max_epochs=12, check_val_every_n_epoch=3)

    assert main(["estimate", "-c", file, "--batches", "2", "--devices", "2", "--json"]) == 0
    shown = capsys.readouterr()
    given = json.loads(shown.out)

    assert [line for line in shown.err.splitlines() if line.startswith("measuring: ")] == [
        "measuring: training, 2 batches",
        "measuring: validation, 2 batches",
        "measuring: a search on 2 of 2 targets",
        "measuring: the exchange to integers on 8 images",
        "measuring: training in integers, 2 batches",
        "measuring: validation in integers, 2 batches",
    ]
    assert {part["name"]: part["times"] for part in given["parts"]} == {
        "training epoch, float": 9,
        "validation, float": 3,
        "pruning round": 2,
        "exchange to integers": 1,
        "training epoch, quantized": 3,
        "validation, quantized": 1,
    }
    assert all(part["seconds"] > 0 for part in given["parts"])
    assert all(part["total_s"] == part["times"] * part["seconds"] / 2 for part in given["parts"])
    assert given["total_s"] == pytest.approx(sum(part["total_s"] for part in given["parts"]))
    assert given["devices"] == 2
    assert given["memory_bytes"] > 100 << 20  # torch alone needs more
    assert not (tmp_path / "runs").exists()  # nothing is written


def test_a_table_for_people(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", "-c", config(tmp_path, max_epochs=1), "--batches", "1"]) == 0
    shown = capsys.readouterr().out
    assert "training epoch, float" in shown
    assert "The whole fit:" in shown
    assert "on 1 device; memory" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--ckpt_path", "last.ckpt"), r"ckpt_path='last.ckpt': an estimate is for a fit from its beginning"),
        (("--trainer.max_epochs", "-1"), r"max_epochs=-1: a fit without an end has no cost"),
    ],
)
def test_what_has_no_estimate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, str], message: str
) -> None:
    file = config(tmp_path, max_epochs=1)
    assert main(["estimate", "-c", file, "--batches", "1", *arguments]) == USER_ERROR
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "epochs", "validations"),
    [
        ({"max_epochs": 4}, 4, 1.0),
        ({"max_epochs": 4, "val_check_interval": 0.25}, 4, 4.0),
        ({"max_epochs": 4, "val_check_interval": 25, "check_val_every_n_epoch": None}, 4, 4.0),
        ({"max_epochs": 4, "val_check_interval": 200, "check_val_every_n_epoch": None}, 4, 0.5),
        ({"max_epochs": 4, "check_val_every_n_epoch": 2}, 4, 0.5),
        ({"max_epochs": 9, "max_steps": 250}, 3, 1.0),
        ({"max_epochs": 9, "max_steps": 250, "accumulate_grad_batches": 2}, 5, 1.0),
    ],
)
def test_epochs_and_validations(settings: dict[str, Any], epochs: int, validations: float) -> None:
    trainer = Trainer(**settings, logger=False, enable_checkpointing=False, accelerator="cpu")
    epoch = EpochTime(training_s=1.0, validation_s=1.0, training_batches=100, validation_batches=10)
    assert estimate._epochs(trainer, epoch) == epochs
    assert estimate._validations(trainer, epoch) == validations


def test_a_search_costs_its_beginning_and_its_targets() -> None:
    assert SearchTime(fixed_s=2.0, target_s=0.5, targets=10, measured=4).total_s == 7.0


@pytest.mark.parametrize(("limit_s", "tried"), [(1e9, [6, 8]), (0.0, [6])])
def test_a_quick_search_is_measured_as_a_whole(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    limit_s: float,
    tried: list[int],
) -> None:
    monkeypatch.setattr(measured_fit, "_WHOLE_SEARCH_S", limit_s)
    file = config(tmp_path, callback("AdaptiveIterativePruning", round_to=1, step=0.3, start_epoch=0), max_epochs=1)
    assert main(["estimate", "-c", file, "--batches", "1", "--json", *DEEPER]) == 0
    shown = capsys.readouterr()
    searches = [line for line in shown.err.splitlines() if "a search" in line]
    assert searches == [f"measuring: a search on {count} of 8 targets" for count in tried]
    (search,) = [part for part in json.loads(shown.out)["parts"] if part["name"] == "pruning round"]
    assert search["detail"] == f"8 targets, {tried[-1]} measured"


# What is being measured -> how often the clock is read in it before the signal comes.
MOMENTS = {"training,": 1, "validation,": 2, "a search": 3, "the exchange": 1, "training in": 2}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("part", MOMENTS)
def test_a_signal_ends_it_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, part: str, number: int
) -> None:
    search = callback("AdaptiveIterativePruning", start_epoch=0, round_to=1, step=0.3)
    quantizer = callback("QuantizationAwareTraining", start_epoch=1, calibration_images=8, method="max")
    said: list[str] = []
    readings: list[int] = []
    read, handlers = measured_fit._now, [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]

    def now() -> float:
        if said and said[-1].startswith(part):
            readings.append(1)
            if len(readings) == MOMENTS[part]:
                os.kill(os.getpid(), number)
        return read()

    monkeypatch.setattr(estimate, "_say", said.append)
    monkeypatch.setattr(measured_fit, "_now", now)
    file = config(tmp_path, search, quantizer, max_epochs=2)
    assert main(["estimate", "-c", file, "--batches", "2", "--json"]) == 128 + number
    shown = capsys.readouterr()
    name = signal.Signals(number).name
    assert shown.out == ""
    assert [line for line in shown.err.splitlines() if "swincompress" in line] == [
        f"swincompress: estimate: ended by {name}; nothing was written"
    ]
    assert len(readings) == MOMENTS[part]  # nothing went on
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_worker_of_a_loader_is_interrupted_as_usual(monkeypatch: pytest.MonkeyPatch) -> None:
    with ended_by_signals(), monkeypatch.context() as patch:
        parent = os.getpid()
        patch.setattr(os, "getpid", lambda: parent + 1)
        with pytest.raises(KeyboardInterrupt):
            os.kill(parent, signal.SIGINT)
        patch.undo()
        with pytest.raises(EndedBySignal):
            os.kill(parent, signal.SIGINT)


def test_other_threads_leave_signals_alone() -> None:
    before, found = signal.getsignal(signal.SIGTERM), list[Any]()

    def run() -> None:
        with ended_by_signals():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [before]

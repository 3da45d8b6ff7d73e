"""SIGTERM ends a search or an exchange inside a fit at once, and leaves what was before; the rest is Lightning's."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning import Callback, LightningModule, Trainer
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.utilities.exceptions import SIGTERMException
from support.qat_cases import Restorable, loader, pruning, qat, trainer

from swincompress_pl import cli
from swincompress_pl.callbacks.pruning import AdaptiveIterativePruning
from swincompress_pl.callbacks.termination import TERMINATED, ended_by_sigterm
from swincompress_pl.history import history_of


class Ended(AdaptiveIterativePruning):
    """Sends itself a SIGTERM after the first step of a search."""

    steps = 0

    def on_step(self, trainer: Trainer, step: Any) -> None:
        self.steps += 1
        os.kill(os.getpid(), signal.SIGTERM)


class Seen(Callback):
    """The state at the exception."""

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.exception = exception
        self.state = {key: value.clone() for key, value in pl_module.state_dict().items()}


def ended() -> Ended:
    options: dict[str, Any] = {"step": 0.25, "round_to": 1, "kinds": ("mlp",), "model_attribute": "backbone"}
    return Ended(tolerance=100.0, start_epoch=0, **options)


def test_a_search_ends_at_once_and_leaves_nothing(tmp_path: Path) -> None:
    module, search, seen = Restorable(), ended(), Seen()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SIGTERMException) as ending:
        trainer(tmp_path, 1, search, seen).fit(module, loader(), loader())
    assert ending.value.code == TERMINATED == 143
    assert search.steps == 1
    assert seen.exception is ending.value
    assert before.keys() == seen.state.keys()
    assert all(torch.equal(before[key], seen.state[key]) for key in before)
    assert history_of(module.backbone) == []
    assert signal.getsignal(signal.SIGTERM) is handler


def test_an_exchange_ends_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, callback = Restorable(), qat()
    exchange = callback._exchange

    def ended_exchange(*given: Any) -> Any:
        exchanged = exchange(*given)
        os.kill(os.getpid(), signal.SIGTERM)
        return exchanged

    monkeypatch.setattr(callback, "_exchange", ended_exchange)
    network = module.backbone
    with pytest.raises(SIGTERMException):
        trainer(tmp_path, 3, callback).fit(module, loader(), loader())
    assert module.backbone is network


class Terminator(Callback):
    """SIGTERM in the middle of an epoch."""

    batches = 0

    def on_train_batch_start(self, *_: Any) -> None:
        self.batches += 1
        os.kill(os.getpid(), signal.SIGTERM)


def test_elsewhere_lightning_ends_the_batch(tmp_path: Path) -> None:
    terminator = Terminator()
    with pytest.raises(SIGTERMException):
        trainer(tmp_path, 1, pruning(start_epoch=5), terminator).fit(Restorable(), loader(), loader())
    assert terminator.batches == 1


@pytest.mark.parametrize("requeued", [False, True])
def test_a_job_that_slurm_requeues_goes_on(requeued: bool) -> None:
    shell = Trainer(logger=False, accelerator="cpu", barebones=True)
    shell._accelerator_connector.cluster_environment = SLURMEnvironment(auto_requeue=requeued)
    noted: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: noted.append(number))
    try:
        if requeued:
            with ended_by_sigterm(shell):
                os.kill(os.getpid(), signal.SIGTERM)
        else:
            with pytest.raises(SIGTERMException), ended_by_sigterm(shell):
                os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert noted == [signal.SIGTERM]  # the handler that was there hears of it in both cases


def in_thread(call: Callable[[], None]) -> None:
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()


def test_other_threads_leave_signals_alone() -> None:
    shell, found = Trainer(logger=False, accelerator="cpu", barebones=True), list[Any]()

    def run() -> None:
        with ended_by_sigterm(shell):
            found.append(signal.getsignal(signal.SIGTERM))

    in_thread(run)
    assert found == [signal.getsignal(signal.SIGTERM)]


def _wait() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_forked_worker_ends_by_the_signal() -> None:
    shell = Trainer(logger=False, accelerator="cpu", barebones=True)
    with ended_by_sigterm(shell):
        worker = multiprocessing.get_context("fork").Process(target=_wait)
        worker.start()
        worker.join(60)
    assert worker.exitcode == -signal.SIGTERM


def test_the_command_says_so_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    size = {"img_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 16, "depths": [2], "num_heads": [2]}
    config = {
        "model": {"init_args": {"model": "SwinTransformer", "num_classes": 10, "model_kwargs": size}},
        "data": {"class_path": "Digits", "init_args": {"batch_size": 32, "holdout": 60}},
        "trainer": {
            "max_epochs": 1,
            "accelerator": "cpu",
            "logger": False,
            "enable_progress_bar": False,
            "default_root_dir": str(tmp_path),
            "callbacks": [
                {"class_path": f"{__name__}.Ended", "init_args": {"tolerance": 99.0, "step": 0.25, "round_to": 1}}
            ],
        },
    }
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["swincompress"])
    assert cli.main(["fit", "-c", str(file)]) == 143
    assert [line for line in capsys.readouterr().err.splitlines() if "swincompress:" in line] == [
        "swincompress: fit: ended by SIGTERM"
    ]

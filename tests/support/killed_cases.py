"""Fits that are killed (SIGKILL) at a random moment and resumed by the same script until they end."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import socket
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, Dataset

from support.callback_cases import Plain, largest_first, make_trainer, noise, trained
from support.ddp_cases import ddp
from support.qat_cases import Plain as Quantizable
from support.qat_cases import loader as quantizable_loader
from support.qat_cases import qat
from support.rank_cases import digest
from support.spiking_cases import small_spikformer
from swincompress_pl.callbacks import AdaptiveIterativePruning, PrimeSVT
from swincompress_pl.checkpoint.holder import network_of
from swincompress_pl.history import history_of

EPOCHS = 3
PATIENCE_S = 300.0  # of a fit that hangs: a failure
_CONTEXT = multiprocessing.get_context("fork")
# Some decisions are rejected: with a tolerance of 100 points nothing would hang on what was restored.
_SEARCH: dict[str, Any] = {"tolerance": 3.0, "max_images": 30, "criterion": largest_first, "step": 0.25}


def _spiking() -> LightningModule:
    module = Plain(small_spikformer)
    for part in module.net.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            nn.init.constant_(part.bias, 2.0)
    return module


def _primesvt() -> PrimeSVT:
    return PrimeSVT(tolerance=100.0, min_memory_saving=0.0, rates=(0.1, 0.25), round_to=1, start_epoch=1)


Kind = tuple[Callable[[], LightningModule], Callable[[], list[Callback]], Callable[[], Dataset[Any]], str]
_digits: Callable[[], Dataset[Any]] = lambda: quantizable_loader().dataset  # noqa: E731
_noise: Callable[[], Dataset[Any]] = lambda: noise(64)  # noqa: E731
KINDS: dict[str, Kind] = {
    "structured": (lambda: trained(noise(64)), lambda: [AdaptiveIterativePruning(**_SEARCH)], _noise, "net"),
    "weights": (
        lambda: trained(noise(64)),
        lambda: [AdaptiveIterativePruning(**_SEARCH, granularity="weight")],
        _noise,
        "net",
    ),
    "QAT": (Quantizable, lambda: [qat(method="searched", distillation=0.5)], _digits, "backbone"),
    "both": (
        Quantizable,
        lambda: [AdaptiveIterativePruning(**_SEARCH, model_attribute="backbone"), qat(method="searched")],
        _digits,
        "backbone",
    ),
    "PrimeSVT": (_spiking, lambda: [_primesvt()], _noise, "net"),
}


def fit(kind: str, folder: Path, world_size: int, *, every_step: bool = False) -> str:
    """A hash of all that has to be equal in the end; goes on from the last checkpoint in `folder`.

    every_step: a file is written after each step as well, so that kills come in the middle of it; nothing resumes from
    that, as Lightning begins the epoch's data again in the middle of one.
    """
    build, callbacks, images, attribute = KINDS[kind]
    torch.manual_seed(0)
    module, ours = build(), callbacks()
    torch.manual_seed(7)
    last = folder / "last.ckpt"
    saving = [ModelCheckpoint(folder, "{epoch}", save_last=True, save_top_k=-1, save_on_train_epoch_end=True)]
    if every_step:
        saving.append(ModelCheckpoint(folder / "steps", "{step}", every_n_train_steps=1, save_top_k=1))
    strategy = {"strategy": ddp()} if world_size > 1 else {}
    trainer = make_trainer(folder, EPOCHS, *ours, *saving, devices=world_size, num_sanity_val_steps=0, **strategy)
    trainer.fit(
        module,
        DataLoader(images(), 16 // world_size, shuffle=True),
        DataLoader(images(), 16),
        ckpt_path=last if last.exists() else None,
    )
    # A fit that was killed behind its last epoch has nothing left to validate, so the score is taken again.
    (score,) = trainer.validate(module, DataLoader(images(), 16), verbose=False)
    return digest(
        [
            dict(module.state_dict()),
            [optimizer.state_dict() for optimizer in trainer.optimizers],
            history_of(network_of(module, attribute)),
            [_found(callback) for callback in ours],
            float(score["val/top1"]),  # what PrimeSVT logs, it logs in the epoch of its search
        ]
    )


def _found(callback: Any) -> Any:
    """A search without what it took, which hangs on how often it was begun."""
    found = getattr(callback, "search_state", None) or getattr(callback, "result", None)
    return None if found is None else {**found.to_dict(), "elapsed_s": 0.0, "scoring": {}}


@dataclass(frozen=True)
class Moment:
    """`delay_s` after the checkpoint of so many epochs is there; of 0 epochs, after the start."""

    epochs: int
    delay_s: float


def checkpoint_of(folder: Path, epochs: int) -> Path:
    """What `fit` writes after so many epochs."""
    return folder / f"epoch={epochs - 1}.ckpt"


def run(folder: Path, world_size: int, work: Callable[[], str], kill_at: Moment | None = None) -> list[str] | None:
    """What `work` gives on every rank, each a process; None if they were killed before all had ended.

    Raises RuntimeError with the traceback of the first rank that failed.
    """
    ends = [folder / f"end{rank}" for rank in range(world_size)]
    for end in ends:
        end.unlink(missing_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [
        _CONTEXT.Process(target=_rank, args=(rank, world_size, port, work, folder)) for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    limit, armed = time.monotonic() + PATIENCE_S, kill_at is None
    while any(process.is_alive() for process in processes) and time.monotonic() < limit:
        if not armed and kill_at is not None and (not kill_at.epochs or checkpoint_of(folder, kill_at.epochs).exists()):
            limit, armed = time.monotonic() + kill_at.delay_s, True
        time.sleep(0.002)
    for process in processes:
        if process.is_alive() and process.pid is not None:
            os.kill(process.pid, signal.SIGKILL)
    for process in processes:
        process.join()
    for error in sorted(folder.glob("error*")):
        raise RuntimeError(f"{error.name}: {error.read_text()}")
    if kill_at is not None and not all(end.exists() for end in ends):
        return None
    return [end.read_text() for end in ends]


def _rank(rank: int, world_size: int, port: int, work: Callable[[], str], folder: Path) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank)}
    os.environ |= {"NODE_RANK": "0", "WORLD_SIZE": str(world_size)}
    torch.set_num_threads(1)
    try:
        found = work()
        (folder / f"part{rank}").write_text(found)
        (folder / f"part{rank}").rename(folder / f"end{rank}")
    except BaseException:
        (folder / f"error{rank}").write_text(traceback.format_exc())
    finally:
        os._exit(0)  # the parent's exit handlers are not ours


class Cell:
    """One kind of fit on so many processes, with how it ends when nobody kills it."""

    def __init__(self, kind: str, world_size: int, folder: Path) -> None:
        self.kind, self.world_size, self.folder = kind, world_size, folder
        start = time.monotonic()
        self.end = self._run(folder / "whole", False, None)
        written = [checkpoint_of(folder / "whole", epochs).stat().st_mtime for epochs in range(1, EPOCHS + 1)]
        begun = time.time() - (time.monotonic() - start)
        self.parts_s = [later - earlier for earlier, later in pairwise([begun, *written])]
        self.kills_after_a_checkpoint = 0

    def _run(self, folder: Path, every_step: bool, kill_at: Moment | None) -> list[str] | None:
        folder.mkdir(parents=True, exist_ok=True)
        return run(
            folder,
            self.world_size,
            lambda: fit(self.kind, folder, self.world_size, every_step=every_step),
            kill_at,
        )

    def resumed_equal(self, seed: int, most_kills: int = 2) -> tuple[int, bool]:
        """Kill a fit once or more at moments that `seed` says, resume it each time; (how many kills, equal ends).

        AssertionError where a kill leaves a checkpoint that cannot be read.
        """
        rng = random.Random(seed)
        folder, every_step = self.folder / f"killed-{seed}", bool(seed % 2)
        kills = 0
        while kills < most_kills:
            done = sum(checkpoint_of(folder, epochs).exists() for epochs in range(1, EPOCHS + 1))
            epochs = rng.randrange(done, max(done + 1, EPOCHS))
            part_s = self.parts_s[0 if epochs == done else epochs]  # a resumed fit has its beginning as well
            found = self._run(folder, every_step, Moment(epochs if epochs > done else 0, rng.uniform(0, part_s)))
            if found is not None:  # it was faster
                return kills, found == self.end
            kills += 1
            checkpoints = [torch.load(path, weights_only=True)["epoch"] for path in folder.rglob("*.ckpt")]
            self.kills_after_a_checkpoint += bool(checkpoints)
            if rng.random() < 0.6:
                break
        return kills, self._run(folder, every_step, None) == self.end

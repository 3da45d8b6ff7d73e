"""A fit that is killed (SIGKILL) and resumed ends, to the bit, where an uninterrupted one ends.

`python tests/test_callbacks_killed.py 50` kills 50 times, at random moments of every kind of fit.
"""

from __future__ import annotations

import copy
import functools
import logging
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from support.callback_cases import (
    Plain,
    assert_same_state,
    greedy,
    largest_first,
    make_trainer,
    noise,
    search_of,
    trained,
)
from support.killed_cases import KINDS, Cell
from support.rank_cases import call_for_kill, killed
from torch.utils.data import DataLoader

from swincompress_pl.callbacks.pruning import AdaptiveIterativePruning
from swincompress_pl.pruning import Step
from swincompress_pl.pruning.structure.apply import history_of

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]
EPOCHS = 3
# Of the sampled decisions some are rejected: with a tolerance of 100 points nothing would hang on what was restored.
MASKS: dict[str, Any] = {"tolerance": 3.0, "max_images": 30, "criterion": largest_first, "granularity": "weight"}
STRUCTURED = {**MASKS, "granularity": "structured", "step": 0.5}


def killed_in_round(number: int, flag: Path, **options: Any) -> AdaptiveIterativePruning:
    """Is killed when round `number` has tried a few steps."""
    callback = greedy(**options)

    def on_step(trainer: Trainer, step: Step) -> None:
        if step.round == number and step.target.startswith("blocks.1"):
            call_for_kill(flag)

    callback.on_step = on_step  # type: ignore[method-assign]  # a class of another name would have another state
    return callback


class KilledAfterEpoch(Callback):
    """Is killed between epochs, after the checkpoint was written: callbacks that save run last in the hook before."""

    def __init__(self, flag: Path, epoch: int) -> None:
        self.flag, self.epoch = flag, epoch

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == self.epoch + 1:
            call_for_kill(self.flag)


class KilledInEpoch(Callback):
    """Is killed in the middle of an epoch."""

    def __init__(self, flag: Path, epoch: int) -> None:
        self.flag, self.epoch = flag, epoch

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.current_epoch == self.epoch:
            call_for_kill(self.flag)


@functools.cache
def _module() -> Plain:
    return trained(noise(64), steps=40)


def fit(folder: Path, callback: AdaptiveIterativePruning, *others: Callback, ckpt_path: Path | None = None) -> Any:
    """Everything that has to be equal in the end; the fit shuffles and drops out."""
    module = copy.deepcopy(_module())
    module.net.blocks[0].mlp.drop1.p = 0.3
    torch.manual_seed(7 if ckpt_path is None else 99)  # another process begins with other numbers
    save = ModelCheckpoint(folder, "{epoch}", save_last=True, save_top_k=-1, save_on_train_epoch_end=True)
    trainer = make_trainer(folder, EPOCHS, *others, callback, save)
    trainer.fit(module, DataLoader(noise(64), 16, shuffle=True), DataLoader(noise(64), 16), ckpt_path=ckpt_path)
    (optimizer,) = trainer.optimizers
    return {
        "weights and masks": dict(module.state_dict()),
        "optimizer": optimizer.state_dict(),
        "schedule": trainer.lr_scheduler_configs[0].scheduler.state_dict(),
        "search": search_of(callback),
        "history": history_of(module.net),
        "random numbers": torch.get_rng_state(),
    }


@pytest.fixture(scope="module", params=[STRUCTURED, MASKS], ids=["structured", "weight"])
def uninterrupted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """The options, and how a fit with them ends."""
    end = fit(tmp_path_factory.mktemp("whole"), greedy(**request.param))
    assert {step["accepted"] for step in end["search"]["steps"]} == {True, False}
    return request.param, end


def resume(folder: Path, options: dict[str, Any], epochs_done: int) -> Any:
    """Go on from last.ckpt, which is whole and of the epoch that was finished last."""
    checkpoint = torch.load(folder / "last.ckpt", weights_only=True)
    assert checkpoint["epoch"] == epochs_done - 1
    assert len(list(folder.glob("*.ckpt"))) == epochs_done + 1  # nothing half-written beside it
    return fit(folder, greedy(**options), ckpt_path=folder / "last.ckpt")


def test_killed_inside_a_round(tmp_path: Path, uninterrupted: tuple[Any, Any]) -> None:
    options, end = uninterrupted
    folder = tmp_path / "run"
    killed(tmp_path, lambda flag: fit(folder, killed_in_round(2, flag, **options)))
    assert_same_state(resume(folder, options, 1), end)


@pytest.mark.parametrize("epoch", [0, 1])
def test_killed_between_epochs(tmp_path: Path, uninterrupted: tuple[Any, Any], epoch: int) -> None:
    options, end = uninterrupted
    folder = tmp_path / "run"
    killed(tmp_path, lambda flag: fit(folder, greedy(**options), KilledAfterEpoch(flag, epoch)))
    assert_same_state(resume(folder, options, epoch + 1), end)


def test_killed_inside_an_epoch(tmp_path: Path, uninterrupted: tuple[Any, Any]) -> None:
    """Its round is done again, and the epoch."""
    options, end = uninterrupted
    folder = tmp_path / "run"
    killed(tmp_path, lambda flag: fit(folder, greedy(**options), KilledInEpoch(flag, 2)))
    assert_same_state(resume(folder, options, 2), end)


@pytest.mark.slow
def test_killed_twice(tmp_path: Path, uninterrupted: tuple[Any, Any]) -> None:
    options, end = uninterrupted
    folder, last = tmp_path / "run", tmp_path / "run" / "last.ckpt"
    killed(tmp_path / "1", lambda flag: fit(folder, greedy(**options), KilledInEpoch(flag, 1)))
    killed(tmp_path / "2", lambda flag: fit(folder, greedy(**options), KilledInEpoch(flag, 2), ckpt_path=last))
    assert_same_state(resume(folder, options, 2), end)


# At random moments


CELLS = [(kind, world_size) for kind in KINDS for world_size in (1, 2)]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize(("kind", "world_size"), CELLS)
def test_killed_at_a_random_moment(tmp_path: Path, kind: str, world_size: int) -> None:
    _, equal = Cell(kind, world_size, tmp_path).resumed_equal(CELLS.index((kind, world_size)), most_kills=1)
    assert equal


def kill_at_random(kills: int, folder: Path) -> bool:
    """So many kills, in turn of every kind; prints the figures of each."""
    done, fits, all_equal, start = 0, 0, True, time.monotonic()
    while done < kills:
        for kind, world_size in CELLS:
            cell = Cell(kind, world_size, folder / f"{kind}-{world_size}-{fits}")
            mine, equal = 0, 0
            for seed in range(fits, fits + REPEATED):
                killed_so_often, is_equal = cell.resumed_equal(seed)
                mine, equal = mine + killed_so_often, equal + is_equal
            fits, done = fits + REPEATED, done + mine
            all_equal = all_equal and equal == REPEATED
            print(
                f"{kind}, {world_size} processes: {mine} kills, {cell.kills_after_a_checkpoint} of them with a "
                f"checkpoint; {equal} of {REPEATED} fits end equal",
                flush=True,
            )
            if done >= kills:
                break
    print(f"{done} kills of {fits} fits in {time.monotonic() - start:.0f} s; all end equal: {all_equal}")
    return all_equal


REPEATED = 4  # fits of a kind that are compared with one that nobody kills

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(not kill_at_random(int(sys.argv[1]), Path(folder)))

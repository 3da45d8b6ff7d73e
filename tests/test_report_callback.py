"""Figures reach the loggers that take them, once a round, and the page is written when the fit ends."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger
from matplotlib.figure import Figure
from support.loggers import Calls, Recording
from support.report_cases import search_data
from torch import nn

from swincompress_pl.report import callback as module
from swincompress_pl.report.callback import PruningFigures, log_figures
from swincompress_pl.report.plots.pruning import pruning_figures


class Search(lightning.Callback):
    """A search that has its rounds at the ends of some epochs."""

    def __init__(self, epochs: dict[int, int], **config: Any) -> None:
        self.epochs, self.config = epochs, SimpleNamespace(**config)
        self.search_state: Any = None

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        rounds = self.epochs.get(trainer.current_epoch)
        if rounds is not None:
            steps = [step for step in search_data()["steps"] if step["round"] <= rounds]
            data = search_data() | {"rounds": rounds, "steps": steps}
            self.search_state = SimpleNamespace(to_dict=lambda: data)


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(2, 2)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss: torch.Tensor = self.net(batch).sum()
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(torch.ones(4, 2), batch_size=2)  # type: ignore[arg-type]


def fit(tmp_path: Path, callbacks: list[Any], logger: Any, epochs: int = 4, **options: Any) -> lightning.Trainer:
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=callbacks,
        logger=logger,
        default_root_dir=tmp_path,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        **options,
    )
    trainer.fit(Module())
    return trainer


@pytest.fixture(scope="module")
def figures() -> dict[str, Figure]:
    return {f"pruning/{name}": figure for name, figure in pruning_figures(search_data()).items()}


def test_every_kind_of_logger_gets_them_in_its_way(figures: dict[str, Figure]) -> None:
    tensorboard, mlflow, comet, wandb = (
        Calls("add_figure"),
        Calls("log_figure"),
        Calls("log_figure"),
        Calls("log_image"),
    )
    loggers = [
        Recording(tensorboard),
        Recording(mlflow, run_id="r1"),
        Recording(comet),
        Recording(None, log_image=wandb.log_image),  # type: ignore[attr-defined]
    ]
    assert log_figures(loggers, figures, 7) == ["Recording"] * 4
    tag, figure = next(iter(figures.items()))
    assert tensorboard.calls[0] == ((tag, figure), {"global_step": 7, "close": False})
    assert mlflow.calls[0] == (("r1", figure, "pruning/sparsity/00000007.png"), {})
    assert comet.calls[0] == ((), {"figure_name": tag, "figure": figure, "step": 7})
    (_, image), *_ = wandb.calls
    assert image["key"] == tag
    assert image["step"] == 7
    assert image["images"][0].dtype == np.uint8
    assert all(len(calls.calls) == 3 for calls in (tensorboard, mlflow, comet, wandb))


def test_loggers_that_take_no_images_are_left_alone(tmp_path: Path, figures: dict[str, Figure]) -> None:
    assert log_figures([CSVLogger(tmp_path), DummyLogger(), Recording()], figures, 1) == []


def test_other_ranks_log_nothing(figures: dict[str, Figure], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.rank_zero_only, "rank", 1)
    tensorboard = Calls("add_figure")
    assert log_figures([Recording(tensorboard)], figures, 1) == []
    assert tensorboard.calls == []


def test_tensorboard_gets_each_round_once(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logger = TensorBoardLogger(tmp_path, name="tb")
    fit(tmp_path, [Search({0: 1, 2: 2}), PruningFigures()], logger, enable_checkpointing=False)
    events = accumulator.EventAccumulator(logger.log_dir, size_guidance={"images": 0}).Reload()
    assert set(events.Tags()["images"]) == {f"pruning/{name}" for name in ("sparsity", "accuracy_size", "sensitivity")}
    images = events.Images("pruning/sparsity")
    assert [image.step for image in images] == [2, 6]  # two steps per epoch
    assert images[0].encoded_image_string.startswith(b"\x89PNG")


def test_the_last_round_is_logged_whatever_the_order(tmp_path: Path) -> None:
    tensorboard = Calls("add_figure")
    fit(tmp_path, [PruningFigures(), Search({3: 1})], Recording(tensorboard), enable_checkpointing=False)
    assert [args[0] for args, _ in tensorboard.calls] == [
        "pruning/sparsity", "pruning/accuracy_size", "pruning/sensitivity",
    ]  # fmt: skip


def test_the_page_is_written_when_the_fit_ends(tmp_path: Path) -> None:
    callbacks = [Search({1: 2}, tolerance=1.5), PruningFigures(tmp_path / "pages")]
    fit(tmp_path, callbacks, False, enable_checkpointing=False)
    text = (tmp_path / "pages" / "pruning.html").read_text(encoding="utf-8")
    assert "73.50 points, 1.5 may be lost" in text
    assert "tolerance, 1.5 points" in text


def test_without_a_round_there_is_no_page(tmp_path: Path) -> None:
    fit(tmp_path, [Search({}), PruningFigures(tmp_path / "pages")], False, enable_checkpointing=False)
    assert not (tmp_path / "pages").exists()


def test_a_resumed_fit_logs_no_round_again(tmp_path: Path) -> None:
    first, second = Calls("add_figure"), Calls("add_figure")
    search = Search({0: 1, 2: 2})
    trainer = fit(tmp_path, [search, PruningFigures()], Recording(first), epochs=2)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    resumed = lightning.Trainer(
        max_epochs=4, accelerator="cpu", callbacks=[search, PruningFigures()], logger=Recording(second),
        default_root_dir=tmp_path, enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1,
    )  # fmt: skip
    resumed.fit(Module(), ckpt_path=tmp_path / "last.ckpt")
    assert [call[1]["global_step"] for call in first.calls] == [2, 2, 2]
    assert [call[1]["global_step"] for call in second.calls] == [6, 6, 6]


def test_a_logger_without_images_is_named_once(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="CSVLogger takes no figures; add a TensorBoardLogger") as caught:
        fit(tmp_path, [Search({0: 1, 1: 2}), PruningFigures()], CSVLogger(tmp_path), enable_checkpointing=False)
    assert sum("takes no figures" in str(warning.message) for warning in caught) == 1


@pytest.mark.parametrize(("searches", "names"), [(0, "none"), (2, "Search, Search")])
def test_it_needs_one_search(tmp_path: Path, searches: int, names: str) -> None:
    trainer = SimpleNamespace(callbacks=[PruningFigures(), *(Search({}) for _ in range(searches))], current_epoch=0)
    with pytest.raises(ValueError, match=f"search_state.*this trainer has {names}$"):
        PruningFigures().setup(trainer, Module(), "fit")  # type: ignore[arg-type]


def test_a_file_is_no_directory_for_the_page(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match=r"name a directory for pruning\.html"):
        fit(tmp_path, [Search({}), PruningFigures(tmp_path / "file")], False, enable_checkpointing=False)


def test_a_state_of_another_version_is_named() -> None:
    with pytest.raises(ValueError, match="version 9, but 1 is expected"):
        PruningFigures().load_state_dict({"version": 9})

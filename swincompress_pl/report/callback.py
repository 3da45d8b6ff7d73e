"""The plots of a pruning search in the loggers of a fit, and its page when the fit is over."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from swincompress_pl.pruning import PrimeSVTConfig
from swincompress_pl.report.plots.drawing import to_rgb
from swincompress_pl.report.plots.primesvt import primesvt_figures, save_primesvt_figures
from swincompress_pl.report.plots.pruning import pruning_figures
from swincompress_pl.report.record import RunRecord
from swincompress_pl.report.write import write_html

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE_FILE = "pruning.html"
_STATE_VERSION = 1
Write = Callable[[str, "Figure", int], object]


def log_figures(loggers: Iterable[Logger], figures: Mapping[str, Figure], step: int) -> list[str]:
    """Logs figures to every logger that takes images.

    These are TensorBoard and any logger whose experiment has `add_figure(tag, figure, global_step=)`, Weights & Biases
    (`log_image`), MLflow (`log_figure` with a run id, as files `<tag>/<step>.png`) and Comet (`log_figure`). Others,
    such as CSVLogger, get nothing. On ranks other than zero nothing is logged.

    Args:
        loggers: Lightning loggers, such as `trainer.loggers`.
        figures: Matplotlib figures by tag.
        step: The step that they belong to, such as `trainer.global_step`.

    Returns:
        Class names of the loggers that took the figures; empty on ranks other than zero.
    """
    if getattr(rank_zero_only, "rank", 0) != 0:
        return []
    took = []
    for logger in loggers:
        write = _writer(logger)
        if write is None:
            continue
        for tag, figure in figures.items():
            write(tag, figure, step)
        took.append(type(logger).__name__)
    return took


class PruningFigures(Callback):
    """Logs the plots of a pruning search after each of its rounds, and writes them to files when the fit ends.

    The trainer needs exactly one callback that searches: `AdaptiveIterativePruning`, `PrimeSVT`, or one of your own
    with a `search_state` that has `to_dict()`. The figures are `<tag>/sparsity`, `<tag>/accuracy_size` and
    `<tag>/sensitivity`. Those of PrimeSVT are `<tag>/curves` or `<tag>/robustness`, depending on its policy,
    `<tag>/accuracy_memory` and `<tag>/spike_rates`. `log_figures` lists the loggers that take them; if none does, a
    warning says so once. A resumed fit does not log a round again. Only rank zero logs and writes.

    Args:
        save_dir: Folder for pruning.html, or for `primesvt-*.png` of PrimeSVT; it is made if needed. None writes
            nothing.
        tag: First part of the figures' names.

    Raises:
        ValueError: At the start of a fit, if the trainer has no callback that searches, or several.
        NotADirectoryError: At the start of a fit, if `save_dir` is a file.
    """

    def __init__(self, save_dir: str | Path | None = None, *, tag: str = "pruning") -> None:
        self.save_dir = None if save_dir is None else Path(save_dir)
        self.tag = tag
        self._rounds_logged = 0
        self._warned = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Checks `save_dir` and the trainer's callbacks before the first epoch."""
        if stage != "fit":
            return
        if self.save_dir is not None and self.save_dir.exists() and not self.save_dir.is_dir():
            raise NotADirectoryError(f"save_dir={self.save_dir} is a file; name a directory for {PAGE_FILE}")
        _searching(trainer)
        if trainer.current_epoch == 0:  # a fresh fit; a resumed one loads its state after this hook
            self._rounds_logged = 0

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs the figures if there was a new round."""
        self._log(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs what the last epoch added, and writes the files."""
        self._log(trainer)
        callback = _searching(trainer)
        if self.save_dir is None or not trainer.is_global_zero:
            return
        if _is_primesvt(callback):
            if callback.result is not None:
                save_primesvt_figures(callback.result, self.save_dir)
            return
        search = search_data_of(callback)
        if search is None:
            return
        record = RunRecord(name="Pruning search")
        record.add_pruning(search)
        write_html(record, self.save_dir / PAGE_FILE)

    def state_dict(self) -> dict[str, Any]:
        """Returns the number of rounds that are logged."""
        return {"version": _STATE_VERSION, "rounds_logged": self._rounds_logged}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the number of rounds that are logged.

        Args:
            state_dict: What `state_dict()` gave.

        Raises:
            ValueError: If the state is of another version.
        """
        if state_dict.get("version") != _STATE_VERSION:
            raise ValueError(
                f"the state of PruningFigures has version {state_dict.get('version')!r}, but {_STATE_VERSION} is "
                "expected; resume with the version of swincompress_pl that wrote the checkpoint"
            )
        self._rounds_logged = int(state_dict["rounds_logged"])

    def _log(self, trainer: Trainer) -> None:
        rounds, draw = _drawn(_searching(trainer))
        if rounds <= self._rounds_logged:
            return
        self._rounds_logged = rounds
        if not trainer.is_global_zero or not trainer.loggers:
            return
        if all(_writer(logger) is None for logger in trainer.loggers):
            self._warn(trainer.loggers)
            return
        figures = {f"{self.tag}/{name}": figure for name, figure in draw().items()}
        log_figures(trainer.loggers, figures, trainer.global_step)

    def _warn(self, loggers: Iterable[Logger]) -> None:
        if not self._warned and not all(isinstance(logger, DummyLogger) for logger in loggers):
            names = ", ".join(type(logger).__name__ for logger in loggers)
            rank_zero_warn(f"PruningFigures: {names} takes no figures; add a TensorBoardLogger, or set save_dir")
        self._warned = True


def searches_of(trainer: Trainer) -> list[Any]:
    """The callbacks of a trainer that search."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by the trainer
    return [each for each in callbacks if hasattr(each, "search_state") or _is_primesvt(each)]


def _searching(trainer: Trainer) -> Any:
    found = searches_of(trainer)
    if len(found) != 1:
        names = ", ".join(type(callback).__name__ for callback in found) or "none"
        raise ValueError(
            "PruningFigures draws the search of one callback with a search_state, such as AdaptiveIterativePruning, or "
            f"of one PrimeSVT; give the trainer exactly one of them; this trainer has {names}"
        )
    return found[0]


def _is_primesvt(callback: Any) -> bool:
    """Recognizes PrimeSVT by its settings, because this room must not import callbacks."""
    return isinstance(getattr(callback, "config", None), PrimeSVTConfig)


def _drawn(callback: Any) -> tuple[int, Callable[[], dict[str, Figure]]]:
    """The number of rounds so far, and how to draw them; PrimeSVT has one round."""
    if _is_primesvt(callback):
        result = callback.result
        return (0, dict) if result is None else (1, lambda: primesvt_figures(result))
    search = search_data_of(callback)
    return (0, dict) if search is None else (int(search["rounds"]), lambda: pruning_figures(search))


def search_data_of(callback: Any) -> dict[str, Any] | None:
    """The search as plain data, with the tolerance of its callback; None before it has begun."""
    if callback.search_state is None:
        return None
    search: dict[str, Any] = callback.search_state.to_dict()
    tolerance = getattr(getattr(callback, "config", None), "tolerance", None)
    return search if tolerance is None else search | {"tolerance": tolerance}


def _writer(logger: Logger) -> Write | None:
    """How this logger takes a figure, by the methods that it and its experiment have; so subclasses work too."""
    if isinstance(logger, DummyLogger):  # of fast_dev_run: it has every method and does nothing
        return None
    if callable(getattr(logger, "log_image", None)):
        return lambda tag, figure, step: logger.log_image(key=tag, images=[to_rgb(figure)], step=step)  # type: ignore[attr-defined]
    experiment: Any = getattr(logger, "experiment", None)
    if callable(getattr(experiment, "add_figure", None)):
        return lambda tag, figure, step: experiment.add_figure(tag, figure, global_step=step, close=False)
    if not callable(getattr(experiment, "log_figure", None)):
        return None
    run_id = getattr(logger, "run_id", None)
    if run_id is not None:
        return lambda tag, figure, step: experiment.log_figure(run_id, figure, f"{tag}/{step:08d}.png")
    return lambda tag, figure, step: experiment.log_figure(figure_name=tag, figure=figure, step=step)

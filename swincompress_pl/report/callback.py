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
    """Gives {tag: figure} to every logger that takes images, and returns the class names of those that got them.

    TensorBoard and everything else whose experiment has `add_figure(tag, figure, global_step=)`; Weights & Biases
    (`log_image`); MLflow (`log_figure` with a run id; files <tag>/<step>.png); Comet (`log_figure`). Others, such as
    CSVLogger, get nothing and are not in the list. On other ranks than zero nothing happens and the list is empty.
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
    """Logs the plots of a pruning search after each of its rounds, and writes them as a page when the fit ends.

    save_dir: where pruning.html goes (made if need be), of PrimeSVT primesvt-*.png, None for neither. tag: what the
    figures' names begin with: <tag>/sparsity, <tag>/accuracy_size, <tag>/sensitivity, of PrimeSVT <tag>/curves or
    <tag>/robustness (by its policy), <tag>/accuracy_memory, <tag>/spike_rates.

    It stands in a fit beside one callback that has a `search_state` with `to_dict()`, as `AdaptiveIterativePruning`
    has, or beside one `PrimeSVT`; at the start of a fit with none or several it raises ValueError, and
    NotADirectoryError where save_dir is a file. A resumed fit does not log a round again. Loggers: see `log_figures`;
    when none takes images, a warning says so once. Only rank zero logs and writes.
    """

    def __init__(self, save_dir: str | Path | None = None, *, tag: str = "pruning") -> None:
        self.save_dir = None if save_dir is None else Path(save_dir)
        self.tag = tag
        self._rounds_logged = 0
        self._warned = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work before the first epoch is spent."""
        if stage != "fit":
            return
        if self.save_dir is not None and self.save_dir.exists() and not self.save_dir.is_dir():
            raise NotADirectoryError(f"save_dir={self.save_dir} is a file; name a directory for {PAGE_FILE}")
        _searching(trainer)
        if trainer.current_epoch == 0:  # a fresh fit; a resumed one loads its state after this hook
            self._rounds_logged = 0

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the figures if a round has been since."""
        self._log(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what the last epoch added, and write the page."""
        self._log(trainer)
        callback = _searching(trainer)
        if self.save_dir is None or not trainer.is_global_zero:
            return
        if _is_primesvt(callback):
            if callback.result is not None:
                save_primesvt_figures(callback.result, self.save_dir)
            return
        search = _search_of(callback)
        if search is None:
            return
        record = RunRecord(name="Pruning search")
        record.add_pruning(search)
        write_html(record, self.save_dir / PAGE_FILE)

    def state_dict(self) -> dict[str, Any]:
        """How far it has logged."""
        return {"version": _STATE_VERSION, "rounds_logged": self._rounds_logged}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on after the rounds that are logged."""
        if state_dict.get("version") != _STATE_VERSION:
            raise ValueError(
                f"the state of PruningFigures has version {state_dict.get('version')!r}, {_STATE_VERSION} is expected"
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


def _searching(trainer: Trainer) -> Any:
    found = [each for each in _callbacks(trainer) if hasattr(each, "search_state") or _is_primesvt(each)]
    if len(found) != 1:
        names = ", ".join(type(callback).__name__ for callback in found) or "none"
        raise ValueError(
            "PruningFigures draws the search of one callback with a search_state, such as AdaptiveIterativePruning, or "
            f"of one PrimeSVT; this trainer has {names}"
        )
    return found[0]


def _callbacks(trainer: Trainer) -> list[Callback]:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by the trainer
    return callbacks


def _is_primesvt(callback: Any) -> bool:
    """By its settings, as callbacks stand above reports."""
    return isinstance(getattr(callback, "config", None), PrimeSVTConfig)


def _drawn(callback: Any) -> tuple[int, Callable[[], dict[str, Figure]]]:
    """How many rounds there were, PrimeSVT's being one, and their figures."""
    if _is_primesvt(callback):
        result = callback.result
        return (0, dict) if result is None else (1, lambda: primesvt_figures(result))
    search = _search_of(callback)
    return (0, dict) if search is None else (int(search["rounds"]), lambda: pruning_figures(search))


def _search_of(callback: Any) -> dict[str, Any] | None:
    """The search as plain data with its callback's tolerance; None before it has begun."""
    if callback.search_state is None:
        return None
    search: dict[str, Any] = callback.search_state.to_dict()
    tolerance = getattr(getattr(callback, "config", None), "tolerance", None)
    return search if tolerance is None else search | {"tolerance": tolerance}


def _writer(logger: Logger) -> Write | None:
    """How this logger takes a figure, by what it and its experiment offer, so that subclasses are served, too."""
    if isinstance(logger, DummyLogger):  # a trainer's with fast_dev_run: it has every method and does nothing
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

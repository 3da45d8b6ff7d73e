"""Loggers that remember what they were given."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.loggers import Logger


class Recording(Logger):
    """A logger of any kind: `experiment` and whatever else the case needs."""

    def __init__(self, experiment: Any = None, **attributes: Any) -> None:
        super().__init__()
        self._experiment = experiment
        vars(self).update(attributes)

    @property
    def experiment(self) -> Any:
        return self._experiment

    @property
    def name(self) -> str:
        return "recording"

    @property
    def version(self) -> int:
        return 0

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...

    def log_metrics(self, *args: Any, **kwargs: Any) -> None: ...


class Calls:
    """Remembers how the one method of that name was called."""

    def __init__(self, method: str) -> None:
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        setattr(self, method, lambda *args, **kwargs: self.calls.append((args, kwargs)))

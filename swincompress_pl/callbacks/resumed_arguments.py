"""Compares a callback's arguments with those of the fit that is resumed: each change takes effect, or is refused.

What has shaped the network or the search (a granularity, bits) cannot change any more; limits (a tolerance, a number of
rounds) can. Before the callback has changed the network, every argument may change. The arguments are in the callback's
state. Files of versions that did not store them are not compared.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, is_dataclass
from os import PathLike, fspath
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from swincompress_pl.arguments import shown
from swincompress_pl.stored_data import from_plain


@dataclass(frozen=True, kw_only=True)
class ResumedArguments:
    """Which arguments of a callback are settled once it has changed the network, and which stay free.

    Attributes:
        settled: Names of arguments that a resumed fit must not change.
        free: Names of all other arguments.
        because: What has settled them, as a clause for the message, after "and".
    """

    settled: Collection[str]
    free: Collection[str]
    because: str

    def take_up(self, callback_name: str, before: Any, now: Mapping[str, Any]) -> None:
        """Refuses a change of a settled argument, and logs changes of free ones.

        Args:
            callback_name: Name of the callback, for messages.
            before: The arguments of the fit that is resumed, from its checkpoint, as `stored` returned them.
            now: The present arguments, as `stored` returns them.

        Raises:
            ValueError: If a settled argument has changed; the message shows both values.
        """
        before = from_plain(Mapping[str, Any], before, f"the arguments in the state of {callback_name}")
        changed = [name for name in before if name in now and before[name] != now[name]]
        for name in changed:
            if name in self.settled:
                raise ValueError(
                    f"{callback_name}: {name}={shown(now[name])}, but the fit that is resumed had "
                    f"{name}={shown(before[name])}, and {self.because}. Resume with the old value, or from an "
                    "earlier checkpoint"
                )
        if changed:
            told = ", ".join(f"{name}={shown(now[name])} (it was {shown(before[name])})" for name in changed)
            rank_zero_info(f"{callback_name} goes on with {told}")


def stored(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments as plain data for a checkpoint, loaded with `weights_only=True`; functions become their names."""
    return {name: _plain(value) for name, value in arguments.items()}


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if is_dataclass(value) and not isinstance(value, type):
        own = {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
        return {type(value).__name__: own}
    if isinstance(value, PathLike):
        return fspath(value)
    return str(getattr(value, "__qualname__", type(value).__qualname__))

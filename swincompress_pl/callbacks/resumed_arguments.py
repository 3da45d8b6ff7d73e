"""What becomes of a callback's arguments in a fit that is resumed by another script: each takes effect, or is refused.

What has shaped the network or the search (a granularity, bits) cannot be changed any more; limits (a tolerance, a
number of rounds) can. Before anything has happened every argument may be another. The arguments stand in the callback's
state; files of versions that did not store them are taken as they are.
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
    """Which arguments of a callback are settled once it has changed the network, and which go on being free.

    Every argument stands in one of the two. because: what has settled them, after "and".
    """

    settled: Collection[str]
    free: Collection[str]
    because: str

    def take_up(self, callback_name: str, before: Any, now: Mapping[str, Any]) -> None:
        """ValueError for a settled argument that was another `before`; those that take effect are said.

        before: what `stored` gave for the fit that is resumed, as its checkpoint has it; now: for this one.
        """
        before = from_plain(Mapping[str, Any], before, f"the arguments in the state of {callback_name}")
        changed = [name for name in before if name in now and before[name] != now[name]]
        for name in changed:
            if name in self.settled:
                raise ValueError(
                    f"{callback_name}: {name}={shown(now[name])}, but the fit that is resumed had "
                    f"{name}={shown(before[name])}, and {self.because}. Resume with the old value, or from a "
                    "checkpoint of before"
                )
        if changed:
            told = ", ".join(f"{name}={shown(now[name])} (it was {shown(before[name])})" for name in changed)
            rank_zero_info(f"{callback_name} goes on with {told}")


def stored(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments as data that a checkpoint holds and weights_only loads: functions are their names."""
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

"""Which units stay: names and integers, which can be applied to another network of the same architecture."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from swincompress_pl.pruning.structure.groups import Group, validate_units
from swincompress_pl.stored_data import from_plain

PLAN_VERSION = 1


@dataclass(frozen=True, repr=False)
class PruningPlan:
    """The unit indices that stay in each group; a group that is not named keeps all of its units.

    A plan is true if it names any group.

    Attributes:
        kept: Maps a group's name to the unit indices that stay, sorted, without repeats and not empty.
        units: Maps a group's name to its number of units before pruning. `apply_plan` refuses a network of another
            width. None, or a group left out, for any width.

    Raises:
        ValueError: If indices are empty, unsorted, repeated or out of range, or `units` has a group that `kept` lacks.
    """

    kept: Mapping[str, tuple[int, ...]]
    units: Mapping[str, int] | None = None

    def __post_init__(self) -> None:
        kept = {name: _checked(name, indices) for name, indices in self.kept.items()}
        units = {} if self.units is None else dict(self.units)
        for name, count in units.items():
            if not _is_int(count) or (name in kept and kept[name][-1] >= count):
                raise ValueError(f"{name}: {count!r} units, but the plan keeps unit {kept.get(name, (0,))[-1]}")
        if not units.keys() <= kept.keys():
            raise ValueError(
                f"units are given for groups that the plan does not name: {sorted(units.keys() - kept.keys())}"
            )
        object.__setattr__(self, "kept", kept)
        object.__setattr__(self, "units", units)

    def __hash__(self) -> int:
        return hash(tuple(sorted(self.kept.items())))

    def __repr__(self) -> str:
        units, stay = self.units or {}, sum(map(len, self.kept.values()))
        before = f" of {sum(units.values()):,}" if self.kept.keys() == units.keys() else ""
        return f"PruningPlan({len(self.kept)} groups, {stay:,}{before} units stay)"

    def __bool__(self) -> bool:
        """Whether any group is named."""
        return bool(self.kept)

    @classmethod
    def identity(cls) -> PruningPlan:
        """Returns the plan that removes nothing."""
        return cls({})

    @classmethod
    def removing(cls, groups: Iterable[Group], removed: Mapping[str, Iterable[int]]) -> PruningPlan:
        """Makes the plan that removes some units.

        Args:
            groups: The groups of the network.
            removed: Maps a group's name to the unit indices to remove.

        Returns:
            The plan; groups of which nothing is removed are not in it.

        Raises:
            ValueError: If a group is unknown, or units are repeated, out of range, or all of the group's.
        """
        by_name = {group.name: group for group in groups}
        kept, units = {}, {}
        for name, indices in removed.items():
            group = find_group(by_name, name)
            gone = set(validate_units(group, indices, "the removed units"))
            if gone:
                kept[name] = tuple(u for u in range(group.units) if u not in gone)
                units[name] = group.units
        return cls(kept, units)

    def then(self, later: PruningPlan) -> PruningPlan:
        """Joins two plans into one.

        Args:
            later: A plan for the network that this plan leaves.

        Returns:
            The plan that does what both do one after the other.

        Raises:
            ValueError: If the later plan keeps a unit that this one removed.
        """
        kept, units = dict(self.kept), dict(self.units or {})
        for name, indices in later.kept.items():
            if name not in kept:
                kept[name] = indices
                if later.units and name in later.units:
                    units[name] = later.units[name]
                continue
            if indices[-1] >= len(kept[name]):
                raise ValueError(
                    f"{name}: the later plan keeps unit {indices[-1]}, the earlier one left {len(kept[name])}"
                )
            kept[name] = tuple(kept[name][u] for u in indices)
        return PruningPlan(kept, units)

    def to_dict(self) -> dict[str, Any]:
        """Returns the plan in JSON types; `from_dict` is the inverse.

        The form is `{"version": 1, "groups": {name: {"kept": [...], "units": n or None}}}`.
        """
        units = self.units or {}
        groups = {name: {"kept": list(kept), "units": units.get(name)} for name, kept in self.kept.items()}
        return {"version": PLAN_VERSION, "groups": groups}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PruningPlan:
        """Rebuilds a plan.

        Args:
            data: What `to_dict` gave, also after a way through JSON.

        Returns:
            The plan.

        Raises:
            ValueError: If the plan is of another version or damaged.
        """
        if not isinstance(data, Mapping) or data.get("version") != PLAN_VERSION:
            found = data.get("version") if isinstance(data, Mapping) else type(data).__name__
            raise ValueError(
                f"a pruning plan of version {PLAN_VERSION} is expected, not {found!r}; update swincompress_pl"
            )
        groups = data.get("groups")
        if not isinstance(groups, Mapping) or not all(isinstance(g, Mapping) and "kept" in g for g in groups.values()):
            raise ValueError(
                "a pruning plan needs 'groups': {name: {'kept': [...], 'units': n}}; the stored one is damaged"
            )
        kept = {name: from_plain(tuple[int, ...], g["kept"], f"groups[{name!r}].kept") for name, g in groups.items()}
        return cls(kept, {name: g["units"] for name, g in groups.items() if g.get("units") is not None})


def find_group(groups: Mapping[str, Group], name: str) -> Group:
    """`groups[name]`; a ValueError that lists the known groups if there is none."""
    if name not in groups:
        known = ", ".join(list(groups)[:6]) + (", ..." if len(groups) > 6 else "")
        raise ValueError(f"{name!r} is no pruning group of this network; its {len(groups)} groups are {known}")
    return groups[name]


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _checked(name: str, indices: Sequence[int]) -> tuple[int, ...]:
    kept = tuple(indices)
    if not isinstance(name, str) or not name:
        raise ValueError(f"a plan's groups are named by strings, not {name!r}")
    if not all(_is_int(u) for u in kept):
        raise ValueError(f"{name}: kept units are integers, not {kept[:8]!r}")
    if not kept:
        raise ValueError(f"{name}: the plan keeps no unit; at least one has to stay")
    if kept[0] < 0 or any(a >= b for a, b in pairwise(kept)):
        raise ValueError(f"{name}: kept units are sorted, without repeats and at least 0, not {kept[:8]!r}")
    return kept

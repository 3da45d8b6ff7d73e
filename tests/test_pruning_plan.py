"""Plans are data: validated, stored, replayed, composed."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swincompress_pl.pruning import Group, PruningPlan
from swincompress_pl.pruning.structure.groups import Slice

_names = st.text(min_size=1, max_size=8)
_kept = st.lists(st.integers(0, 60), min_size=1, unique=True).map(sorted).map(tuple)


def _group(units: int) -> Group:
    return Group(name="g", kind="mlp", units=units, slices=(Slice(tensor="w", axis=0, consumer=True),))


@given(kept=st.dictionaries(_names, _kept), with_units=st.booleans())
def test_round_trip_through_json(kept: dict[str, tuple[int, ...]], with_units: bool) -> None:
    plan = PruningPlan(kept, dict.fromkeys(kept, 61) if with_units else None)
    again = PruningPlan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again == plan
    assert hash(again) == hash(plan)


@given(st.data())
def test_then_is_one_after_the_other(data: st.DataObject) -> None:
    units = data.draw(st.integers(1, 30))
    first = data.draw(st.lists(st.integers(0, units - 1), min_size=1, unique=True).map(sorted))
    second = data.draw(st.lists(st.integers(0, len(first) - 1), min_size=1, unique=True).map(sorted))
    both = PruningPlan({"g": first}, {"g": units}).then(
        PruningPlan({"g": second, "h": (0,)}, {"g": len(first), "h": 2})
    )
    assert both.kept == {"g": tuple(first[i] for i in second), "h": (0,)}
    assert both.units == {"g": units, "h": 2}


def test_identity_is_neutral() -> None:
    plan = PruningPlan({"g": (0, 2)}, {"g": 3})
    assert PruningPlan.identity().then(plan) == plan == plan.then(PruningPlan.identity())
    assert not PruningPlan.identity()


def test_removing_names_only_what_changes() -> None:
    plan = PruningPlan.removing([_group(4)], {"g": [2]})
    assert (plan.kept, plan.units) == ({"g": (0, 1, 3)}, {"g": 4})
    assert PruningPlan.removing([_group(4)], {"g": []}) == PruningPlan.identity()


@pytest.mark.parametrize(
    ("kept", "units", "message"),
    [
        ({"g": ()}, None, "g: the plan keeps no unit"),
        ({"g": (1, 1)}, None, "g: kept units are sorted, without repeats"),
        ({"g": (2, 1)}, None, "g: kept units are sorted"),
        ({"g": (-1,)}, None, "at least 0"),
        ({"g": (0.5,)}, None, "g: kept units are integers"),
        ({"g": (True,)}, None, "g: kept units are integers"),
        ({"": (0,)}, None, "named by strings"),
        ({"g": (3,)}, {"g": 3}, "g: 3 units, but the plan keeps unit 3"),
        ({"g": (0,)}, {"h": 3}, r"does not name: \['h'\]"),
    ],
)
def test_malformed_plans_are_refused(
    kept: dict[str, tuple[int, ...]], units: dict[str, int] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        PruningPlan(kept, units)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"version": 2, "groups": {}}, "version 1 is expected, not 2"),
        ([], "not 'list'"),
        ({"version": 1}, "is damaged"),
        ({"version": 1, "groups": {"g": {"units": 3}}}, "is damaged"),
        ({"version": 1, "groups": {"g": {"kept": [], "units": 3}}}, "keeps no unit"),
    ],
)
def test_malformed_stored_plans_are_refused(data: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PruningPlan.from_dict(data)  # type: ignore[arg-type]


def test_unknown_group_and_unit_are_refused() -> None:
    with pytest.raises(ValueError, match="'x' is no pruning group of this network; its 1 groups are g"):
        PruningPlan.removing([_group(4)], {"x": [0]})
    with pytest.raises(ValueError, match="g: the removed units name units 4"):
        PruningPlan.removing([_group(4)], {"g": [4]})
    with pytest.raises(ValueError, match="the later plan keeps unit 2, the earlier one left 2"):
        PruningPlan({"g": (0, 1)}).then(PruningPlan({"g": (2,)}))

"""The arguments of the pruning callbacks are the fields of their configs, typed; a config can be passed instead."""

from __future__ import annotations

import dataclasses
import inspect
import warnings
from typing import Any

import pytest

from swincompress_pl.callbacks import AdaptiveIterativePruning, PrimeSVT
from swincompress_pl.pruning import AdaptivePruningConfig, PrimeSVTConfig, PrioritizedPolicy

CALLBACKS: list[tuple[type[Any], type[Any]]] = [
    (AdaptiveIterativePruning, AdaptivePruningConfig),
    (PrimeSVT, PrimeSVTConfig),
]


@pytest.mark.parametrize(("callback", "config"), CALLBACKS)
def test_every_field_of_the_config_is_a_typed_argument_with_its_default(callback: Any, config: Any) -> None:
    arguments = inspect.signature(callback).parameters
    assert not [p for p in arguments.values() if p.kind is inspect.Parameter.VAR_KEYWORD]
    for field in dataclasses.fields(config):
        argument = arguments[field.name]
        assert argument.annotation is not inspect.Parameter.empty
        made = callback(**{field.name: argument.default})
        assert getattr(made.config, field.name) == getattr(config(), field.name)
    assert callback().config == config()


@pytest.mark.parametrize(("callback", "config"), CALLBACKS)
def test_a_config_takes_their_place_and_nothing_contradicts_it(callback: Any, config: Any) -> None:
    given = config(tolerance=2.0, layers=["blocks.*"])
    assert callback(config=given).config is given
    assert callback(config=given, start_epoch=3).start_epoch == 3
    with pytest.raises(TypeError, match=r"config= is given, and round_to beside it; .*replace\(config, round_to=4\)"):
        callback(config=given, round_to=4)
    with pytest.raises(TypeError, match="unexpected keyword argument 'rounds'"):
        callback(rounds=4)


@pytest.mark.parametrize("make", [callback for callback, _ in CALLBACKS] + [config for _, config in CALLBACKS])
def test_a_tolerance_is_in_points(make: Any) -> None:
    with pytest.warns(UserWarning, match="tolerance=0.01 means 0.01 points, 0.0001 as a fraction; for 1 points give"):
        make(tolerance=0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(tolerance=0.1)


def test_the_warning_stands_at_the_callers_line() -> None:
    for make in (AdaptivePruningConfig, PrimeSVTConfig):
        with pytest.warns(UserWarning, match="means 0.01 points") as caught:
            make(tolerance=0.01)
        assert caught[0].filename == __file__


def test_the_papers_search_is_a_config() -> None:
    callback = PrimeSVT(config=PrimeSVTConfig.paper(), start_epoch=2)
    assert isinstance(callback.config.policy, PrioritizedPolicy)
    with pytest.raises(TypeError, match="config= is given, and policy beside it"):
        PrimeSVT(config=PrimeSVTConfig.paper(), policy="prioritized")

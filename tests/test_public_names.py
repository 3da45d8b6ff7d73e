"""What a room shows to those who look: the names that users call."""

from __future__ import annotations

import importlib

import pytest


@pytest.mark.parametrize("room", ["accel", "callbacks", "data", "models", "pruning", "quant", "report"])
def test_a_room_shows_what_users_call(room: str) -> None:
    module = importlib.import_module(f"swincompress_pl.{room}")
    assert dir(module) == sorted(module.__all__)
    assert all(hasattr(module, name) for name in module.__all__)

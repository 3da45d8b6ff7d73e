"""What holds for all families: they are announced under the names that their networks have, and cost nothing before."""

from __future__ import annotations

import subprocess
import sys
from pkgutil import resolve_name

import pytest

from swincompress_pl import registry
from swincompress_pl.models.spiking.adapter import SpikingAdapter


def test_importing_models_and_listing_families_does_not_import_spikingjelly() -> None:
    code = (
        "import sys, swincompress_pl.models, swincompress_pl.callbacks\n"
        "from swincompress_pl import registry\n"
        "assert {'Meta-SpikeFormer', 'E-SpikeFormer'} <= set(registry.families())\n"
        "sys.exit('spikingjelly' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def _announced_by_name() -> list[tuple[str, SpikingAdapter]]:
    list(registry.families())
    return [
        (key, adapter)
        for key, adapter in registry._adapters.items()
        if isinstance(key, str) and isinstance(adapter, SpikingAdapter)
    ]


def test_our_own_families_are_announced_by_name() -> None:
    names = {name.rpartition(":")[2] for name, _ in _announced_by_name()}
    assert {"Spikformer", "MetaSpikeFormer", "ESpikeFormer"} <= names


@pytest.mark.parametrize(("name", "adapter"), _announced_by_name())
def test_a_family_that_is_announced_by_name_is_there(name: str, adapter: SpikingAdapter) -> None:
    network_type = resolve_name(name)
    assert f"{network_type.__module__}:{network_type.__qualname__}" == name
    assert callable(resolve_name(adapter._groups))
    assert callable(resolve_name(adapter._graph))

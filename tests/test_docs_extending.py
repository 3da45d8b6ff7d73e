"""docs/how-to/add_a_family.md: the family that it adds, file by file, passes the checks that it gives."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from swincompress_pl import registry

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r'^```python title="([^"]+)"\n(.*?)^```$', re.MULTILINE | re.DOTALL)


def test_the_family_of_the_walk_passes_its_checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = dict(BLOCK.findall((ROOT / "docs/how-to/add_a_family.md").read_text(encoding="utf-8")))
    parts = {f"patch_mlp/{part}.py" for part in ("network", "groups", "graph", "adapter")}
    assert files.keys() == parts | {"test_patch_mlp.py"}
    (tmp_path / "patch_mlp").mkdir()
    (tmp_path / "patch_mlp/__init__.py").touch()
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    list(registry.families())  # so that all others are there already
    monkeypatch.setattr(registry, "_adapters", dict(registry._adapters))

    checks = importlib.import_module("test_patch_mlp")
    for name in checks.GROUPS:
        checks.test_masked_is_sliced(name)
    checks.test_graph_is_the_network()
    checks.test_integers_are_the_reference()
    network, *_ = checks.network_and_images()
    adapter = registry.adapter_for(network)
    assert sorted(group.name for group in adapter.groups(network)) == sorted(checks.GROUPS)
    assert all(network.get_submodule(name) is not None for name in adapter.segments(network))


def test_the_folders_that_the_walk_names_are_there() -> None:
    models = ROOT / "swincompress_pl/models"
    for family in ("swin", "vit", "spiking", "meta_spikeformer"):
        assert {"adapter.py", "groups.py", "graph.py"} <= {file.name for file in (models / family).iterdir()}

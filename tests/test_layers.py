"""Who may import whom: lower rooms never import higher ones, and the engine runs without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "swincompress_pl"
ALLOWED: dict[str, set[str]] = {
    "registry": set(),
    "spec": set(),
    "data": set(),
    "pruning": {"registry"},
    "quant": {"registry", "spec"},
    "checkpoint": {"pruning", "quant"},
    "models": {"registry", "pruning", "quant", "checkpoint"},
    "accel": {"spec"},
    "callbacks": {"pruning", "quant", "models", "checkpoint"},
    "report": {"spec", "accel", "pruning", "models"},
}


def rooms_imported_by(file: Path) -> set[str]:
    """The rooms of this package that a module imports, anywhere in it, absolutely or relatively."""
    found = set()
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(parts[: len(parts) - node.level]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            names = [module, *(f"{module}.{alias.name}" for alias in node.names)]
        for name in names:
            head, _, rest = name.partition(".")
            if (head == "swincompress_pl" and rest and (PACKAGE / rest.split(".")[0]).exists()) or (
                head == "swincompress_pl" and (PACKAGE / f"{rest.split('.')[0]}.py").exists() and rest
            ):
                found.add(rest.split(".")[0])
    return found


@pytest.mark.parametrize("room", ALLOWED)
def test_a_room_imports_only_what_is_below_it(room: str) -> None:
    files = sorted((PACKAGE / room).rglob("*.py")) or [PACKAGE / f"{room}.py"]
    assert files[0].exists()
    for file in files:
        higher = rooms_imported_by(file) - ALLOWED[room] - {room, "_deprecated"}
        assert higher == set(), f"{file.relative_to(PACKAGE)} imports {higher}"


def test_any_room_may_know_old_names_and_they_know_no_room() -> None:
    assert rooms_imported_by(PACKAGE / "_deprecated.py") == set()


def test_the_table_covers_every_room() -> None:
    rooms = {entry.name for entry in PACKAGE.iterdir() if entry.is_dir() and any(entry.glob("*.py"))}
    assert rooms - {"cli"} == set(ALLOWED) - {"registry"}


@pytest.mark.parametrize(
    "module", ["swincompress_pl", "swincompress_pl.spec", "swincompress_pl.accel", "swincompress_pl.report.worker"]
)
def test_importing_it_loads_no_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'lightning' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_no_test_imports_another() -> None:
    """What tests share is in tests/support."""
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        tree = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        imports = [node for node in tree if isinstance(node, ast.Import | ast.ImportFrom)]
        named = {node.module or "" for node in imports if isinstance(node, ast.ImportFrom)}
        named |= {alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names}
        assert not {name for name in named if name.startswith("test_")}, file.name

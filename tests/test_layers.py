"""Who may import whom: lower rooms never import higher ones, and the engine runs without torch."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from swincompress_pl import report

PACKAGE = Path(__file__).resolve().parent.parent / "swincompress_pl"
ALLOWED: dict[str, set[str]] = {
    "registry": set(),
    "history": set(),
    "interrupts": set(),
    "evaluation_mode": {"interrupts"},
    "layer_types": set(),
    "files": set(),
    "printable": set(),
    "pictures": set(),
    "summaries": {"printable"},
    "progress": set(),
    "dependencies": set(),
    "hub_errors": set(),
    "text_table": set(),
    "masks": set(),
    "arguments": set(),
    "structure": set(),
    "stored_data": {"arguments"},
    "spec": set(),
    "data": {"files", "pictures", "progress"},
    "pruning": {
        "registry",
        "history",
        "interrupts",
        "evaluation_mode",
        "layer_types",
        "masks",
        "arguments",
        "stored_data",
        "files",
        "summaries",
        "progress",
    },
    "quant": {
        "registry",
        "history",
        "interrupts",
        "evaluation_mode",
        "layer_types",
        "masks",
        "arguments",
        "pictures",
        "progress",
        "text_table",
        "spec",
        "summaries",
    },
    "checkpoint": {"files", "interrupts", "stored_data", "registry", "history", "structure", "pruning", "quant"},
    "models": {
        "arguments",
        "stored_data",
        "registry",
        "history",
        "structure",
        "hub_errors",
        "layer_types",
        "pictures",
        "pruning",
        "quant",
        "checkpoint",
    },
    "accel": {"spec", "files", "pictures", "printable", "summaries"},
    "interop": {"spec", "files"},
    "callbacks": {
        "arguments",
        "stored_data",
        "history",
        "interrupts",
        "evaluation_mode",
        "pruning",
        "quant",
        "models",
        "checkpoint",
    },
    "report": {
        "arguments",
        "history",
        "evaluation_mode",
        "spec",
        "accel",
        "interop",
        "pruning",
        "quant",
        "checkpoint",
        "models",
        "files",
        "printable",
        "summaries",
    },
    "hub": {
        "files",
        "history",
        "hub_errors",
        "pictures",
        "accel",
        "quant",
        "checkpoint",
        "models",
        "report",
    },
}


# Rooms inside a room: each may import those in its set, and nothing else of the room.
INSIDE: dict[str, dict[str, set[str]]] = {
    "pruning": {
        "structure": set(),
        "evaluation": set(),
        "criteria": {"structure", "evaluation"},
        "compensation": {"structure", "evaluation"},
        "space": {"structure", "evaluation", "criteria", "compensation"},
        "adaptive": {"structure", "evaluation", "criteria", "compensation", "space"},
        "prime": {"structure", "evaluation", "criteria", "compensation", "space"},
    },
}


def _module_of(file: Path) -> str:
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {_module_of(file): file for file in sorted([*PACKAGE.rglob("*.py"), *PACKAGE.rglob("*.pyi")])}


def modules_imported_by(module: str) -> set[str]:
    """The modules of this package that a module imports, anywhere in it, type-only and relative imports included."""
    found = set()
    file = FILES[module]
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            base = ".".join(parents[: len(parents) - node.level + 1]) if node.level else ""
            origin = ".".join(part for part in (base, node.module) if part)
            names = [f"{origin}.{alias.name}" for alias in node.names]
        for name in names:
            while name and name not in FILES:
                name = name.rpartition(".")[0]
            found.add(name)
    return found - {"", module}


IMPORTS = {module: modules_imported_by(module) for module in FILES}


def rooms_imported_by(file: Path) -> set[str]:
    """The rooms of this package that a module imports."""
    return {name.split(".")[1] for name in IMPORTS[_module_of(file)] if "." in name}


def circles(arrows: dict[str, set[str]]) -> list[set[str]]:
    """The largest sets of nodes that all lead to one another."""
    reached: dict[str, set[str]] = {}
    for start in arrows:
        seen, waiting = set[str](), [start]
        while waiting:
            for other in arrows.get(waiting.pop(), set()) - seen:
                seen.add(other)
                waiting.append(other)
        reached[start] = seen
    found: list[set[str]] = []
    for node, others in reached.items():
        circle = {other for other in others if node in reached.get(other, set())}
        if circle and circle not in found:
            found.append(circle)
    return found


def _inside(room: str) -> dict[str, set[str]]:
    """{file or folder of the room: those that it imports}."""
    units: dict[str, set[str]] = {}
    for module, imported in IMPORTS.items():
        parts = module.split(".")
        if parts[1:2] == [room] and len(parts) > 2:
            others = {name.split(".")[2] for name in imported if name.startswith(f"{PACKAGE.name}.{room}.")}
            units.setdefault(parts[2], set()).update(others - {parts[2]})
    return units


def test_no_circle_of_imports() -> None:
    assert circles(IMPORTS) == []


def test_a_circle_is_found() -> None:
    arrows = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set(), "e": {"a"}}
    assert circles(arrows) == [{"b", "c"}]


@pytest.mark.parametrize("room", sorted({*ALLOWED, "cli"} - {"registry"}))
def test_no_circle_between_the_folders_of_a_room(room: str) -> None:
    assert circles(_inside(room)) == []


@pytest.mark.parametrize("room", INSIDE)
def test_rooms_inside_a_room_stand_in_a_line(room: str) -> None:
    found = _inside(room)
    assert found.keys() == INSIDE[room].keys()
    for part, imported in found.items():
        assert imported <= INSIDE[room][part], part


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
    assert rooms - {"cli"} == {room for room in ALLOWED if (PACKAGE / room).is_dir()}


@pytest.mark.parametrize(
    "module",
    [
        "swincompress_pl",
        "swincompress_pl.spec",
        "swincompress_pl.accel",
        "swincompress_pl.hub",
        "swincompress_pl.hub.remote",
        "swincompress_pl.report.comparison.bench",
        "swincompress_pl.report.comparison.worker",
        "swincompress_pl.report.content.numbers",
    ],
)
def test_importing_it_loads_no_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'lightning' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_package_offers_its_five_functions_without_torch() -> None:
    """`load` runs where torch cannot be imported; the others bring it."""
    code = """
import sys
sys.modules["torch"] = sys.modules["lightning"] = None  # importing them fails
import swincompress_pl
assert callable(swincompress_pl.load) and callable(swincompress_pl.export)
assert set(swincompress_pl.__all__) <= set(dir(swincompress_pl))
engine = swincompress_pl.load(sys.argv[1], threads=1)
import numpy
print(engine(numpy.zeros((1, *engine.input_shape), numpy.uint8)).shape)
"""
    artifact = Path(__file__).parent / "golden" / "0.1" / "vit.safetensors"
    ran = subprocess.run([sys.executable, "-c", code, str(artifact)], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout.strip()) == (0, "(1, 4)"), ran.stderr


def test_the_five_functions_are_those_of_their_rooms() -> None:
    import swincompress_pl
    from swincompress_pl import accel, pruning, quant

    found = (swincompress_pl.prune, swincompress_pl.primesvt, swincompress_pl.quantize)
    assert found == (pruning.prune, pruning.primesvt, quant.quantize)
    assert (swincompress_pl.export, swincompress_pl.load) == (accel.export, accel.load)
    with pytest.raises(AttributeError, match="has no attribute 'shrink'"):
        _ = swincompress_pl.shrink


def test_pruning_shows_what_users_call() -> None:
    from swincompress_pl import pruning

    assert dir(pruning) == sorted(pruning.__all__)
    assert len(pruning.__all__) < 30


def test_what_the_report_offers_is_what_type_checkers_see() -> None:
    tree = ast.parse((PACKAGE / "report" / "__init__.py").read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module != "typing"]
    seen = {alias.name: f"{node.module}" for node in imports for alias in node.names if alias.name != "annotations"}
    found = {name: getattr(report, name) for name in report.__all__}
    assert seen.keys() == found.keys() == set(dir(report))
    assert all(getattr(importlib.import_module(seen[name]), name) is thing for name, thing in found.items())


ENGINE = {"kernels": set(), "program": {"kernels"}, "artifact": {"kernels", "program"},
          "engine": {"kernels", "program", "artifact", "swincompress"}}  # fmt: skip


@pytest.mark.parametrize("folder", ENGINE)
def test_folders_of_the_engine_know_those_below(folder: str) -> None:
    """As accel/csrc/README.md has it."""
    files = [file for file in sorted((PACKAGE / "accel" / "csrc" / folder).rglob("*")) if file.is_file()]
    assert len(files) > 3
    for file in files:
        included = re.findall(r'#include "(\w+)/', file.read_text(encoding="utf-8"))
        assert set(included) <= ENGINE[folder] | {folder}, file.name


def test_no_test_imports_another() -> None:
    """What tests share is in tests/support."""
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        tree = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        imports = [node for node in tree if isinstance(node, ast.Import | ast.ImportFrom)]
        named = {node.module or "" for node in imports if isinstance(node, ast.ImportFrom)}
        named |= {alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names}
        assert not {name for name in named if name.startswith("test_")}, file.name

"""Tests an installed wheel: the engine's tests and the commands for artifacts, against the package in site-packages.

    python .ci/test_wheel.py

Needs numpy, safetensors, pytest and hypothesis, and no other package. The tests are copied into a folder without
sources. Those that need torch, or compile the sources, are left out.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ARTIFACT = ROOT / "tests" / "golden" / "0.1" / "vit.safetensors"
# what tests need beside the package: torch or timm in the file or in what it imports, or the C++ sources
_NEEDS_MORE = re.compile(r"^(import torch|from (timm|PIL|support\.(quant_cases|kernel_case_files)))\b", re.MULTILINE)


def copied_tests(to: Path) -> list[str]:
    """Copies the tests into `to`; returns the files to run."""
    shutil.copytree(ROOT / "tests", to / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", to)  # the marks
    (to / "docs" / "reference").mkdir(parents=True)
    shutil.copy(ROOT / "docs" / "reference" / "functions.md", to / "docs" / "reference")  # its examples are tests
    files = sorted([*(to / "tests").glob("test_accel_*.py"), *(to / "tests").glob("test_spec_*.py")])
    return [str(file) for file in files if not _NEEDS_MORE.search(file.read_text(encoding="utf-8"))]


def run(command: list[str], folder: str, **more: str) -> None:
    """Runs a command in a folder; exits as it does if it fails."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    print("==", *(part if len(part) < 60 else "..." for part in command), flush=True)
    code = subprocess.run(command, cwd=folder, env=kept | more, check=False).returncode
    if code:
        sys.exit(code)


def main() -> None:
    """Runs everything."""
    with tempfile.TemporaryDirectory() as folder:
        where = (
            "import pathlib, swincompress_pl.accel as a; place = pathlib.Path(a.__file__).resolve(); print(place); "
            f"assert 'site-packages' in place.parts and not place.is_relative_to({str(ROOT)!r}), 'not the wheel'"
        )
        run([sys.executable, "-c", where], folder)
        command = [sys.executable, "-m", "swincompress_pl.cli"]
        run([*command, "--version"], folder)
        run([*command, "inspect", str(ARTIFACT)], folder)
        run([*command, "bench", str(ARTIFACT), "--rounds", "3"], folder)
        # one seed: the build is tested here, and the properties elsewhere
        pytest = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-m", "not slow", "--hypothesis-seed=0"]
        run([*pytest, *copied_tests(Path(folder))], folder, HYPOTHESIS_STORAGE_DIRECTORY=folder)


if __name__ == "__main__":
    main()

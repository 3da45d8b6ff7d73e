"""examples/*.py: each runs as a user would run it, in its short form, and prints what it promises."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
FIGURE = r"(?:nan|\d[\d,.]*)"
# file -> what its short form prints, in order
PRINTED = {
    "own_module.py": [r"validated: (\d+\.\d\d%), the engine: \d+ of 300 images, \1"],
    "plain_pytorch.py": [
        r"float: .* of 360 test images",
        r"pruned, 114,250 -> \d[\d,]+: ",
        "fine-tuned: ",
        r"int8, fine-tuned: (\d+\.\d\d%)",
        r"reloaded, in the engine: \1",
    ],
    "timm_finetune.py": [r"float: .* of 300 images", r"int8: .* of 300 images", r"7\.png: digit \d"],
    "events.py": [
        r"float: .*; engine: .* of 32 recordings \(4, 32, 32, 2\)",
        "spike rates of 12 layers of neurons: ",
        r"per recording: [1-9][\d,]* synaptic operations, [\d,]+ MACs",
    ],
    "kernel_benchmark.py": [
        "equal to the specification in NumPy: True",
        f"int8, export_layer +median +{FIGURE} ms",
        f"int8, accel.linear +median +{FIGURE} ms",
        f"torch float32 +median +{FIGURE} ms",
        f"numpy float32 +median +{FIGURE} ms",
    ],
    "spiking_cifar10.py": [
        "PrimeSVT: .* of the parameters saved",
        r"test: (\d+\.\d\d%) in torch, \1 in the engine",
        r"per image: [1-9][\d,]* synaptic operations",
    ],
}
SLOW = PRINTED.keys() - {"kernel_benchmark.py"}  # they train
NEEDS_ARTIFACT = "numpy_inference.py"


def run(name: str, folder: Path, *arguments: str | Path) -> str:
    """What the example prints to stdout; it runs in `folder`."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"}
    command = [sys.executable, "-W", "ignore", EXAMPLES / name, *arguments, "--quick"]
    done = subprocess.run(
        [str(part) for part in command], cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def check(printed: str, expected: list[str]) -> None:
    pattern = ".*".join(f"(?:{part})" for part in expected)
    assert re.search(pattern, printed, re.DOTALL), f"{expected} is not in:\n{printed}"


@pytest.fixture(scope="module")
def own_module(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("examples")
    return folder / "runs/own_module/model.safetensors", run("own_module.py", folder)


def test_every_example_is_run_and_short() -> None:
    assert {file.name for file in EXAMPLES.glob("*.py")} == PRINTED.keys() | {NEEDS_ARTIFACT}
    table = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for file in sorted(EXAMPLES.iterdir()):
        if file.suffix in (".py", ".cpp"):
            assert f"[{file.name}]({file.name})" in table
        if file.suffix == ".py":
            assert len(file.read_text(encoding="utf-8").splitlines()) < 80, f"{file.name} has 80 lines or more"


@pytest.mark.slow
def test_own_module(own_module: tuple[Path, str]) -> None:
    check(own_module[1], PRINTED["own_module.py"])


@pytest.mark.slow
def test_numpy_inference(own_module: tuple[Path, str], tmp_path: Path) -> None:
    printed = run(NEEDS_ARTIFACT, tmp_path, own_module[0])
    check(printed, [r"images \(32, 32, 3\), 10 classes", "of 30 images right", "one image: ", "torch was not imported"])


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in PRINTED if name != "own_module.py"],
)
def test_it_prints_what_it_promises(name: str, tmp_path: Path) -> None:
    check(run(name, tmp_path), PRINTED[name])

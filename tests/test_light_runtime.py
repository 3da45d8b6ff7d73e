"""What runs with numpy and safetensors alone, as after `pip install --no-deps swincompress_pl numpy safetensors`.

The environment is a fresh one, with the files of these three packages and no others. (.ci/wheel makes one by pip.)
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import tomllib
import venv
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from swincompress_pl import accel
from swincompress_pl.cli import COMMANDS
from swincompress_pl.dependencies import DISTRIBUTIONS, missing_package

REPOSITORY = Path(__file__).resolve().parent.parent
GOLDEN = Path(__file__).parent / "golden" / "0.1"
ARTIFACT = GOLDEN / "vit.safetensors"
Run = Callable[[Sequence[str]], "subprocess.CompletedProcess[str]"]


def copy_package(to: Path) -> Path:
    """The package as a wheel has it, without the compiled engine."""
    left_out = shutil.ignore_patterns("csrc", "__pycache__", "*.so", "*.pyd")
    return shutil.copytree(REPOSITORY / "swincompress_pl", to / "swincompress_pl", ignore=left_out)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("light")
    venv.create(folder, symlinks=os.name != "nt")
    (site,) = folder.glob("[lL]ib/**/site-packages")
    for name in ("numpy", "safetensors"):
        files = importlib.metadata.distribution(name).files
        assert files
        for top in {file.parts[0] for file in files} - {"..", "__pycache__"}:
            (site / top).symlink_to(Path(importlib.metadata.distribution(name).locate_file(top)).resolve())
    shutil.copy(accel.core._core.__file__, copy_package(site) / "accel")
    return folder


@pytest.fixture
def python(environment: Path, tmp_path: Path) -> Run:
    """Runs the environment's Python in an empty folder."""
    program = environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COV_"))}

    def run(arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
        command = [str(program), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=variables)

    return run


def test_an_artifact_runs(python: Run) -> None:
    code = """
import sys
import numpy as np
import swincompress_pl
from swincompress_pl import accel
engine, reference = accel.load(sys.argv[1], threads=1), accel.reference(sys.argv[1])
images = np.random.default_rng(0).integers(0, 256, (3, *engine.input_shape), dtype=np.uint8)
assert np.array_equal(engine.run_integer(images), reference.run_integer(images))
assert engine(images).shape == (3, engine.num_classes) == swincompress_pl.load(sys.argv[1])(images).shape
assert engine.profile(images).macs > 0
print("site-packages" in swincompress_pl.__file__, "torch" in sys.modules)
"""
    done = python(["-c", code, str(ARTIFACT)])
    assert (done.returncode, done.stdout.strip()) == (0, "True False"), done.stderr


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--version"], "swincompress "),
        (["--help"], "bench"),
        (["inspect", "--help"], "--json"),
        (["inspect", str(ARTIFACT)], "| head "),
        (["inspect", str(ARTIFACT), "--json"], '"operations": ['),
        (["bench", "--help"], "--against"),
        (["classify", "--help"], "--top"),
        (["completion", "bash"], "complete -o bashdefault"),
        (["bench", str(ARTIFACT), "--rounds", "1", "--operations"], "identical to the reference"),
        (["bench", str(ARTIFACT), "--rounds", "1", "--against", "torch"], "torch fp32: not installed: torch"),
        (["bench", "--kernel", "linear", "--shape", "4,8,16", "--rounds", "1"], "| scalar "),
    ],
)
def test_commands_for_artifacts_run(python: Run, arguments: list[str], told: str) -> None:
    done = python(["-m", "swincompress_pl.cli", *arguments])
    assert done.returncode == 0, done.stderr
    assert told in done.stdout


OF_TRAINING: dict[str, list[str]] = {
    "demo": [],
    "fit": ["-c", "x.yaml"],
    "validate": ["-c", "x.yaml"],
    "test": ["-c", "x.yaml"],
    "estimate": ["-c", "x.yaml"],
    "export": ["x.ckpt", "-o", "y"],
    "inspect": [str(GOLDEN / "pruned.ckpt")],
    "report": ["runs"],
}


@pytest.mark.parametrize("name", OF_TRAINING)
def test_other_commands_say_what_is_missing(python: Run, name: str) -> None:
    done = python(["-m", "swincompress_pl.cli", name, *OF_TRAINING[name]])
    assert done.returncode == 2
    assert re.fullmatch(
        rf"swincompress: error: {name}: [\w-]+ is not installed, and only what runs artifacts does without it; "
        r"`pip install swincompress_pl` installs everything\n",
        done.stderr,
    ), done.stderr


def test_every_command_is_tried() -> None:
    assert {*OF_TRAINING, "bench", "classify", "completion"} == set(COMMANDS)


def test_pictures_need_pillow(python: Run) -> None:
    code = "import sys; from swincompress_pl import accel; accel.Preprocess(height=4, width=4)('cat.jpg')"
    done = python(["-c", code])
    assert done.returncode == 1
    assert "ImportError: pictures are read by Pillow, which cannot be imported" in done.stderr.splitlines()[-1]
    assert "install it by `pip install pillow`" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("name", ["prune", "primesvt", "quantize", "save_network", "callbacks", "data", "models"])
def test_functions_say_what_is_missing(python: Run, name: str) -> None:
    done = python(["-c", f"import swincompress_pl; swincompress_pl.{name}"])
    last = done.stderr.splitlines()[-1]
    assert re.search(rf"ImportError: swincompress_pl\.{name}: [\w-]+ is not installed", last), done.stderr
    assert "pip install swincompress_pl" in last


def test_another_import_error_is_left_as_it_is() -> None:
    assert missing_package(ModuleNotFoundError("No module named 'mine'", name="mine")) is None
    assert missing_package(ImportError("cannot import name 'a' from 'torch'", name="torch")) is None
    assert "scikit-learn is not installed" in str(missing_package(ModuleNotFoundError(name="sklearn.datasets")))


def test_the_packages_are_those_of_the_project() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))["project"]
    needed = {re.split(r"[\[>]", requirement)[0] for requirement in project["dependencies"]}
    assert set(DISTRIBUTIONS.values()) | {"numpy", "safetensors"} == needed


# A source folder that comes before the installed package


def test_a_source_folder_that_hides_the_package_says_so(python: Run, tmp_path: Path) -> None:
    source = copy_package(tmp_path)  # the working folder is first on the path
    for arguments in (["-m", "swincompress_pl.cli", "inspect", str(ARTIFACT)], ["-c", "import swincompress_pl.accel"]):
        done = python(arguments)
        assert done.returncode in (1, 2)
        last = done.stderr.splitlines()[-1]
        assert f"{source} has no compiled engine, and hides the package that is installed in " in last
        assert f"run in another folder than {tmp_path}, or install these sources in place: pip install -e" in last


def test_a_broken_engine_says_why(python: Run, tmp_path: Path) -> None:
    source = copy_package(tmp_path)
    (source / "accel" / Path(accel.core._core.__file__).name).write_bytes(b"not a library")
    done = python(["-c", "import swincompress_pl.accel"])
    assert done.returncode == 1
    assert "accel._core cannot be loaded (" in done.stderr.splitlines()[-1]
    assert "build it with `pip install .`" in done.stderr.splitlines()[-1]

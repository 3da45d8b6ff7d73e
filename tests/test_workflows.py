"""The workflows and the wheels' configuration: valid, pinned, with least permissions, and of the Pythons we promise."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
of_each = pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)


def jobs_of(file: Path) -> dict[str, Any]:
    jobs: dict[str, Any] = yaml.safe_load(file.read_text("utf-8"))["jobs"]
    return jobs


def valid(*files: Path) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "check_jsonschema",
        "--builtin-schema",
        "vendor.github-workflows",
        *map(str, files),
    ]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_they_are_there() -> None:
    assert [file.stem for file in WORKFLOWS] == ["docs", "release", "tests", "wheels"]


def test_they_are_what_github_accepts(tmp_path: Path) -> None:
    assert valid(*WORKFLOWS).returncode == 0
    wrong = tmp_path / "wrong.yml"
    wrong.write_text(WORKFLOWS[0].read_text("utf-8").replace("runs-on:", "run-on:"))
    assert valid(wrong).returncode != 0


@of_each
def test_permissions_are_given_job_by_job(file: Path) -> None:
    assert yaml.safe_load(file.read_text("utf-8"))["permissions"] == {}
    for name, job in jobs_of(file).items():
        written = {scope for scope, level in job["permissions"].items() if level == "write"}
        allowed = {"release/attest": {"attestations", "id-token"}, "release/publish": {"id-token"},
                   "docs/publish": {"pages", "id-token"}}  # fmt: skip
        assert written == allowed.get(f"{file.stem}/{name}", set()), name
        assert "secrets" not in str(job), name


@of_each
def test_jobs_end_and_actions_have_versions(file: Path) -> None:
    for name, job in jobs_of(file).items():
        assert "uses" in job or job["timeout-minutes"] <= 90, name
        for step in job.get("steps", []):
            if "uses" in step:
                assert re.fullmatch(r"(actions|pypa)/[\w-]+@v\d+(\.\d+\.\d+)?", step["uses"]), step["uses"]
                assert "checkout" not in step["uses"] or step["with"]["persist-credentials"] is False, name


@of_each
def test_scripts_that_they_run_are_there(file: Path) -> None:
    for script in re.findall(r"\.ci/[\w.]+", file.read_text("utf-8")):
        assert (ROOT / script).is_file(), script


def test_documentation_is_built_with_the_packages_of_the_extra() -> None:
    (install,) = [step["run"] for step in jobs_of(ROOT / ".github/workflows/docs.yml")["build"]["steps"]
                  if "pip install" in step.get("run", "")]  # fmt: skip
    assert re.findall(r'"([^"]+)"', install) == PROJECT["project"]["optional-dependencies"]["docs"]


def test_wheels_are_for_every_python_from_the_oldest() -> None:
    settings = PROJECT["tool"]["cibuildwheel"]
    minors = [int(minor) for minor in re.findall(r"cp3(\d+)-\*", settings["build"])]
    assert minors == list(range(minors[0], minors[-1] + 1))
    assert PROJECT["project"]["requires-python"] == f">=3.{minors[0]}"
    assert ".ci/test_wheel.py" in settings["test-command"]


def test_the_wheels_tests_need_no_torch() -> None:
    """Each test file that .ci/test_wheel.py takes imports where torch is not."""
    code = f"""
import runpy, sys, pathlib, tempfile
sys.modules["torch"] = sys.modules["timm"] = sys.modules["lightning"] = sys.modules["scipy"] = None
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
script = runpy.run_path({str(ROOT / ".ci/test_wheel.py")!r})
with tempfile.TemporaryDirectory() as folder:
    files = script["copied_tests"](pathlib.Path(folder))
names = [pathlib.Path(file).stem for file in files]
for name in names:
    __import__(name)
print(*names)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert {"test_accel_programs", "test_accel_reader", "test_accel_storage"} <= set(done.stdout.split())

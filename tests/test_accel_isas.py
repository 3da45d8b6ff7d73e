"""Every ISA's kernels outside Python: under emulators of CPUs that this one is not, sanitizers and valgrind.

Builds tests/cpp/kernel_cases.cpp with the engine and runs it on cases whose answers the specification gave, and
tests/cpp/threads.cpp, which has cases of its own.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import REPOSITORY
from support.kernel_case_files import engine_cases, write_cases

from swincompress_pl import accel

pytestmark = pytest.mark.slow
LIGHT = "-DCMAKE_CXX_FLAGS_RELEASE=-O1"  # sanitized tiles take minutes to compile at -O3
CROSS_COMPILER = "aarch64-linux-gnu-g++"


def tool(*names: str, package: str) -> str:
    """The first of `names` that is installed; skips the test where none is, naming the Debian package."""
    for name in names:
        if shutil.which(name):
            return name
    pytest.skip(f"{names[0]}: not installed; on Debian `apt-get install {package}` brings it.")


def build(folder: Path, *options: str) -> Path:
    """The test program, compiled with CMake's `options`."""
    cmake = tool("cmake", package="cmake")
    configure = [cmake, "-S", REPOSITORY, "-B", folder, "-DSWINCOMPRESS_PYTHON=OFF", "-DSWINCOMPRESS_TESTS=ON"]
    for command in ([*configure, "-DSWINCOMPRESS_WERROR=ON", *options], [cmake, "--build", folder]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / "kernel_cases"


def run(*command: str | Path) -> str:
    """What a command printed; fails where it returned anything but 0."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 1,000 cases."""
    path = tmp_path_factory.mktemp("cases") / "few"
    assert write_cases(path, engine_cases(400, seed=3)) > 900
    return path


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 5,000 cases."""
    path = tmp_path_factory.mktemp("cases") / "many"
    assert write_cases(path, engine_cases(2000, seed=4)) > 4500
    return path


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("native"))


def test_this_cpu(native: Path, many: Path) -> None:
    report = run(native, many, "1")
    assert report.endswith(f" 0 differences: {' '.join(accel.implementations())}\n")


def test_threads(native: Path) -> None:
    assert run(native.parent / "threads") == "right\n"


def test_a_wrong_byte_is_found(native: Path, few: Path, tmp_path: Path) -> None:
    content = bytearray(few.read_bytes())
    content[-1] ^= 1  # of the last case's expected answer
    damaged = tmp_path / "damaged"
    damaged.write_bytes(content)
    done = subprocess.run([native, damaged, "1", "scalar"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "scalar differs: spiking program" in done.stdout
    damaged.write_bytes(content[:-1])
    assert subprocess.run([native, damaged, "1"], capture_output=True, check=False).returncode == 2


def test_neon_under_an_emulator(many: Path, few: Path, tmp_path: Path) -> None:
    compiler = tool(CROSS_COMPILER, package="g++-aarch64-linux-gnu")
    emulator = tool("qemu-aarch64", "qemu-aarch64-static", package="qemu-user")
    program = build(
        tmp_path / "build", "-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
        f"-DCMAKE_CXX_COMPILER={compiler}", "-DCMAKE_EXE_LINKER_FLAGS=-static",
    )  # fmt: skip
    assert run(emulator, "-cpu", "max", program, many, "1").endswith(" 0 differences: neon_dotprod scalar\n")
    assert run(emulator, "-cpu", "max", program, few, "3").endswith(" 0 differences: neon_dotprod scalar\n")
    # a CPU without the dot products is told from one that has them
    assert run(emulator, "-cpu", "cortex-a57", program, few, "1").endswith(" 0 differences: scalar\n")
    forced = subprocess.run(
        [emulator, "-cpu", "cortex-a57", program, few, "1", "neon_dotprod"], capture_output=True, text=True, check=False
    )
    assert "'neon_dotprod' cannot run on this CPU; this CPU can run: scalar" in forced.stderr


@pytest.mark.parametrize(("cpu", "names"), [("Haswell", "avx2 scalar"), ("Nehalem", "scalar")])
def test_older_x86_under_an_emulator(cpu: str, names: str, native: Path, few: Path) -> None:
    if "avx2" not in accel.implementations():
        pytest.skip("this CPU is no x86 with AVX2.")
    emulator = tool("qemu-x86_64", "qemu-x86_64-static", package="qemu-user")
    assert run(emulator, "-cpu", cpu, native, few, "1").endswith(f" 0 differences: {names}\n")


def test_address_and_undefined_behaviour_sanitizers(many: Path, tmp_path: Path) -> None:
    program = build(
        tmp_path / "build", "-DSWINCOMPRESS_SANITIZE=address", LIGHT, "-DCMAKE_CXX_FLAGS=-fno-sanitize-recover=all"
    )
    run(program, many, "1")


def test_thread_sanitizer(few: Path, tmp_path: Path) -> None:
    """Every case runs on three threads, for two callers at once."""
    program = build(tmp_path / "build", "-DSWINCOMPRESS_SANITIZE=thread", LIGHT)
    run(program, few, "3")
    assert run(program.parent / "threads") == "right\n"


def test_scalar_under_valgrind(native: Path, few: Path) -> None:
    valgrind = tool("valgrind", package="valgrind")
    report = run(valgrind, "-q", "--error-exitcode=9", native, few, "1", "scalar")
    assert report.endswith(" 0 differences: scalar\n")

"""The engine for C++ users: built, installed and found without Python; the example's answers are Python's. And the
fuzzer of artifacts, which must pass, and must find what is planted."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.program_cases import small_program
from support.spiking_programs import spiking_program
from support.whole_programs import images_of, vit_program

from swincompress_pl import accel, spec

ROOT = Path(__file__).parent.parent
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake"),
    pytest.mark.skipif(sys.platform != "linux", reason="written for Linux"),
]

CONSUMER = """
cmake_minimum_required(VERSION 3.21)
project(consumer LANGUAGES CXX)
find_package(swincompress_engine REQUIRED)
add_executable(classify classify.cpp)
target_link_libraries(classify PRIVATE swincompress::engine)
"""


def run(*command: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)  # type: ignore[call-overload, no-any-return]


def cmake(*arguments: str | Path) -> None:
    done = run("cmake", *arguments)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.fixture(scope="module")
def classify(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example, built against the installed library and nothing else of this tree."""
    build, prefix, user = (tmp_path_factory.mktemp(name) for name in ("build", "prefix", "user"))
    cmake("-S", ROOT, "-B", build, "-DSWINCOMPRESS_PYTHON=OFF", "-DSWINCOMPRESS_WERROR=ON")
    cmake("--build", build, "-j2")
    cmake("--install", build, "--prefix", prefix)
    assert [path.name for path in (prefix / "include").rglob("*.h")] == ["engine.h"]
    (user / "CMakeLists.txt").write_text(CONSUMER)
    shutil.copy(ROOT / "examples" / "classify.cpp", user)
    cmake("-S", user, "-B", user / "build", f"-DCMAKE_PREFIX_PATH={prefix}")
    cmake("--build", user / "build")
    return user / "build" / "classify"


def test_the_sources_can_be_a_subdirectory(tmp_path: Path) -> None:
    included = CONSUMER.replace("find_package(swincompress_engine REQUIRED)", f"add_subdirectory({ROOT} engine)")
    (tmp_path / "CMakeLists.txt").write_text(included)
    shutil.copy(ROOT / "examples" / "classify.cpp", tmp_path)
    cmake("-S", tmp_path, "-B", tmp_path / "build", "-DCMAKE_DISABLE_FIND_PACKAGE_Python=ON")
    done = run("cmake", "--build", tmp_path / "build", "--target", "help")
    assert "swincompress_engine" in done.stdout
    assert "_core" not in done.stdout


def best_of(program: spec.Program, image: np.ndarray) -> str:
    """What the example prints, by the Python engine."""
    (logits,) = accel.Engine(program, threads=1)(image[None])
    order = np.argsort(-logits, kind="stable")[:5]
    names = [f"  {program.classes[i]}" if program.classes else "" for i in order]
    return "".join(f"{i:5d}  {logits[i]:9.4f}{name}\n" for i, name in zip(order, names, strict=True))


@pytest.mark.parametrize("make", [small_program, vit_program, spiking_program])
def test_the_example_prints_what_python_answers(make: object, classify: Path, tmp_path: Path) -> None:
    program: spec.Program = make()  # type: ignore[operator]
    path = accel.export(program, tmp_path / "model.safetensors")
    (image,) = images_of(program, 1)
    (tmp_path / "image.raw").write_bytes(image.tobytes())
    height, width, _ = image.shape
    (tmp_path / "image.ppm").write_bytes(b"P6\n# a comment\n%d %d\n255\n" % (width, height) + image.tobytes())
    for file in ("image.raw", "image.ppm"):
        for arguments in ([], ["1"], ["3", "scalar"]):
            done = run(classify, path, tmp_path / file, *arguments)
            assert done.stdout == best_of(program, image), done.stderr


def test_the_example_says_what_is_wrong(classify: Path, tmp_path: Path) -> None:
    program = small_program()
    path = accel.export(program, tmp_path / "model.safetensors")
    coded = accel.export(program, tmp_path / "coded.safetensors", "lzma")
    image = tmp_path / "image.raw"
    image.write_bytes(images_of(program, 1).tobytes())
    short, wide, other = tmp_path / "short.raw", tmp_path / "wide.ppm", tmp_path / "other.bin"
    short.write_bytes(bytes(191))
    wide.write_bytes(b"P6 9 8 255\n" + bytes(216))
    other.write_bytes(bytes(1000))
    for arguments, message in [
        ((path, image, "0"), r"threads is 0; it must lie in [1, 256]"),
        ((path, image, "10000"), r"threads is 10000; it must lie in [1, 256]"),
        ((path, image, "1", "sse9"), "implementation 'sse9' is unknown; this CPU can run: "),
        ((path, short), "short.raw: 191 bytes of pixels; the artifact takes 192"),
        ((path, wide), "wide.ppm: a PPM of 8 x 9, 255 levels; the artifact takes 8 x 8 x 3"),
        ((path, tmp_path / "no.raw"), "no.raw: no such file"),
        ((tmp_path / "no.safetensors", image), "no.safetensors: no such file"),
        ((tmp_path, image), f"{tmp_path}: "),
        ((other, image), "other.bin: not a safetensors file"),
        ((coded, image), "which only Python decodes; export it without compression"),
    ]:
        done = run(classify, *arguments)
        assert done.returncode == 1
        assert message in done.stderr, (message, done.stderr)
    assert run(classify).returncode == 2


# --- the fuzzer -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fuzzing(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[Path]]:
    """(sources, build, artifacts): the sources are a copy, in which bugs may be planted."""
    sources, build, corpus = (tmp_path_factory.mktemp(name) for name in ("sources", "fuzz", "corpus"))
    for name in ("CMakeLists.txt", "examples", "swincompress_pl/accel/csrc", "tests/fuzz"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        (sources / name).parent.mkdir(parents=True, exist_ok=True)
        copy(ROOT / name, sources / name)
    switches = [f"-DSWINCOMPRESS_{switch}" for switch in ("PYTHON=OFF", "FUZZ=ON", "SANITIZE=ON")]
    cmake("-S", sources, "-B", build, *switches, "-DCMAKE_BUILD_TYPE=Debug", "-DCMAKE_CXX_FLAGS_DEBUG=-O1")
    cmake("--build", build, "-j2", "--target", "fuzz_artifacts")
    done = run(sys.executable, ROOT / "tests" / "fuzz" / "corpus.py", corpus)
    assert done.returncode == 0, done.stderr
    return sources, build, [Path(line) for line in done.stdout.split()]


def fuzz(build: Path, count: int, artifacts: list[Path]) -> subprocess.CompletedProcess[str]:
    options = {"ASAN_OPTIONS": "detect_leaks=1", "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1"}
    return run(build / "fuzz_artifacts", str(count), "7", "0", *artifacts, env=os.environ | options)


def test_mutants_are_refused_or_run(fuzzing: tuple[Path, Path, list[Path]]) -> None:
    _, build, artifacts = fuzzing
    done = fuzz(build, 8000, artifacts)
    assert done.returncode == 0, done.stderr[-3000:]
    words = done.stdout.split()
    assert words[:2] == ["8000", "mutants:"]
    assert int(words[2]) > 200, "few mutants live: the engine is hardly tried"
    for guard in ("which no earlier operation writes", "a second time", "accumulator may reach", "they must lie in",
                  "is not in the program", "unknown attribute", "it must be int# (#, #)", "beyond uint#", "altered",
                  "is not JSON", "truncated within its header", "folded map", "packed tensor",
                  "sparse tensor", "that its bitmap has"):  # fmt: skip
        assert guard in done.stdout, f"no mutant reached the guard '{guard}'"


@pytest.mark.parametrize(
    ("file", "sound", "planted", "found"),
    [
        ("rules.cpp", "{rows, joined}, -1, last)", "{rows, joined}, -1, kInt32Max)", "AddressSanitizer"),
        ("call.cpp", "require(worst <= kInt32Max,", "require(worst >= 0,", "signed integer overflow"),
        ("storage.cpp", "at >= 0 && at < size", "at >= 0 && at <= size", "AddressSanitizer"),
        ("storage.cpp", "from_bytes != packed_bytes(ones, narrow.bits)", "from_bytes < 0", "AddressSanitizer"),
    ],
)  # fmt: skip
def test_the_fuzzer_finds_planted_bugs(
    fuzzing: tuple[Path, Path, list[Path]], file: str, sound: str, planted: str, found: str
) -> None:
    sources, build, artifacts = fuzzing
    changed = sources / "swincompress_pl" / "accel" / "csrc" / file
    text = changed.read_text()
    assert text.count(sound) == 1
    changed.write_text(text.replace(sound, planted))
    try:
        cmake("--build", build, "-j2", "--target", "fuzz_artifacts")
        done = fuzz(build, 8000, artifacts)
    finally:
        changed.write_text(text)
    assert done.returncode != 0
    assert found in done.stderr

"""The engine for C++ users: built, installed and found without Python; the example's answers are Python's. And the
fuzzer of artifacts, which must pass, and must find what is planted."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from support.artifact_bombs import EVIL
from support.artifact_mutants import any_mutant, coded_mutant
from support.program_cases import masked, small_program
from support.spiking_programs import spiking_program
from support.whole_programs import images_of, vit_program

from swincompress_pl import accel, spec
from swincompress_pl.accel import artifact

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
READER = """
add_executable(read_artifacts read_artifacts.cpp)
target_link_libraries(read_artifacts PRIVATE swincompress::engine)
"""
CODERS = all(Path("/usr/include", header).exists() for header in ("lzma.h", "zlib.h"))
needs_coders = pytest.mark.skipif(not CODERS, reason="needs liblzma-dev and zlib1g-dev")


def run(*command: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)  # type: ignore[call-overload, no-any-return]


def cmake(*arguments: str | Path) -> None:
    done = run("cmake", *arguments)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@dataclass(frozen=True)
class Built:
    """Programs, built against the installed library and nothing else of this tree."""

    classify: Path
    read_artifacts: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    build, prefix, user = (tmp_path_factory.mktemp(name) for name in ("build", "prefix", "user"))
    with_coders = f"-DSWINCOMPRESS_LZMA={'ON' if CODERS else 'OFF'}"
    cmake("-S", ROOT, "-B", build, "-DSWINCOMPRESS_PYTHON=OFF", "-DSWINCOMPRESS_WERROR=ON", with_coders)
    cmake("--build", build, "-j2")
    cmake("--install", build, "--prefix", prefix)
    assert [path.name for path in (prefix / "include").rglob("*.h")] == ["engine.h"]
    (user / "CMakeLists.txt").write_text(CONSUMER + READER)
    shutil.copy(ROOT / "examples" / "classify.cpp", user)
    shutil.copy(ROOT / "tests" / "cpp" / "read_artifacts.cpp", user)
    cmake("-S", user, "-B", user / "build", f"-DCMAKE_PREFIX_PATH={prefix}")
    cmake("--build", user / "build")
    return Built(user / "build" / "classify", user / "build" / "read_artifacts")


@pytest.fixture(scope="module")
def classify(built: Built) -> Path:
    return built.classify


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
    ]:
        done = run(classify, *arguments)
        assert done.returncode == 1
        assert message in done.stderr, (message, done.stderr)
    assert run(classify).returncode == 2


# --- forms of files ---------------------------------------------------------------------------------------------------


def pattern(program: spec.Program, count: int) -> np.ndarray:
    """The images of read_artifacts."""
    shape = (count, *program.input.value.shape)
    return (37 * np.arange(np.prod(shape)) + 11).astype(np.uint8).reshape(shape)


def logits_of(built: Built, paths: list[Path]) -> list[str]:
    done = run(built.read_artifacts, "logits", *paths)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def forms() -> dict[str, spec.Program]:
    return {
        "plain": small_program(),
        "packed": small_program(1, weight="int4"),
        "sparse": masked(small_program(2, channels=32), 0.54),
        "narrow": masked(small_program(3, channels=32, weight="int4"), 0.54),
        "spikes": spiking_program(),
        "events": spiking_program(events=True),
        "vit": vit_program(),
    }


@needs_coders
def test_every_form_gives_the_same_logits(built: Built, tmp_path: Path) -> None:
    programs = forms()
    paths = {
        (name, how): accel.export(program, tmp_path / f"{name}-{how}.safetensors", how)
        for name, program in programs.items()
        for how in (None, "lzma")
    }
    for (name, how), found in zip(paths, logits_of(built, list(paths.values())), strict=True):
        expected = spec.run(programs[name], pattern(programs[name], 2))
        assert found.split() == [str(logit) for logit in expected.ravel()], (name, how)


def test_named_outputs_are_those_of_python(built: Built, tmp_path: Path) -> None:
    plain = vit_program()
    values = spec.check(plain)
    chosen = [op.output for op in plain.operations if op.kind in ("add", "layer_norm")] + [plain.operations[-1].output]
    outputs = tuple(
        spec.Output(name=f"map{i}", value=name, scale=0.1 * (i + 1), shape=values[name].shape)
        for i, name in enumerate(chosen)
    )
    program = dataclasses.replace(plain, outputs=outputs, logit_scale=1.0, classes=None)
    path = accel.export(program, tmp_path / "maps.safetensors")
    done = run(built.read_artifacts, "outputs", path)
    assert done.returncode == 0, done.stderr
    *lines, no_logits, no_room = done.stdout.splitlines()
    engine, images = accel.load(path, threads=1), pattern(program, 2)
    found, floats = engine.run_integer(images), engine(images)
    assert len(lines) == len(engine.outputs) > 3
    for line, output in zip(lines, engine.outputs, strict=True):
        shape = "".join(f"{size}," for size in output.shape)
        head = f"{output.name} {output.dtype} ({shape}) {output.scale:.17g} {floats[output.name].flat[-1]:.9g} "
        assert line == head + " ".join(map(str, found[output.name].ravel()))
    assert no_logits == f"refused: the artifact has {len(lines)} named outputs and no logits; use run_outputs"
    assert no_room == f"refused: 0 arrays for {len(lines)} outputs; give one per output"


@needs_coders
def test_the_library_accepts_what_python_accepts(built: Built, tmp_path: Path) -> None:
    """Compressed artifacts with a change, most of them behind the coders, and other mutants."""
    programs = [small_program(3), masked(small_program(2, channels=16, weight="int3"), 0.5), spiking_program()]
    wholes = [artifact.to_bytes(program, how) for program in programs for how in (None, "lzma")]
    paths = []
    for number in range(800):
        paths.append(tmp_path / f"{number}.safetensors")
        make = coded_mutant(programs, number) if number % 4 else any_mutant(programs, wholes, number)
        paths[-1].write_bytes(make)
    accepted = 0
    for path, found in zip(paths, logits_of(built, paths), strict=True):
        expected = "refused:"
        with contextlib.suppress(accel.ArtifactError):
            engine = accel.load(path, threads=1)
            logits = engine.run_integer(pattern(engine.program, 2))
            expected = " ".join(map(str, logits.ravel()))
            accepted += 1
        assert found.startswith(expected), path.name
    assert 50 < accepted < 700


@needs_coders
@pytest.mark.parametrize("name", EVIL)
def test_bombs_are_refused(name: str, built: Built, tmp_path: Path) -> None:
    make, message = EVIL[name]
    (tmp_path / "evil.safetensors").write_bytes(make())
    limited = f"ulimit -v 400000; exec {built.read_artifacts} logits {tmp_path / 'evil.safetensors'}"
    (found,) = run("bash", "-c", limited).stdout.splitlines()
    assert re.search(f"refused: .*({message})", found)


@pytest.mark.parametrize(
    ("setting", "hidden", "missing"),
    [
        ("OFF", [], "liblzma and zlib"),
        ("AUTO", ["LibLZMA", "ZLIB"], "liblzma and zlib"),
        pytest.param("AUTO", ["ZLIB"], "zlib", marks=needs_coders),
        pytest.param("AUTO", ["LibLZMA"], "liblzma", marks=needs_coders),
    ],
)
def test_a_build_says_what_it_lacks(setting: str, hidden: list[str], missing: str, tmp_path: Path) -> None:
    """What it says of compressed artifacts then is tested in Python, whose extension lacks both."""
    switches = ["-DSWINCOMPRESS_PYTHON=OFF", f"-DSWINCOMPRESS_LZMA={setting}"]
    switches += [f"-DCMAKE_DISABLE_FIND_PACKAGE_{name}=ON" for name in hidden]
    done = run("cmake", "-S", ROOT, "-B", tmp_path, *switches)
    assert f"-- Without {missing}: the library refuses compressed artifacts" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["PYTHON=OFF", "LZMA=maybe"], "SWINCOMPRESS_LZMA is maybe; it must be ON, OFF or AUTO"),
        (["PYTHON=ON", "LZMA=ON"], "SWINCOMPRESS_LZMA=ON is for SWINCOMPRESS_PYTHON=OFF"),
        (["PYTHON=OFF", "LZMA=ON"], "these are not found: liblzma;zlib; install their development files"),
    ],
)
def test_wrong_settings_are_refused(settings: list[str], message: str, tmp_path: Path) -> None:
    switches = [f"-DSWINCOMPRESS_{setting}" for setting in settings]
    hidden = [f"-DCMAKE_DISABLE_FIND_PACKAGE_{name}=ON" for name in ("LibLZMA", "ZLIB")]
    done = run("cmake", "-S", ROOT, "-B", tmp_path, *switches, *hidden)
    assert done.returncode != 0
    assert message in " ".join(done.stderr.split())


@pytest.mark.parametrize("make", [small_program, vit_program, spiking_program])
def test_the_profile_has_pythons_rows(make: object, built: Built, tmp_path: Path) -> None:
    program: spec.Program = make()  # type: ignore[operator]
    path = accel.export(program, tmp_path / "model.safetensors")
    done = run(built.read_artifacts, "profile", path, "3")
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    expected = accel.load(path, threads=1).profile(pattern(program, 3), repeats=1)
    found = [(name, kind, int(macs), int(size)) for name, kind, _, macs, size in lines[:-3]]
    assert found == [(row.operation, row.kind, row.macs, row.bytes) for row in expected]
    assert all(int(line[2]) > 0 for line in lines[:-3])
    assert [line[0] for line in lines[-3:]] == [
        "refused: repeats is 0; it must be at least 1",
        "refused: repeats is -3; it must be at least 1",
        "refused: profile needs at least one image, got none",
    ]


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
    coded = ["--coded"] if CODERS else []
    done = run(sys.executable, ROOT / "tests" / "fuzz" / "corpus.py", corpus, *coded)
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
        ("program/rules.cpp", "{rows, joined}, -1, last)", "{rows, joined}, -1, kInt32Max)", "AddressSanitizer"),
        ("program/call.cpp", "require(worst <= kInt32Max,", "require(worst >= 0,", "signed integer overflow"),
        ("artifact/storage.cpp", "at >= 0 && at < size", "at >= 0 && at <= size", "AddressSanitizer"),
        ("artifact/storage.cpp", "from_bytes != packed_bytes(ones, narrow.bits)", "from_bytes < 0", "AddressSanitizer"),
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

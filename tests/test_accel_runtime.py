"""Engines as users meet them: arguments, errors, profile, and no torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.program_cases import small_program
from support.whole_programs import images_of, swin_program, vit_program

from swincompress_pl import accel, spec
from swincompress_pl.accel import _core, core


@pytest.fixture(scope="module")
def program() -> spec.Program:
    return vit_program()


@pytest.fixture(scope="module")
def engine(program: spec.Program) -> accel.Engine:
    return accel.Engine(program, threads=1)


@pytest.fixture(scope="module")
def path(program: spec.Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return accel.export(program, tmp_path_factory.mktemp("artifact") / "vit.safetensors")


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)


def test_call_scales_the_integer_logits(program: spec.Program, engine: accel.Engine) -> None:
    images = images_of(program, 3)
    logits = engine(images)
    assert logits.dtype == np.float32
    np.testing.assert_array_equal(logits, (spec.run(program, images) * program.logit_scale).astype(np.float32))


def test_both_engines_have_one_interface(program: spec.Program, engine: accel.Engine, path: Path) -> None:
    reference = accel.reference(path)
    images = images_of(program, 2)
    np.testing.assert_array_equal(engine(images), reference(images))
    for runtime in (engine, reference):
        assert runtime.input_shape == (24, 24, 3)
        assert runtime.classes == program.classes
        assert runtime.num_classes == 7
        with pytest.warns(DeprecationWarning, match="class_count is the name of version 0.1 .* use .num_classes"):
            assert runtime.class_count == 7  # type: ignore[attr-defined]
        assert runtime.threads == 1
        assert runtime.program.describe() == program.describe()
        assert "7 classes" in repr(runtime)
        assert runtime.implementation in repr(runtime)


@pytest.mark.parametrize("make", [accel.Engine, accel.ReferenceEngine])
def test_empty_batches_give_empty_logits(program: spec.Program, make: type) -> None:
    runtime = make(program)
    empty = np.zeros((0, 24, 24, 3), dtype=np.uint8)
    assert runtime(empty).shape == (0, 7)
    assert runtime.run_integer(empty).dtype == np.int32


def test_non_contiguous_images_are_copied(program: spec.Program, engine: accel.Engine) -> None:
    channels_first = images_of(program, 4).transpose(0, 3, 1, 2).copy()
    images = channels_first.transpose(0, 2, 3, 1)[::-1]
    assert not images.flags.c_contiguous
    np.testing.assert_array_equal(engine.run_integer(images), spec.run(program, np.ascontiguousarray(images)))


@pytest.mark.parametrize("make", [accel.Engine, accel.ReferenceEngine])
def test_wrong_images_are_refused(program: spec.Program, make: type) -> None:
    runtime = make(program)
    with pytest.raises(TypeError, match=r"float32.*raw uint8 pixels"):
        runtime(np.zeros((1, 24, 24, 3), dtype=np.float32))
    with pytest.raises(TypeError, match="list"):
        runtime([[1]])
    for shape in [(24, 24, 3), (1, 3, 24, 24), (1, 25, 24, 3), (1, 24, 24, 4), (0, 24, 24, 1)]:
        with pytest.raises(ValueError, match=r"expected \(N, 24, 24, 3\)"):
            runtime(np.zeros(shape, dtype=np.uint8))


@pytest.mark.parametrize("threads", [0, -1, 257, 10_000])
def test_impossible_thread_counts_are_refused(path: Path, threads: int) -> None:
    with pytest.raises(ValueError, match=rf"threads is {threads}; it must lie in \[1, 256\]"):
        accel.load(path, threads=threads)


@pytest.mark.parametrize("threads", [True, 1.0, "2"])
def test_thread_counts_are_integers(path: Path, threads: object) -> None:
    with pytest.raises(TypeError, match="threads is"):
        accel.load(path, threads=threads)  # type: ignore[arg-type]


def test_more_threads_than_work_and_cpus(program: spec.Program) -> None:
    images = images_of(program, 1)
    np.testing.assert_array_equal(accel.Engine(program, threads=19).run_integer(images), spec.run(program, images))


ORDER = ("amx_int8", "avx512_vnni", "avx_vnni", "avx2", "neon_dotprod", "scalar")


def test_implementations_are_listed_best_first() -> None:
    names = accel.implementations()
    assert names == tuple(name for name in ORDER if name in names)
    assert names[-1] == "scalar"


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="asks Linux what the CPU can")
def test_every_implementation_that_the_cpu_can_run_is_listed(path: Path) -> None:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    flags = next((set(line.split()) for line in lines if line.startswith(("flags", "Features"))), set())
    needed = {
        "amx_int8": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "amx_tile", "amx_int8"},
        "avx512_vnni": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"},
        "avx_vnni": {"avx2", "avx_vnni"},
        "avx2": {"avx2"},
        "neon_dotprod": {"asimddp"},
        "scalar": set(),
    }
    for name in ORDER:
        if name in accel.implementations():
            assert needed[name] <= flags
        elif needed[name] <= flags:  # an old compiler may not know the ISA, and a sandbox may refuse AMX
            refused = "|cannot run on this CPU" if name == "amx_int8" else ""
            with pytest.raises(ValueError, match=f"'{name}' (is not part of this build{refused})"):
                accel.load(path, implementation=name)


@pytest.mark.parametrize("name", accel.implementations())
def test_every_implementation_is_forced_by_name(name: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert accel.load(path, implementation=name).implementation == name
    monkeypatch.setenv("SWINCOMPRESS_IMPLEMENTATION", name)
    assert accel.load(path).implementation == name


def test_implementation_argument_wins_over_the_environment(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    best = accel.implementations()[0]
    assert accel.load(path).implementation == best
    monkeypatch.setenv("SWINCOMPRESS_IMPLEMENTATION", "scalar")
    assert accel.load(path).implementation == "scalar"
    assert accel.load(path, implementation=best).implementation == best
    monkeypatch.setenv("SWINCOMPRESS_IMPLEMENTATION", "")
    assert accel.load(path).implementation == best


def test_unknown_implementations_are_refused_with_the_choices(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    choices = ", ".join(accel.implementations())
    with pytest.raises(ValueError, match=f"implementation 'sse9' is unknown; this CPU can run: {choices}"):
        accel.load(path, implementation="sse9")
    foreign = "avx512_vnni" if "neon_dotprod" in accel.implementations() else "neon_dotprod"
    with pytest.raises(ValueError, match=f"implementation '{foreign}' is not part of this build"):
        accel.load(path, implementation=foreign)
    monkeypatch.setenv("SWINCOMPRESS_IMPLEMENTATION", "fastest")
    with pytest.raises(ValueError, match="SWINCOMPRESS_IMPLEMENTATION 'fastest' is unknown"):
        accel.load(path)


@pytest.mark.parametrize("byte", ["int2", "int6", "int7"])
def test_narrow_activations_are_left_to_the_reference(byte: str, tmp_path: Path) -> None:
    program = small_program(1, byte=byte, weight="int4")
    message = rf"layer_norm 'norm1': type {byte}; the C\+\+ engine runs 8-bit activations .*accel\.reference\(path\)"
    with pytest.raises(spec.ProgramError, match=message):
        accel.Engine(program)
    path = accel.export(program, tmp_path / "narrow.safetensors", "lzma")
    with pytest.raises(accel.ArtifactError, match=rf"narrow\.safetensors: {message}"):
        accel.load(path)
    images = images_of(program, 4)
    np.testing.assert_array_equal(accel.reference(path).run_integer(images), spec.run(program, images))
    assert accel.reference(path).profile(images, repeats=1).macs == 4 * sum(c.macs for c in spec.costs(program))


def test_single_operations_of_narrow_types_are_refused() -> None:
    for source, output in [("int5", "int5"), ("int8", "int5")]:
        op = spec.Operation(kind="table", name="t", inputs=("a",), output="y", dtype=output, tensors={"values": "v"})
        with pytest.raises(spec.ProgramError, match="table 't': type int5"):
            core.operation_engine(
                op, [spec.Value(dtype=source, shape=(1, 4))], {"values": np.zeros(256, np.int8)}, threads=1
            )


@pytest.mark.parametrize("implementation", accel.implementations())
@pytest.mark.parametrize("compression", [None, "lzma"])
@pytest.mark.parametrize("weight", ["int4", "int3"])
def test_narrow_weights_run_in_the_engine(
    weight: str, compression: str | None, implementation: str, tmp_path: Path
) -> None:
    program = small_program(4, channels=20, weight=weight)
    path = accel.export(program, tmp_path / "w4.safetensors", compression)
    images = images_of(program, 9)
    expected = spec.run(program, images)
    assert len(np.unique(expected)) > 20, "the program's values have died; the test would see nothing"
    for threads in (1, 2):
        engine = accel.load(path, threads=threads, implementation=implementation)
        np.testing.assert_array_equal(engine.run_integer(images), expected)


@pytest.mark.parametrize("make", [accel.Engine, accel.ReferenceEngine])
def test_profile_accounts_for_every_operation(make: type) -> None:
    program = swin_program()
    profile = make(program).profile(images_of(program, 2), repeats=3)
    names = [name for row in profile for name in row.operation.split("+")]
    assert names == [op.name for op in program.operations]
    assert profile.macs == 2 * sum(cost.macs for cost in spec.costs(program))
    assert sum(row.share for row in profile) == pytest.approx(1.0)
    assert all(row.time_ms >= 0 and row.bytes > 0 for row in profile)
    assert profile[0].kind == "conv2d"
    assert len(profile) == len(profile.to_dict()["rows"])
    table = str(profile)
    assert all(row.operation in table for row in profile)
    assert "GMAC/s" in table


@pytest.mark.parametrize("implementation", accel.implementations())
def test_profile_tells_the_share_of_the_peak(implementation: str) -> None:
    program = swin_program()
    profile = accel.Engine(program, implementation=implementation, threads=2).profile(images_of(program, 2), repeats=1)
    peak = profile.peak_gmacs_per_s
    assert peak is not None
    assert peak > 0
    told = profile.to_dict()
    assert told["peak_gmacs_per_s"] == peak
    for row, as_dict in zip(profile, told["rows"], strict=True):
        expected = row.gmacs_per_s / peak if row.macs else None
        assert profile.peak_share(row) == as_dict["peak_share"] == expected
    assert f"peak {peak:.0f} GMAC/s" in str(profile)
    with pytest.raises(ValueError, match="threads is 0"):
        accel.core._core.peak_gmacs(implementation, 0)


def test_the_reference_has_no_peak() -> None:
    program = swin_program()
    profile = accel.ReferenceEngine(program).profile(images_of(program, 1), repeats=1)
    assert profile.peak_gmacs_per_s is None
    assert all(profile.peak_share(row) is None for row in profile)
    assert " peak" not in str(profile).splitlines()[0]


def test_profile_refuses_nothing_to_time(engine: accel.Engine, program: spec.Program) -> None:
    with pytest.raises(ValueError, match="at least one image"):
        engine.profile(np.zeros((0, 24, 24, 3), dtype=np.uint8))
    with pytest.raises(ValueError, match="repeats is 0"):
        engine.profile(images_of(program, 1), repeats=0)


def test_an_artifact_runs_without_torch(program: spec.Program, path: Path) -> None:
    code = """
import sys
import numpy as np
from swincompress_pl import accel
engine = accel.load(sys.argv[1], threads=2)
images = np.random.default_rng(7).integers(0, 256, (3, *engine.input_shape)).astype(np.uint8)
print(engine.run_integer(images).tolist())
loaded = {"torch", "lightning", "timm"} & set(sys.modules)
assert not loaded, loaded
"""
    done = run_python(code, str(path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(spec.run(program, images_of(program, 3)).tolist())


def test_a_missing_extension_says_how_to_build_it() -> None:
    done = run_python("import sys; sys.modules['swincompress_pl.accel._core'] = None\nimport swincompress_pl.accel")
    assert done.returncode != 0
    assert "build it with `pip install .`" in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads as Linux does")
def test_engines_share_the_threads_of_a_process(path: Path) -> None:
    code = """
import os, sys
import numpy as np
from swincompress_pl import accel
from swincompress_pl.accel import _core
def others():
    return len(os.listdir("/proc/self/task")) - before
before = len(os.listdir("/proc/self/task"))
engines = [accel.load(sys.argv[1], threads=threads) for threads in (1, 2, 3, 16, 65, 256)]
images = np.zeros((2, *engines[0].input_shape), dtype=np.uint8)
answers = []
for engine in engines:
    answers.append(engine.run_integer(images))
    assert others() == min(engine.threads, _core.usable_cpus()) - 1, (engine, others())
assert all(np.array_equal(answer, answers[0]) for answer in answers)
del engines, engine
assert others() == 0, "threads outlive the engines"
"""
    done = run_python(code, str(path))
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space as Linux does")
@pytest.mark.skipif(_core.usable_cpus() < 2, reason="a process with one CPU starts no threads")
def test_threads_that_cannot_be_started_are_an_error(path: Path) -> None:
    code = """
import resource, sys
import numpy as np
from swincompress_pl import accel
engine = accel.load(sys.argv[1], threads=2)
images = np.zeros((1, *engine.input_shape), dtype=np.uint8)
(used,) = (line.split()[1] for line in open("/proc/self/status") if line.startswith("VmSize"))
resource.setrlimit(resource.RLIMIT_AS, (int(used) * 1024 + 2**21, resource.RLIM_INFINITY))
try:
    engine(images)
except RuntimeError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(engine(images).shape)
"""
    done = run_python(code, str(path))
    assert done.returncode == 0, done.stderr
    assert "only 1 of 2 threads could be started" in done.stdout
    assert done.stdout.endswith("(1, 7)\n")


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="needs fork")
def test_an_engine_survives_a_fork(path: Path) -> None:
    code = """
import os, sys
import numpy as np
from swincompress_pl import accel
engine = accel.load(sys.argv[1], threads=2)
images = np.zeros((1, *engine.input_shape), dtype=np.uint8)
before = engine.run_integer(images)
child = os.fork()
if child == 0:
    os._exit(0 if np.array_equal(engine.run_integer(images), before) else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = run_python(code, str(path))
    assert done.returncode == 0, done.stderr

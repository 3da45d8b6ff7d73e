"""Engines among processes, threads and signals: forks, Ctrl-C, pickles, the interpreter's end, CPU quotas, buffers."""

from __future__ import annotations

import copy
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.whole_programs import images_of, swin_program, vit_program

from swincompress_pl import accel, spec
from swincompress_pl.accel import _core, core

QUICK = 4  # cases of a kind; all of them are behind the slow marker
RUNS = 3
MANY_RUNS = 15
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="forks, timers and control groups as on Linux")

# What the scripts below begin with: an engine, images, their answers; `long` take more than half a second.
BEGIN = """
import os, signal, sys, threading, time
import numpy as np
from swincompress_pl import accel
engine = accel.load(sys.argv[1], threads=2, implementation="scalar")
few = np.random.default_rng(7).integers(0, 256, (40, *engine.input_shape)).astype(np.uint8)
right = engine.run_integer(few)

def seconds():
    start = time.perf_counter()
    engine.run_integer(few)
    return time.perf_counter() - start

long = np.zeros((int(0.6 / min(seconds() for _ in range(5)) + 5) * len(few), *few.shape[1:]), np.uint8)

def forever(work):
    def loop():
        while True:
            work()
    threading.Thread(target=loop, daemon=True).start()
    time.sleep(0.05)

def same():
    return np.array_equal(engine.run_integer(few), right)

def every(handler, seconds=0.02):
    signal.signal(signal.SIGALRM, lambda *_: handler())
    signal.setitimer(signal.ITIMER_REAL, seconds, seconds)
"""


@pytest.fixture(scope="module")
def program() -> spec.Program:
    return vit_program()


@pytest.fixture(scope="module")
def path(program: spec.Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return accel.export(program, tmp_path_factory.mktemp("artifact") / "vit.safetensors")


def run_python(code: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", BEGIN + code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def must_end_well(code: str, *arguments: str | Path) -> None:
    done = run_python(code, *arguments)
    assert (done.returncode, done.stderr) == (0, "")


# A child that hangs is killed by its alarm and so seen.
FORK = """
def fork(ends):
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        ends()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def answer():
    os._exit(0 if same() else 1)
"""
FORKS = {
    "the child answers": "codes = [fork(answer) for _ in range(RUNS)]",
    "its threads answer together": """
from concurrent.futures import ThreadPoolExecutor
def together():
    with ThreadPoolExecutor(4) as pool:
        os._exit(not all(pool.map(lambda _: same(), range(12))))
codes = [fork(together) for _ in range(RUNS)]""",
    "the child ends as processes do": "codes = [fork(lambda: sys.exit(not same())) for _ in range(RUNS)]",
    "a thread forks": """
codes = []
thread = threading.Thread(target=lambda: codes.extend(fork(answer) for _ in range(RUNS)))
thread.start()
thread.join()""",
    "a grandchild answers": "codes = [fork(lambda: os._exit(fork(answer))) for _ in range(RUNS)]",
    "both answer": "codes = [fork(lambda: os._exit(fork(answer) or not same())) for _ in range(RUNS)]",
    "the child ends without a call": "codes = [fork(sys.exit) for _ in range(RUNS)]",
    "the child loads": """
def load():
    os._exit(not np.array_equal(accel.load(sys.argv[1], threads=2).run_integer(few), right))
codes = [fork(load) for _ in range(RUNS)]""",
}


def _forks_beside_a_call(case: str, path: Path, runs: int) -> None:
    code = FORK + "forever(lambda: engine(long[:200]))\n" + FORKS[case].replace("RUNS", str(runs))
    done = run_python(code + "\nprint(codes, same(), flush=True)\nos._exit(0)", path)
    assert done.stdout.strip() == f"{[0] * runs} True", done.stderr


@on_linux
@pytest.mark.parametrize("case", [*FORKS][:QUICK])
def test_a_fork_beside_a_call_leaves_a_child_that_computes(case: str, path: Path) -> None:
    _forks_beside_a_call(case, path, RUNS)


@pytest.mark.slow
@on_linux
@pytest.mark.parametrize("case", FORKS)
def test_many_forks_beside_a_call(case: str, path: Path) -> None:
    _forks_beside_a_call(case, path, 40)


# The third run of a handler inside one call: without a look at the signals there is one, after the call.
THIRD = """
runs = []
def third():
    runs.append(1)
    if len(runs) == 3:
        signal.setitimer(signal.ITIMER_REAL, 0)
        raise KeyboardInterrupt
"""
INTERRUPTED = {
    "a call": "engine(long)",
    "a profile": "engine.profile(long[:len(long) // 4], repeats=8)",
    "one beside another caller": """
    threading.Thread(target=engine, args=(long,), daemon=True).start()
    time.sleep(0.1)
    every(third)
    engine(few[:1])
    engine(long)""",
}


@on_linux
@pytest.mark.parametrize("case", INTERRUPTED)
def test_a_signal_ends_a_long_call(case: str, path: Path) -> None:
    code = (
        f"{THIRD}every(third)\ntry:\n    {INTERRUPTED[case]}\nexcept KeyboardInterrupt:\n    print(len(runs), same())\n"
    )
    done = run_python(code, path)
    assert done.stdout.strip() == "3 True", done.stderr


@on_linux
def test_control_c_is_a_keyboard_interrupt(path: Path) -> None:
    """Two of them: the first is handled while the call goes on."""
    code = """
ignored = []
def ignore_one(*_):
    ignored.append(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGINT, ignore_one)
every(lambda: os.kill(os.getpid(), signal.SIGINT))
try:
    engine(long)
except KeyboardInterrupt:
    signal.setitimer(signal.ITIMER_REAL, 0)
    print(len(ignored), same())
"""
    done = run_python(code, path)
    assert done.stdout.strip() == "1 True", done.stderr


HANDLERS = {
    "the handler uses the engine": "lambda: found.append(same())",
    "the handler forks": "lambda: found.append(fork(answer) == 0)",
    "the handler copies the engine": "lambda: found.append(np.array_equal(copy.copy(engine).run_integer(few), right))",
}


@on_linux
@pytest.mark.parametrize("case", HANDLERS)
def test_what_handlers_do_inside_a_call_leaves_it_right(case: str, path: Path) -> None:
    code = f"""{FORK}
import copy
found = []
zeros = engine.run_integer(long[:1])
every({HANDLERS[case]}, 0.2)
logits = engine.run_integer(long)
while not found:  # however fast the machine is
    logits = engine.run_integer(long)
signal.setitimer(signal.ITIMER_REAL, 0)
print(all(found), bool((logits == zeros).all()))
"""
    done = run_python(code, path)
    assert done.stdout.strip() == "True True", done.stderr


DAEMONS = {
    "calls": "forever(lambda: engine(long[:200]))",
    "loads": "forever(lambda: accel.load(sys.argv[1]))",
    "reads": "forever(lambda: accel.load(sys.argv[1]).program)",
    "an exception of the call": """
def refused():
    try:
        engine._core.run([few[:, :1]])
    except ValueError:
        engine(few)
forever(refused)""",
    "small calls": "forever(lambda: engine(few[:1]))",
    "two callers": "[forever(lambda: engine(long[:200])) for _ in range(2)]",
    "profiles": "forever(lambda: engine.profile(few, repeats=2))",
    "the kernel alone": "a = np.ones((64, 64), np.int8)\nforever(lambda: accel.matmul(a, a, threads=2))",
    "sys.exit": "forever(lambda: engine(few))\nsys.exit(0)",
}


@on_linux
@pytest.mark.parametrize("case", [*DAEMONS][:QUICK])
def test_the_interpreter_ends_beside_a_daemon_thread(case: str, path: Path) -> None:
    for _ in range(RUNS if case == "calls" else 1):
        must_end_well(DAEMONS[case], path)


@pytest.mark.slow
@on_linux
@pytest.mark.parametrize("case", DAEMONS)
def test_the_interpreter_ends_many_times_beside_a_daemon_thread(case: str, path: Path) -> None:
    for _ in range(MANY_RUNS):
        must_end_well(DAEMONS[case], path)


def loaded(path: Path, tmp_path: Path) -> accel.Engine:
    return accel.load(path, threads=2, implementation="scalar")


def asked(path: Path, tmp_path: Path) -> accel.Engine:
    engine = loaded(path, tmp_path)
    assert engine.program
    return engine


def made(path: Path, tmp_path: Path) -> accel.Engine:
    return accel.Engine(vit_program(), threads=2, implementation="scalar")


def coded(path: Path, tmp_path: Path) -> accel.Engine:
    return loaded(accel.export(vit_program(), tmp_path / "coded.safetensors", "lzma"), tmp_path)


def unlinked(path: Path, tmp_path: Path) -> accel.Engine:
    given = accel.export(vit_program(), tmp_path / "gone.safetensors")
    engine = loaded(given, tmp_path)
    given.unlink()
    return engine


COPIES: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda engine: pickle.loads(pickle.dumps(engine)),
    "an old protocol": lambda engine: pickle.loads(pickle.dumps(engine, 2)),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "in a container": lambda engine: copy.deepcopy({"engine": [engine]})["engine"][0],
    "twice": lambda engine: copy.deepcopy(pickle.loads(pickle.dumps(engine))),
}


@pytest.mark.parametrize("make", [loaded, asked, made, coded, unlinked])
@pytest.mark.parametrize("how", COPIES)
def test_engines_are_pickled_and_copied(
    make: Callable[[Path, Path], accel.Engine], how: str, path: Path, tmp_path: Path
) -> None:
    engine = make(path, tmp_path)
    again = COPIES[how](engine)
    assert (again.threads, again.implementation) == (2, "scalar")
    assert (again.classes, again.num_classes, again.input_shape) == (
        engine.classes,
        engine.num_classes,
        engine.input_shape,
    )
    images = images_of(engine.program, 5)
    np.testing.assert_array_equal(again(images), engine(images))
    assert again._core is not engine._core
    assert again.program.describe() == engine.program.describe()


def test_a_copy_shares_the_bytes_of_the_artifact(path: Path) -> None:
    engine = accel.load(path)
    assert copy.deepcopy(engine)._program is engine._program
    assert len(pickle.dumps(engine)) < path.stat().st_size + 1000


class Named(accel.Engine):
    name = "without"


def test_subclasses_and_their_attributes_travel(program: spec.Program) -> None:
    engine = Named(program)
    engine.name = "mine"
    again = pickle.loads(pickle.dumps(engine))
    assert (type(again), again.name) == (Named, "mine")


def test_an_implementation_of_another_machine_is_replaced_and_said(path: Path) -> None:
    engine = accel.load(path, threads=1)
    state = engine.__getstate__() | {"implementation": "sse9"}
    again = accel.Engine.__new__(accel.Engine)
    with pytest.warns(UserWarning, match="pickled with implementation='sse9', which cannot run here"):
        again.__setstate__(state)
    assert again.implementation == accel.implementations()[0]


def test_altered_pickles_are_refused_as_artifacts_are(path: Path) -> None:
    state = accel.load(path).__getstate__()
    altered = bytearray(path.read_bytes())
    altered[-1] ^= 1
    with pytest.raises(ValueError, match="checksum"):
        accel.Engine.__new__(accel.Engine).__setstate__(state | {"_program": bytes(altered)})


def test_an_engine_reads_its_file_again_and_notices_what_was_written_to_it(path: Path, tmp_path: Path) -> None:
    file = tmp_path / "network.safetensors"
    shutil.copy(path, file)
    engines = [accel.load(file) for _ in range(3)]
    file.rename(tmp_path / "elsewhere")
    file.write_text("another file")
    assert engines[0].program.describe() == accel.reference(path).program.describe()
    content = bytearray((tmp_path / "elsewhere").read_bytes())
    content[-1] ^= 1
    (tmp_path / "elsewhere").write_bytes(content)
    os.utime(tmp_path / "elsewhere", ns=(1, 1))
    with pytest.raises(accel.ArtifactError, match=r"network\.safetensors: written to after it was loaded; load"):
        pickle.dumps(engines[1])
    images = images_of(engines[0].program, 2)
    np.testing.assert_array_equal(engines[1](images), engines[0](images))
    (tmp_path / "elsewhere").write_bytes(b"")
    with pytest.raises(accel.ArtifactError, match="written to after it was loaded"):
        _ = engines[2].program


@pytest.mark.skipif(sys.platform != "linux", reason="reads memory as Linux tells it")
def test_an_engine_takes_little_more_memory_than_its_file(tmp_path: Path) -> None:
    """Neither the file nor a second copy of the weights stays."""
    file = accel.export(swin_program(channels=384, heads=(12, 24), depths=(1, 3)), tmp_path / "wide.safetensors")
    code = """
import os, sys
from swincompress_pl import accel
def kept(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))
before = kept("VmRSS")
engine = accel.load(sys.argv[1], threads=1)
print((kept("VmRSS") - before) / os.path.getsize(sys.argv[1]), (kept("VmHWM") - before) / os.path.getsize(sys.argv[1]))
"""
    done = subprocess.run([sys.executable, "-c", code, file], capture_output=True, text=True, check=True)
    after, peak = map(float, done.stdout.split())
    assert after < 1.4, done.stdout
    assert peak < 1.4, done.stdout


@pytest.mark.parametrize("how", COPIES)
def test_references_programs_and_layers_are_pickled_and_copied(how: str, path: Path) -> None:
    reference, program = accel.reference(path), vit_program()
    images = images_of(program, 2)
    np.testing.assert_array_equal(COPIES[how](reference)(images), reference(images))
    np.testing.assert_array_equal(spec.run(COPIES[how](program), images), spec.run(program, images))
    layer = accel.export_layer(Linear())
    x = np.arange(12, dtype=np.int8).reshape(3, 4)
    before = layer(x)  # an engine is kept from here on
    np.testing.assert_array_equal(COPIES[how](layer)(x), before)


class Linear:
    weight = np.arange(-4.0, 4.0).reshape(2, 4)
    bias = None


@on_linux
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_engines_are_handed_to_processes_beside_a_call(method: str, path: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        """
import multiprocessing, sys, threading
import numpy as np
from swincompress_pl import accel

def answer(engine, images):
    return engine.run_integer(images), engine.threads, engine.implementation

if __name__ == "__main__":
    engine = accel.load(sys.argv[1], threads=2, implementation="scalar")
    images = np.zeros((3, *engine.input_shape), np.uint8)
    threading.Thread(target=lambda: [engine(np.zeros((64, *engine.input_shape), np.uint8)) for _ in iter(int, 1)],
                     daemon=True).start()
    with multiprocessing.get_context(sys.argv[2]).Pool(2) as pool:
        for logits, threads, implementation in pool.starmap(answer, [(engine, images)] * 3):
            assert np.array_equal(logits, engine.run_integer(images))
            assert (threads, implementation) == (2, "scalar")
    print("right")
""",
        encoding="utf-8",
    )
    command = [sys.executable, str(script), str(path), method]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "right\n"), done.stderr


V1 = "33 24 0:30 {root} {point} rw,relatime - cgroup cgroup rw,cpu,cpuacct"
V2 = "33 24 0:30 {root} {point} rw,relatime shared:9 - cgroup2 cgroup2 rw,nsdelegate"
OTHERS = "24 1 0:23 / / rw - ext4 /dev/root rw\n25 24 0:24 / /cg/mem rw - cgroup cgroup rw,memory\nshort\n"
# (mounts, /proc/self/cgroup, files, CPUs)
QUOTAS = {
    "v2": ([V2.format(root="/", point="/cg")], "0::/a/b", {"/cg/a/b/cpu.max": "100000 100000"}, 1),
    "v2 without a quota": ([V2.format(root="/", point="/cg")], "0::/a", {"/cg/a/cpu.max": "max 100000"}, None),
    "v2, the parent's": (
        [V2.format(root="/", point="/cg")],
        "0::/a/b",
        {"/cg/a/cpu.max": "50000 50000", "/cg/a/b/cpu.max": "max 100000"},
        1,
    ),
    "v2 in a container": ([V2.format(root="/", point="/cg")], "0::/", {"/cg/cpu.max": "150000 100000"}, 1),
    "v2 from outside": ([V2.format(root="/", point="/cg")], "0::/../x", {"/cg/cpu.max": "100000 100000"}, 1),
    "less than a CPU": ([V2.format(root="/", point="/cg")], "0::/", {"/cg/cpu.max": "20000 100000"}, 1),
    "more than there are": ([V2.format(root="/", point="/cg")], "0::/", {"/cg/cpu.max": "900000000 100000"}, None),
    "v1": (
        [V1.format(root="/", point="/cg/cpu")],
        "3:memory:/m\n4:cpu,cpuacct:/a\n0::/",
        {"/cg/cpu/a/cpu.cfs_quota_us": "100000", "/cg/cpu/a/cpu.cfs_period_us": "100000"},
        1,
    ),
    "v1 without a quota": (
        [V1.format(root="/", point="/cg/cpu")],
        "4:cpu,cpuacct:/a",
        {"/cg/cpu/a/cpu.cfs_quota_us": "-1", "/cg/cpu/a/cpu.cfs_period_us": "100000"},
        None,
    ),
    "v1 in a container": (
        [V1.format(root="/docker/0f", point="/cg/cpu")],
        "4:cpu,cpuacct:/docker/0f",
        {"/cg/cpu/cpu.cfs_quota_us": "199999", "/cg/cpu/cpu.cfs_period_us": "100000"},
        1,
    ),
    "both, hybrid": (
        [V2.format(root="/", point="/cg/unified"), V1.format(root="/", point="/cg/cpu")],
        "4:cpu,cpuacct:/a\n0::/a",
        {"/cg/cpu/a/cpu.cfs_quota_us": "100000", "/cg/cpu/a/cpu.cfs_period_us": "100000"},
        1,
    ),
    "nonsense": ([V2.format(root="/", point="/cg")], "no colons", {"/cg/cpu.max": "often 0"}, None),
    "of another controller": ([], "0::/", {"/cg/mem/cpu.max": "100000 100000"}, None),
}


@on_linux
@pytest.mark.parametrize("case", QUOTAS)
def test_cpu_quotas_bound_the_default_number_of_threads(case: str, tmp_path: Path) -> None:
    mounts, groups, files, expected = QUOTAS[case]
    written = {"/proc/self/mountinfo": OTHERS + "\n".join(mounts), "/proc/self/cgroup": groups, **files}
    for name, text in written.items():
        (tmp_path / name[1:]).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name[1:]).write_text(text + "\n", encoding="utf-8")
    assert _core.usable_cpus(str(tmp_path)) == (expected or len(os.sched_getaffinity(0)))


@on_linux
def test_without_control_groups_the_affinity_decides(path: Path, tmp_path: Path) -> None:
    assert _core.usable_cpus(str(tmp_path)) == len(os.sched_getaffinity(0))
    code = "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\nprint(accel.load(sys.argv[1]).threads)"
    assert run_python(code, path).stdout.strip() == "1"


def test_the_default_is_the_usable_cpus_up_to_the_maximum(
    program: spec.Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    for usable, threads in ((3, 3), (1000, 256)):
        monkeypatch.setattr(core._core, "usable_cpus", lambda usable=usable: usable)
        assert accel.Engine(program).threads == threads


# What a handler does to the images inside a call, and the error that it must get.
RESIZED = {
    "the array": ("images = long", "images.resize((1, *few.shape[1:]), refcheck=False)", "ValueError"),
    "the array below a view": ("images = long[5:]", "long.resize((1, *few.shape[1:]), refcheck=False)", "ValueError"),
    "the array below two views": ("images = long[1:][1:]", "long.resize((0,), refcheck=False)", "ValueError"),
    "a bytearray": (
        "owner = bytearray(long.nbytes)\nimages = np.frombuffer(owner, np.uint8).reshape(long.shape)",
        "owner.clear()",
        "BufferError",
    ),
    "a map": (
        "import mmap\nowner = mmap.mmap(-1, long.nbytes)\nimages = np.frombuffer(owner, np.uint8).reshape(long.shape)",
        "owner.close()",
        "BufferError",
    ),
}


@on_linux
@pytest.mark.parametrize("case", RESIZED)
def test_memory_that_is_being_read_stays(case: str, path: Path) -> None:
    make, resize, error = RESIZED[case]
    code = f"""
{make}
found = []
def attempt():
    if found:
        return
    try:
        {resize}
    except Exception as error:
        found.append(type(error).__name__)
    else:
        found.append("resized")
zeros = engine.run_integer(long[:1])
every(attempt)
logits = engine.run_integer(images)
signal.setitimer(signal.ITIMER_REAL, 0)
print(found[0], bool((logits == zeros).all()))
"""
    done = run_python(code, path)
    assert done.stdout.strip() == f"{error} True", done.stderr


@on_linux
def test_arrays_can_be_resized_after_the_call(path: Path) -> None:
    must_end_well("a = few.copy()\nengine(a)\na.resize((1, *few.shape[1:]))", path)


@on_linux
def test_images_changed_in_a_call_are_the_old_or_the_new(path: Path) -> None:
    code = """
zeros, ones = engine.run_integer(long[:1]), engine.run_integer(np.full_like(long[:1], 255))

def change():
    signal.setitimer(signal.ITIMER_REAL, 0)
    long.fill(255)

every(change)
logits = engine.run_integer(long)
old, new = (logits == zeros).all(axis=1), (logits == ones).all(axis=1)
print(bool((old | new).all()), bool(old.any() and new.any()))
"""
    done = run_python(code, path)
    assert done.stdout.strip() == "True True", done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="counts open files as Linux tells them")
@pytest.mark.filterwarnings("error")
def test_an_engine_closes_its_file_when_it_goes(path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    engine = accel.load(path, threads=1)
    assert len(os.listdir("/proc/self/fd")) == before + 1
    assert engine.program is engine.program  # from here on the file is not needed
    assert len(os.listdir("/proc/self/fd")) == before
    engine = accel.load(path, threads=1)
    again = copy.deepcopy(engine)
    del engine
    assert len(os.listdir("/proc/self/fd")) == before + 1
    del again
    assert len(os.listdir("/proc/self/fd")) == before


SMALL_SIGNAL_STACK = """
import ctypes, sys
import numpy as np

class Stack(ctypes.Structure):
    _fields_ = [("pointer", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]

memory = ctypes.create_string_buffer(6000)
assert ctypes.CDLL(None).sigaltstack(ctypes.byref(Stack(ctypes.addressof(memory), 0, len(memory))), None) == 0
from swincompress_pl import accel
engine = accel.load(sys.argv[1])
assert engine.implementation == accel.implementations()[0] != "amx_int8"
engine.run_integer(np.zeros((1, *engine.input_shape), np.uint8))
try:
    accel.load(sys.argv[1], implementation="amx_int8")
except ValueError as error:
    print(error)
"""


@pytest.mark.skipif("amx_int8" not in accel.implementations(), reason="this CPU has no AMX, or may not use it")
def test_where_linux_refuses_amx_the_next_implementation_runs(path: Path) -> None:
    command = [sys.executable, "-c", SMALL_SIGNAL_STACK, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "implementation 'amx_int8' cannot run on this CPU; this CPU can run: avx512_vnni, " in done.stdout

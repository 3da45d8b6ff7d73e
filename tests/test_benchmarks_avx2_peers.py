"""Other runtimes held to AVX2: libraries without cpuid, the handler that answers for it, and the checks of runtimes."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.engine import __main__ as main
from benchmarks.engine import avx2_peers, held, hold_to_avx2, measure
from benchmarks.pages import avx2_peers as page
from swincompress_pl import accel, models
from swincompress_pl.report.comparison.compare import Runner, process_environment

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64" or not (shutil.which("gcc") and shutil.which("objdump")),
    reason="runtimes are held on Linux and x86-64, with gcc and objdump",
)
ASKS = """
#include <stdint.h>
void ask(uint32_t leaf, uint32_t subleaf, uint32_t* r) {
    __asm__ volatile("cpuid" : "=a"(r[0]), "=b"(r[1]), "=c"(r[2]), "=d"(r[3]) : "a"(leaf), "c"(subleaf));
}
uint32_t last_leaf(void) {
    uint32_t leaf = 0;
    __asm__ volatile("cpuid" : "+a"(leaf) : : "rbx", "rcx", "rdx");
    return leaf;
}
void broken(void) { __builtin_trap(); }
"""
# Bits of AVX-512, VNNI and AMX by (leaf, subleaf) and register EAX, EBX, ECX, EDX, of Intel's reference.
WIDE = {
    (7, 0): ((), (16, 17, 21, 26, 27, 28, 30, 31), (1, 6, 11, 12, 14), (2, 3, 8, 22, 23, 24, 25)),
    (7, 1): ((4, 5, 21), (), (), (4, 8, 10, 19)),
}
ALL = 0xFFFFFFFF
ASK = """
import ctypes, json, sys
library, found = ctypes.CDLL(sys.argv[1]), []
for leaf, subleaf in ((0, 0), (7, 0), (7, 1), (0xD, 0)):
    registers = (ctypes.c_uint32 * 4)()
    library.ask(leaf, subleaf, registers)
    found.append([[leaf, subleaf], list(registers)])
handler = ctypes.CDLL(None)
print(json.dumps([found, handler.cpuid_answers() if hasattr(handler, "cpuid_answers") else 0]))
"""
WIDE_CALL = """
import ctypes, json, sys
from benchmarks.engine import held
watch, library = ctypes.CDLL(sys.argv[1]), ctypes.CDLL(sys.argv[2])
calls = (lambda: None, library.mask, library.high, lambda: None, library.other_thread, lambda: None)
print(json.dumps([held.written_by(call, watch) for call in calls]))
"""
WRITES = """
#include <pthread.h>
#include <unistd.h>
void mask(void) { __asm__ volatile("kxnorw %%k1, %%k1, %%k1" : :); }
void high(void) { __asm__ volatile("vpternlogd $255, %%zmm20, %%zmm20, %%zmm20" : :); }
static volatile long left = 100000000;
static void* spin_and_wait(void* unused) {
    high();
    while (left > 0) --left;
    for (;;) pause();
    return unused;
}
void other_thread(void) {
    pthread_t thread;
    pthread_create(&thread, 0, spin_and_wait, 0);
    while (left == 100000000) continue;
}
"""


def kept(leaf: int, subleaf: int) -> list[int]:
    """The bits of each register that no answer may lose."""
    return [ALL & ~sum(1 << bit for bit in bits) for bits in WIDE.get((leaf, subleaf), ((), (), (), ()))]


def compiled(folder: Path, name: str, text: str) -> Path:
    source = folder / f"{name}.c"
    source.write_text(text)
    return hold_to_avx2.build_library(source, folder)


def asked(library: Path, *, handler: Path | None = None, code: str = ASK) -> subprocess.CompletedProcess[str]:
    environment = os.environ | ({} if handler is None else {"LD_PRELOAD": str(handler)})
    command = [sys.executable, "-c", code, str(library)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package with a library that asks the CPU and one that does not."""
    folder = tmp_path / "package"
    (folder / "inner").mkdir(parents=True)
    compiled(folder / "inner", "asks", ASKS)
    compiled(folder, "plain", "int zero(void) { return 0; }")
    return folder


def test_every_cpuid_is_replaced(package: Path) -> None:
    library = package / "inner" / "asks.so"
    before, size = hold_to_avx2.cpuid_addresses(library), library.stat().st_size
    assert len(before) == 2
    assert hold_to_avx2.replace_in_package(package) == {"asks.so": tuple(before)}
    assert hold_to_avx2.cpuid_addresses(library) == []
    assert library.stat().st_size == size
    assert hold_to_avx2.cpuid_addresses(package / "plain.so") == []


def test_the_handler_answers_as_the_cpu_does_without_the_wide_bits(package: Path, tmp_path: Path) -> None:
    library = package / "inner" / "asks.so"
    real, _ = json.loads(asked(library).stdout)
    sites = hold_to_avx2.replace_in_package(package)
    handler = hold_to_avx2.build_handler([("asks.so", address) for address in sites["asks.so"]], tmp_path)
    answers, count = json.loads(asked(library, handler=handler).stdout)
    assert count == len(answers) == len(real)
    for (leaf, registers), (_, masked) in zip(real, answers, strict=True):
        assert masked == [value & bits for value, bits in zip(registers, kept(*leaf), strict=True)]
    assert asked(library).returncode == -signal.SIGILL, "without the handler"


@pytest.mark.parametrize("leaf", [(7, 0), (7, 1), (7, 2), (1, 0), (0xD, 0)])
def test_no_other_bit_is_masked(leaf: tuple[int, int], tmp_path: Path) -> None:
    handler = ctypes.CDLL(str(hold_to_avx2.build_handler([("asks.so", 0)], tmp_path)))
    registers = (ctypes.c_uint32 * 4)(ALL, ALL, ALL, ALL)
    handler.mask_cpuid(*leaf, registers)
    assert list(registers) == kept(*leaf)


def test_an_illegal_instruction_of_others_still_ends_the_process(package: Path, tmp_path: Path) -> None:
    library = package / "inner" / "asks.so"
    sites = hold_to_avx2.replace_in_package(package)
    handler = hold_to_avx2.build_handler([("asks.so", address) for address in sites["asks.so"]], tmp_path)
    code = "import ctypes, sys; library = ctypes.CDLL(sys.argv[1]); print(library.last_leaf(), flush=True)"
    done = asked(library, handler=handler, code=code)
    assert done.returncode == 0
    assert int(done.stdout) >= 7
    assert asked(library, handler=handler, code=f"{code}; library.broken()").returncode == -signal.SIGILL
    others = hold_to_avx2.build_handler([("others.so", address) for address in sites["asks.so"]], tmp_path)
    assert asked(library, handler=others).returncode == -signal.SIGILL, "the same addresses of another library"


def test_a_package_that_does_not_ask_is_named(tmp_path: Path) -> None:
    compiled(tmp_path, "plain", "int zero(void) { return 0; }")
    with pytest.raises(ValueError, match=f"no library of {tmp_path.name} has a cpuid instruction"):
        hold_to_avx2.replace_in_package(tmp_path)
    (tmp_path / "text.so").write_bytes(b"no library \x0f\xa2")
    with pytest.raises(ValueError, match=r"objdump cannot read text\.so: "):
        hold_to_avx2.replace_in_package(tmp_path)


def test_a_missing_tool_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools = {name: shutil.which(name) for name in ("objdump", "gcc")}
    monkeypatch.setattr(avx2_peers, "measure_model", lambda *_, **__: pytest.fail("it went to work"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"objdump is not installed; on Debian `apt-get install binutils`"):
        main.main(["avx2-peers"])
    (tmp_path / "objdump").symlink_to(str(tools["objdump"]))
    with pytest.raises(FileNotFoundError, match=r"gcc is not installed; on Debian `apt-get install gcc`"):
        main.main(["avx2-peers"])
    (tmp_path / "gcc").symlink_to(str(tools["gcc"]))
    hold_to_avx2.check_tools()
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    with pytest.raises(OSError, match="on Linux and x86-64 only, and this is linux on aarch64"):
        main.main(["avx2-peers"])


def test_a_source_that_gcc_refuses_is_named(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"gcc cannot build wrong\.c: "):
        compiled(tmp_path, "wrong", "no C")


def test_runtimes_without_a_hold_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hold = hold_to_avx2.Hold(folder=tmp_path, sites={"onnxruntime": {}}, handler=tmp_path / "handler.so")
    with pytest.raises(ValueError, match="mnn cannot be held to AVX2; engine, torch"):
        hold.environment("mnn")
    with pytest.raises(ValueError, match="--against: mnn, executorch cannot be held to AVX2"):
        avx2_peers.main(["--against", "torch,mnn,executorch"])
    monkeypatch.setattr(accel, "implementations", lambda: ("scalar",))
    with pytest.raises(ValueError, match="this CPU has no AVX2; the engine runs scalar here"):
        avx2_peers.main([])
    assert hold.environment("onnxruntime")["PYTHONPATH"] == str(tmp_path)
    assert hold.environment("onnxruntime")["LD_PRELOAD"] == str(tmp_path / "handler.so")
    assert "LD_PRELOAD" not in hold.environment("openvino"), "it is not installed here"
    assert hold.environment("torch")["ATEN_CPU_CAPABILITY"] == "avx2"


def test_written_registers_are_found(tmp_path: Path) -> None:
    if "avx512f" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this CPU has no AVX-512 to find")
    watch = hold_to_avx2.build_library(held.WATCH, tmp_path)
    writes = compiled(tmp_path, "writes", WRITES)
    environment = process_environment(runner("engine")) | hold_to_avx2.EVERY_PROCESS
    environment["PYTHONPATH"] += f":{Path(measure.__file__).parents[2]}"
    command = [sys.executable, "-P", "-c", WIDE_CALL, str(watch), str(writes)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [[], ["opmask"], ["ZMM 16 to 31"], [], ["ZMM 16 to 31"], []]


def runner(runtime: str, **settings: Any) -> Runner:
    return Runner(name=runtime, runtime=runtime, threads=1, batch=1, image_shape=(1, 1, 3), **settings)


@pytest.mark.parametrize(
    ("runtime", "found", "why_not"),
    [
        ("torch", {}, None),
        ("torch", {"registers": ["opmask"]}, "it writes opmask"),
        ("onnxruntime", {"cpuid_answers": 33, "saturates": True}, None),
        ("onnxruntime", {"cpuid_answers": 33, "saturates": False}, "do not saturate"),
        ("onnxruntime", {"saturates": True}, "not answered by the handler"),
        ("openvino", {"error": "RuntimeError: no"}, "RuntimeError: no"),
    ],
)
def test_a_runtime_that_is_not_held_does_not_race(
    runtime: str, found: dict[str, Any], why_not: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = found if "error" in found else {"registers": [], "cpuid_answers": 0, "saturates": None} | found
    monkeypatch.setattr(held, "run_once", lambda *_: answer)
    hold = hold_to_avx2.Hold(folder=tmp_path, sites={"onnxruntime": {}, "openvino": {}}, handler=tmp_path)
    checked, facts = held.check(runner(runtime), hold, tmp_path)
    assert dict(checked.environment) == hold.environment(runtime)
    assert facts["why_not"] == checked.unavailable
    if why_not is None:
        assert checked.unavailable is None
    else:
        assert why_not in str(checked.unavailable)


def test_a_missing_runtime_is_not_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held, "run_once", lambda *_: pytest.fail("it was started"))
    hold = hold_to_avx2.Hold(folder=tmp_path, sites={}, handler=tmp_path)
    checked, facts = held.check(runner("torch", unavailable="not installed: torch"), hold, tmp_path)
    assert checked.unavailable == facts["why_not"] == "not installed: torch"


@pytest.mark.skipif("avx2" not in accel.implementations(), reason="this CPU has no AVX2")
def test_results_are_written_and_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = models.create_model

    def create(name: str) -> Any:
        network = whole(name, img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=2, num_classes=7)
        network.pretrained_cfg["input_size"] = (3, 32, 32)
        return network

    monkeypatch.setattr(models, "create_model", create)
    monkeypatch.setattr(avx2_peers, "hold_to_avx2", lambda folder: hold_to_avx2.hold_to_avx2(folder, ()))
    broken = runner("engine", file="gone")
    monkeypatch.setattr(measure, "prepare", lambda *_, **__: {1: [Runner(**(vars(broken) | {"name": "broken"}))]})
    settings = ("--rounds", "1", "--turn-ms", "1", "--images-checked", "1", "--output", str(tmp_path))
    assert main.main(["avx2-peers", "--model", "deit_tiny_patch16_224", "--against", "", *settings]) == 0
    figures = json.loads((tmp_path / "peers-deit_tiny_patch16_224-b1.json").read_text())
    (race,) = figures["races"]
    assert figures["implementation"] == "avx2"
    assert figures["answers"]["equal_to_reference"]
    assert race["checks"][0]["held"]["registers"] == race["checks"][0]["free"]["registers"] == []
    assert race["results"][1]["name"] == "engine, 7-bit weights"
    assert race["results"][1]["latency"]
    assert "gone" in race["checks"][2]["why_not"]
    assert race["results"][2]["unavailable"] == race["checks"][2]["why_not"]
    figures["environment"]["commit"] = None  # as in a copy without its history
    text = "\n".join(page.parts([figures]))
    assert ", commit not known. " in text
    assert f"- broken did not run: {race['checks'][2]['why_not']}" in text
    assert "| swincompress_pl  " in text
    assert "| swincompress_pl, 7-bit weights |" in text
    assert "did not run" in (tmp_path / "peers-deit_tiny_patch16_224-b1.md").read_text()


def test_without_results_the_page_says_so() -> None:
    assert "There are no results yet." in page.parts([])[0]


@pytest.mark.slow
def test_onnxruntime_is_held(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    hold = hold_to_avx2.hold_to_avx2(tmp_path, ["onnxruntime"])
    original = {file.name: file for file in Path(onnxruntime.__file__).parent.rglob("*.so*")}
    sites = hold.sites["onnxruntime"]
    assert any(library.startswith("onnxruntime_pybind11_state") for library in sites)
    for library, found in sites.items():
        assert len(found) == len(hold_to_avx2.cpuid_addresses(original[library])) > 0
        assert hold_to_avx2.cpuid_addresses(next((tmp_path / "onnxruntime").rglob(library))) == []
    code = "import json; from benchmarks.engine import held; print(held.products_saturate(), held.cpuid_answers() > 0)"
    environment = process_environment(runner("onnxruntime", environment=hold.environment("onnxruntime")))
    environment["PYTHONPATH"] += f":{Path(measure.__file__).parents[2]}"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["True", "True"]

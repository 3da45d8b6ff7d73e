"""Holds other runtimes to AVX2 on a CPU that has more, for a fair race with `--implementation avx2`.

torch, oneDNN and MKL read a limit from their environment. onnxruntime and OpenVINO ask the CPU. They run from copies
whose `cpuid` instructions are replaced by `ud2`. A preloaded library handles the signal that each `ud2` raises. It
answers as the CPU does, but without AVX-512, VNNI and AMX.
"""

from __future__ import annotations

import importlib.util
import platform
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

ASKING = ("onnxruntime", "openvino")  # packages that ask the CPU
_CPUID, _UD2 = b"\x0f\xa2", b"\x0f\x0b"
_HANDLER = Path(__file__).with_name("hold_to_avx2.c")
_LOADED = 1  # PT_LOAD
_PAGE = 4096
# glibc takes the copies and searches of AVX-512 where it is there, in every process.
_WIDE = ("AVX512F", "AVX512VL", "AVX512BW", "AVX512DQ", "AVX512CD")
EVERY_PROCESS = {"GLIBC_TUNABLES": "glibc.cpu.hwcaps=" + ",".join(f"-{name}" for name in _WIDE)}
_ONEDNN = {"ONEDNN_MAX_CPU_ISA": "AVX2", "DNNL_MAX_CPU_ISA": "AVX2"}
_LIMITS: dict[str, dict[str, str]] = {
    "engine": {},  # it is told by its implementation
    "torch": {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", **_ONEDNN},
    "onnxruntime": {},
    "openvino": _ONEDNN,
}
HELD = tuple(_LIMITS)


@dataclass(frozen=True, kw_only=True)
class Hold:
    """Copies of packages that ask the CPU, and the library that answers them.

    Attributes:
        folder: Where the copies are.
        sites: {package: {library: addresses of the replaced instructions}}.
        handler: The library to preload.
    """

    folder: Path
    sites: Mapping[str, Mapping[str, tuple[int, ...]]]
    handler: Path

    def environment(self, runtime: str) -> dict[str, str]:
        """The variables under which a runtime, a key of `worker.BUILDERS`, is held; ValueError for one without them."""
        if runtime not in _LIMITS:
            raise ValueError(f"{runtime} cannot be held to AVX2; {', '.join(HELD)} can")
        asks = {"PYTHONPATH": str(self.folder), "LD_PRELOAD": str(self.handler)} if runtime in self.sites else {}
        return EVERY_PROCESS | _LIMITS[runtime] | asks


def hold_to_avx2(folder: Path, packages: Iterable[str] = ASKING) -> Hold:
    """Copies those of `packages` that are installed into `folder`, replaces their `cpuid`, and builds the handler.

    An OSError is raised where this is no Linux on x86-64, a FileNotFoundError where objdump or gcc is missing, and a
    ValueError where a package has no `cpuid`.
    """
    check_tools()
    sites = {}
    for package in packages:
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.submodule_search_locations:
            copy = folder / package
            shutil.copytree(spec.submodule_search_locations[0], copy, ignore=shutil.ignore_patterns("__pycache__"))
            sites[package] = replace_in_package(copy)
    every = [(library, address) for found in sites.values() for library, at in found.items() for address in at]
    return Hold(folder=folder, sites=sites, handler=build_handler(every, folder))


def check_tools() -> None:
    """Raises what `hold_to_avx2` does for a wrong machine or a missing tool."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        here = f"{sys.platform} on {platform.machine()}"
        raise OSError(f"runtimes are held to AVX2 on Linux and x86-64 only, and this is {here}")
    for tool, package in (("objdump", "binutils"), ("gcc", "gcc")):
        if shutil.which(tool) is None:
            raise FileNotFoundError(f"{tool} is not installed; on Debian `apt-get install {package}` brings it")


def replace_in_package(package: Path) -> dict[str, tuple[int, ...]]:
    """Replaces every `cpuid` of a package's libraries; {library: where}. ValueError where there is none."""
    libraries = sorted(file for file in package.rglob("*.so*") if file.is_file() and _CPUID in file.read_bytes())
    sites = {library.name: tuple(replace_cpuid(library)) for library in libraries}
    if not any(sites.values()):
        raise ValueError(f"no library of {package.name} has a cpuid instruction, so none can be held to AVX2 by it")
    return {library: found for library, found in sites.items() if found}


def replace_cpuid(library: Path) -> list[int]:
    """Replaces every `cpuid` of a library by `ud2`; returns their addresses, counted from where it is loaded."""
    addresses = cpuid_addresses(library)
    content = bytearray(library.read_bytes())
    segments = _loaded_segments(content)
    for address in addresses:
        at = next(offset + address - start for start, offset, size in segments if start <= address < start + size)
        if content[at : at + 2] != _CPUID:
            raise ValueError(f"{library.name} has no cpuid at {address:#x}, where objdump reads one")
        content[at : at + 2] = _UD2
    library.write_bytes(content)
    first = min(start for start, _, _ in segments) // _PAGE * _PAGE
    return [address - first for address in addresses]


def cpuid_addresses(library: Path) -> list[int]:
    """The addresses of the `cpuid` instructions that objdump reads in a library."""
    command = ["objdump", "--disassemble", "--no-show-raw-insn", str(library)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        found = [int(line.partition(":")[0], 16) for line in process.stdout if line.rstrip().endswith("\tcpuid")]
        errors = process.stderr.read().strip()
    if process.returncode != 0:
        raise ValueError(f"objdump cannot read {library.name}: {errors}")
    return found


def build_handler(sites: Iterable[tuple[str, int]], folder: Path) -> Path:
    """Builds the library that answers for the `cpuid` at `sites`, (name of a library, address)."""
    entries = "".join(f'    {{"{library}", UINT64_C({address:#x})}}, \\\n' for library, address in sites)
    (folder / "sites.h").write_text(f"#define SITES \\\n{entries}\n", encoding="utf-8")
    return build_library(_HANDLER, folder)


def build_library(source: Path, folder: Path) -> Path:
    """Compiles one C file to a shared library in `folder`."""
    library = folder / f"{source.stem}.so"
    command = ["gcc", "-O2", "-shared", "-fPIC", f"-I{folder}", "-o", str(library), str(source), "-ldl", "-pthread"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"gcc cannot build {source.name}: {done.stderr.strip()[:500]}")
    return library


def _loaded_segments(content: bytes | bytearray) -> list[tuple[int, int, int]]:
    """(address, offset in the file, bytes) of what is loaded of a 64-bit ELF file."""
    (start,) = struct.unpack_from("<Q", content, 32)
    size, count = struct.unpack_from("<HH", content, 54)
    headers = (struct.unpack_from("<IIQQQQ", content, start + number * size) for number in range(count))
    return [(address, offset, length) for kind, _, offset, address, _, length in headers if kind == _LOADED]

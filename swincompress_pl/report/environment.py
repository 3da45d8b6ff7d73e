"""What a measurement was made on: CPU, threads, versions, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from swincompress_pl import __version__

# What decides the speed of an int8 or fp32 kernel, in the order in which a reader looks for it.
_RELEVANT_FLAGS = (
    "sse4_1", "ssse3", "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni",
    "avx512_bf16", "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "sve",
)  # fmt: skip
_PACKAGES = ("torch", "torchvision", "lightning", "timm", "spikingjelly", "numpy", "onnxruntime", "openvino", "nncf")


def describe_environment(*, threads: int | None = None) -> dict[str, Any]:
    """Returns JSON-able facts about this machine and the installed packages, without paths or personal data.

    Args:
        threads: Number of threads of the measurement; None if it is unknown.

    Returns:
        The facts by name: date, cpu, cpu_flags, cores, threads, memory_gib, system, python, packages, commit.
    """
    model, flags = _processor()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": model,
        "cpu_flags": [flag for flag in _RELEVANT_FLAGS if flag in flags],
        "cores": available_cores(),
        "threads": threads,
        "memory_gib": _memory_gib(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {"swincompress_pl": __version__} | _versions(),
        "commit": _commit(),
    }


def available_cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def installed_version(package: str) -> str | None:
    """The version of an installed distribution, or None; the package is not imported."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _versions() -> dict[str, str]:
    found = {package: installed_version(package) for package in _PACKAGES}
    return {package: number for package, number in found.items() if number is not None}


def _processor() -> tuple[str, frozenset[str]]:
    """(model name, flags); without /proc, only what `platform` knows."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or platform.machine(), frozenset()
    entries: dict[str, str] = {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        entries.setdefault(key.strip(), value.strip())
    model = entries.get("model name") or entries.get("Model") or platform.machine()
    return model, frozenset((entries.get("flags") or entries.get("Features") or "").split())


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, OSError, ValueError):
        return None


def _commit() -> str | None:
    """The commit of the source tree, with "-modified" if it has changes; None for an installed package."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        commit = _git(root, "rev-parse", "HEAD")
        return commit + ("-modified" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout.strip()

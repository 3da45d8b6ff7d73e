"""What every reader of artifacts says about a file, what that costs, and whether all say the same."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from swincompress_pl import accel
from swincompress_pl.accel import core
from swincompress_pl.cli.inspect import describe_artifact

SECONDS_MAX, BYTES_MAX = 1.0, 300e6  # of one reader on one file; bytes beyond those of the file

READERS: dict[str, Callable[[Path], Any]] = {
    "load": lambda path: accel.load(path, threads=1),
    "reference": accel.reference,
    "inspect": describe_artifact,
}
# What an engine alone refuses: activations that only the reference runs, and more memory than an engine may take.
ENGINE_ONLY = re.compile(r"accel\.reference\(path\) runs this one|bytes; only \d+ are left|; only \d+ are left")


def verdicts(path: Path) -> dict[str, str]:
    """What every reader says: "" or the message of its ArtifactError."""
    found = {}
    for name, reader in READERS.items():
        try:
            reader(path)
            found[name] = ""
        except accel.ArtifactError as error:
            found[name] = str(error)
    return found


def require_agreement(path: Path, what: str) -> bool:
    """Whether the readers accept the file; AssertionError where one does and another does not."""
    found = verdicts(path)
    if ENGINE_ONLY.search(found["load"]):
        del found["load"]
    assert len({message == "" for message in found.values()}) == 1, (what, found)
    return found["reference"] == ""


def cpp_verdict(content: bytes) -> str | None:
    """What the C++ reader alone says; None for an entropy-coded artifact, which Python decodes before."""
    try:
        core.artifact_engine(content, "scalar", 1)
    except core.CodedError:
        return None
    except ValueError as error:
        return str(error)
    return ""


@dataclass
class Figures:
    """Of many files: how many were accepted, by all; by the reference alone, as no engine runs them; seen by the C++
    reader alone; and the most that one reader took for one of them."""

    files: int = 0
    accepted: int = 0
    engine_refused: int = 0
    by_cpp: int = 0
    seconds: tuple[float, str] = (0.0, "")
    memory_bytes: tuple[int, str] = (0, "")
    failures: list[str] = field(default_factory=list)

    def add(self, path: Path, content: bytes, what: str) -> None:
        """Show `content`, written to `path`, to every reader; what is wrong with their answers goes to `failures`."""
        path.write_bytes(content)
        self.files += 1
        found: dict[str, str] = {}
        for name, reader in READERS.items():
            found[name] = self._read(name, lambda reader=reader: reader(path), len(content), what)  # type: ignore[misc]
        alone = self._read("C++", lambda: _raised(cpp_verdict(content)), len(content), what)
        if alone != "coded":
            self.by_cpp += 1
            found["C++"] = alone
        if ENGINE_ONLY.search(found["load"]):
            self.engine_refused += 1
            found = {name: said for name, said in found.items() if name not in ("load", "C++")}
        if len({said == "" for said in found.values()}) > 1:
            self.failures.append(f"{what}: the readers disagree: {found}")
        self.accepted += found["reference"] == ""

    def _read(self, name: str, read: Callable[[], Any], size_bytes: int, what: str) -> str:
        before, start = _reset_peak(), time.process_time()
        try:
            read()
            said = ""
        except accel.ArtifactError as error:
            said = str(error)
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
            self.failures.append(f"{what}: {name} raises {said}")
        seconds, memory = time.process_time() - start, _peak_bytes() - before
        self.seconds = max(self.seconds, (seconds, f"{what}, {name}"))
        self.memory_bytes = max(self.memory_bytes, (memory, f"{what}, {name}"))
        if seconds > SECONDS_MAX or memory > BYTES_MAX + size_bytes:
            self.failures.append(f"{what}: {name} takes {seconds:.2f} s and {memory / 1e6:.0f} MB")
        return said

    def __str__(self) -> str:
        return (
            f"{self.files} files: {self.accepted} accepted by all ({self.engine_refused} of all are for the reference "
            f"alone), {self.files - self.accepted} refused; {self.by_cpp} read by C++ alone; {len(self.failures)} "
            f"failures; at most {self.seconds[0]:.3f} s ({self.seconds[1]}) and {self.memory_bytes[0] / 1e6:.1f} MB "
            f"({self.memory_bytes[1]})"
        )


def _raised(said: str | None) -> None:
    if said is None:
        raise accel.ArtifactError("coded")
    if said:
        raise accel.ArtifactError(said)


def _reset_peak() -> int:
    """The memory of this process, from which on its peak is measured (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak_bytes() -> int:
    return _status("VmHWM")


def _status(field_name: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field_name))

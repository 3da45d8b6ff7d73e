"""`load`, `reference` and `inspect` accept the same artifacts, and what they refuse is an ArtifactError."""

from __future__ import annotations

import json
import lzma
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.artifact_bytes import container, header_of
from support.artifact_mutants import mutant
from support.program_cases import small_program
from support.spiking_programs import spiking_program

from swincompress_pl import accel, spec
from swincompress_pl.accel import artifact, storage
from swincompress_pl.cli.inspect import describe_artifact

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
    found = verdicts(path)
    if ENGINE_ONLY.search(found["load"]):
        del found["load"]
    assert len({message == "" for message in found.values()}) == 1, (what, found)
    return found["reference"] == ""


def agree(path: Path, numbers: range) -> int:
    """How many of these mutants are accepted, by all readers."""
    programs = [small_program(3), small_program(2, channels=7, weight="int3"), spiking_program()]
    accepted = 0
    for number in numbers:
        path.write_bytes(mutant(programs, number))
        accepted += require_agreement(path, f"mutant {number}")
    return accepted


def test_readers_agree_on_mutants(tmp_path: Path) -> None:
    assert 10 < agree(tmp_path / "mutant.safetensors", range(400)) < 390


@pytest.mark.slow
def test_readers_agree_on_many_mutants(tmp_path: Path) -> None:
    agree(tmp_path / "mutant.safetensors", range(20_000))


def test_readers_agree_on_damaged_bytes(tmp_path: Path) -> None:
    rng = random.Random(0)
    path = tmp_path / "damaged.safetensors"
    program = small_program(2, channels=7, weight="int3")
    whole = [artifact.to_bytes(program), artifact.to_bytes(program, "lzma")]
    for number in range(300):
        content = bytearray(rng.choice(whole))
        for _ in range(rng.choice([1, 1, 4])):
            content[rng.randrange(len(content))] = rng.randrange(256)
        path.write_bytes(content[: rng.choice([len(content), len(content), rng.randrange(len(content))])])
        require_agreement(path, f"damage {number}")


# --- what an artifact may cost


def coded(description: bytes, streams: dict[str, bytes] | None = None, size_bytes: Any = None) -> bytes:
    """A compressed artifact with this text as its description and storage, and streams of these bytes."""

    def stream(data: bytes) -> Any:
        return np.frombuffer(lzma.compress(data, lzma.FORMAT_RAW, filters=storage._LZMA_FILTERS), np.uint8)

    declared = {"coder": "lzma", "size_bytes": len(description) if size_bytes is None else size_bytes}
    text = json.dumps({"format": artifact.FORMAT, "version": 2, "sha256": "0" * 64, "content": declared})
    tensors = {"content": stream(description)} | {name: stream(data) for name, data in (streams or {}).items()}
    return container(*header_of(tensors, text))


def one_stream(key: str = "w", size: int = 64, bits: int = 8) -> bytes:
    entry = {"coder": "lzma", "dtype": "int8", "bits": bits, "tensors": [[key, [size]]]}
    return json.dumps({"description": {}, "storage": {"streams": [entry]}}).encode()


def noise(count: int) -> bytes:
    """Text that does not compress: what it declares is within its ratio."""
    return np.random.default_rng(0).integers(97, 123, count).astype(np.uint8).tobytes()


LARGE = 2**24 - 1000
EVIL: dict[str, tuple[Callable[[], bytes], str]] = {
    "long": (lambda: coded(b"[" + b"[]," * (LARGE // 3) + b"[]]"), "at most [0-9]+ are read"),
    "declared": (lambda: coded(b"{}", size_bytes=2**63), "at most [0-9]+ are read"),
    "boolean": (lambda: coded(b"{", size_bytes=True), "at most [0-9]+ are read"),
    "negative": (lambda: coded(b"{}", size_bytes=-1), "declaration is wrong"),
    "values": (
        lambda: coded(b'{"noise":"' + noise(2**19) + b'","x":[' + b"[]," * (2**22) + b"0]}"),
        "more than 1048576 values",
    ),
    "objects": (
        lambda: coded(b'{"noise":"' + noise(2**19) + b'","x":[' + b'{"a":0},' * (2**20) + b"0]}"),
        "more than 1048576 values",
    ),
    "nested": (lambda: coded(b"[" * 2**20), "more than 1048576 values"),
    "nested less": (lambda: coded(b"[" * 2**19 + b"]" * 2**19), "not JSON"),
    "quotes": (lambda: coded(b'"' + b'\\"' * 2**19), "not JSON"),
    "digits": (lambda: coded(b'{"x":' + b"1" * 2**20 + b"}"), "not JSON"),
    "name": (lambda: coded(one_stream("n" * 2**20), {"stream0": bytes(64)}), "name of more than 1024 bytes"),
    "zeros": (lambda: coded(one_stream(size=2**26), {"stream0": bytes(2**26)}), "coded bytes declare 67108864"),
    "zeros of 2 bits": (
        lambda: coded(one_stream(size=2**26, bits=2), {"stream0": bytes(2**24)}),
        "coded bytes declare 67108864",
    ),
    "shape": (lambda: coded(one_stream(size=2**63), {"stream0": bytes(64)}), "coded bytes declare"),
}


@pytest.fixture(scope="module")
def evil(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("evil")
    for name, (make, _) in EVIL.items():
        (folder / name).write_bytes(make())
    return {name: folder / name for name in EVIL}


@pytest.mark.parametrize("name", EVIL)
def test_bombs_are_refused_by_every_reader_before_they_cost(name: str, evil: dict[str, Path]) -> None:
    start = time.process_time()
    for reader, found in verdicts(evil[name]).items():
        assert re.search(EVIL[name][1], found), (reader, found)
    assert time.process_time() - start < 6  # three readers, a busy machine


def shared_program(count: int, width: int) -> spec.Program:
    """One weight that all layers read."""
    tensors = {
        "weight": np.zeros((width, width), np.int8),
        "bias": np.zeros(width, np.int32),
        "mult": np.zeros(width, np.int32),
        "shift": np.ones(width, np.uint8),
    }
    operations = [
        spec.Operation(
            kind="linear",
            name=f"l{number}",
            inputs=(f"l{number - 1}" if number else "images",),
            output=f"l{number}",
            dtype="int8" if number < count - 1 else "int32",
            attributes={"channels": width},
            tensors={role: role for role in tensors},
        )
        for number in range(count)
    ]
    taken = spec.InputDescription(height=1, width=1, channels=width)
    return spec.Program(input=taken, operations=tuple(operations), tensors=tensors, logit_scale=1.0)


def test_a_tensor_that_many_operations_read_is_bounded(tmp_path: Path) -> None:
    path = accel.export(shared_program(100, 256), tmp_path / "few.safetensors")
    assert require_agreement(path, "few")
    with pytest.raises(ValueError, match=r"operations make .* bytes of their tensors"):
        accel.export(shared_program(400, 256), path)
    with pytest.raises(ValueError, match="at most 10000 are accepted"):
        spec.check(shared_program(10_001, 1))


MEASURED = """
import resource, sys
from pathlib import Path
from swincompress_pl import accel
from swincompress_pl.cli.inspect import describe_artifact
def peak():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) * 1024
before = peak()
for path in sys.argv[1:]:
    for read in (accel.load, accel.reference, describe_artifact):
        try:
            read(Path(path))
        except accel.ArtifactError:
            pass
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of the memory from /proc")
def test_bombs_take_little_memory(evil: dict[str, Path]) -> None:
    command = [sys.executable, "-c", MEASURED, *map(str, evil.values())]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(ran.stdout) < 300e6

"""`load`, `reference` and `inspect` accept the same artifacts, and what they refuse is an ArtifactError."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fuzz import corpus
from fuzz import verdicts as verdicts_of_mutants
from support import artifact_verdicts
from support.artifact_bombs import EVIL
from support.artifact_verdicts import Figures, require_agreement, verdicts
from support.program_cases import small_program

from swincompress_pl import accel, spec
from swincompress_pl.accel import artifact
from swincompress_pl.cli.inspect import describe_artifact
from swincompress_pl.spec.kinds import KINDS


def figures(numbers: range) -> Figures:
    """Of these mutants; none may make a reader fail, disagree with another, or take more than it may."""
    found = verdicts_of_mutants.run(numbers)
    assert found.files == len(numbers)
    assert found.failures == []
    return found


@pytest.mark.parametrize("programs", [corpus.programs().values(), verdicts_of_mutants.programs()])
def test_every_kind_of_operation_is_changed(programs: Iterable[spec.Program]) -> None:
    assert {op.kind for program in programs for op in program.operations} == set(KINDS)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of the memory from /proc")
def test_readers_agree_on_mutants() -> None:
    found = figures(range(600))
    assert 10 < found.accepted < 590
    assert 10 < found.by_cpp < 590


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of the memory from /proc")
def test_readers_agree_on_many_mutants() -> None:
    figures(range(1_000_000, 1_012_000))


def test_what_is_wrong_with_readers_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that accepts anything, one that lets another exception out, and one that takes memory and time."""
    content, path = artifact.to_bytes(small_program(3)), tmp_path / "model.safetensors"

    def greedy(_: Path) -> None:
        taken = np.ones(50_000_000)
        while time.process_time() < start + 1.1:
            taken += 1

    def add(reader: Callable[[Path], Any], damaged: bytes) -> list[str]:
        found = Figures()
        monkeypatch.setitem(artifact_verdicts.READERS, "inspect", reader)
        found.add(path, damaged, "it")
        return found.failures

    start = time.process_time()
    assert add(describe_artifact, content) == []
    assert ": the readers disagree: " in add(lambda _: None, content[:-1])[0]
    assert "it: inspect raises ZeroDivisionError: " in add(lambda _: 1 // 0, content)[0]
    start = time.process_time()
    assert re.search("it: inspect takes 1.[0-9]+ s and [4-9][0-9][0-9] MB", add(greedy, content)[0])


# --- what an artifact may cost


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
from swincompress_pl.spec.kinds import KINDS
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

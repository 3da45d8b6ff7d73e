"""Whatever the disk does, a file is the old one or the new one: full, read-only, limited, linked, written by many."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.program_cases import small_program

from swincompress_pl import accel
from swincompress_pl.cli import main
from swincompress_pl.files import append_line, write_file
from swincompress_pl.pruning.evaluation.scorer import Verdict
from swincompress_pl.pruning.prime.evaluation_cache import EvaluationCache

GOLDEN = Path(__file__).parent / "golden" / "0.1"
UNITS = {"a": 1000}
ABOUT = "f" * 4030  # a cache of nearly a page: what is appended needs another one
GOOD = Verdict(score=80.0, accepted=True, images=3, exact=False, error_points=0.5)

# Every way in which the package writes a file, each on a file that is there already.
WRITERS = """
import errno, sys, warnings
from pathlib import Path
sys.path[:0] = [{tests!r}]
warnings.simplefilter("ignore")
from support.program_cases import small_program
from swincompress_pl import accel
from swincompress_pl.cli import main
from swincompress_pl.pruning.prime.evaluation_cache import EvaluationCache
from swincompress_pl.report import RunRecord, write_report
from swincompress_pl.report.write import write_html
from test_files_faults import ABOUT, GOOD, UNITS
folder, program, record = Path(sys.argv[1]), small_program(3), RunRecord(name="x" * 5000)
write = {{
    "artifact": lambda: accel.export(program, folder / "artifact"),
    "cli": lambda: main(["export", {golden!r}, "-o", str(folder / "cli")]),
    "report": lambda: write_report(record, folder / "report"),
    "page": lambda: write_html(record, folder / "page"),
    "record": lambda: record.save(folder / "record"),
    "cache": lambda: EvaluationCache(folder / "cache", ABOUT, units=UNITS).put({{"a" : 1}}, GOOD),
}}
def attempt():
    for name, call in write.items():
        try:
            print(name, "code", call())
        except OSError as error:
            told = str(error)
            print(name, errno.errorcode[error.errno], "cannot be written" in told, str(folder / name) in told)
"""
NAMES = ("artifact", "cli", "page", "record", "cache", "report")


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A folder with an old file of every writer."""
    folder = tmp_path / "files"
    fill(folder)
    return folder


def fill(folder: Path) -> None:
    (folder / "report").mkdir(parents=True)
    for name in ("artifact", "cli", "page", "record", "report/report.json"):
        (folder / name).write_bytes(b"old")
    EvaluationCache(folder / "cache", ABOUT, units=UNITS)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run(script: str, folder: Path, *before: str) -> list[str]:
    """What `script` prints about `folder`, after shell commands in a mount namespace of its own if there are any."""
    whole = WRITERS.format(tests=str(Path(__file__).parent), golden=str(GOLDEN / "quantized.ckpt")) + script
    command = [sys.executable, "-c", whole, str(folder)]
    if before:
        command = ["unshare", "-rm", "sh", "-ec", "\n".join([*before, 'exec "$@"']), "sh", *command]
    ran = subprocess.run(command, capture_output=True, text=True)
    if before and re.search("unshare|mount", ran.stderr) and ran.returncode:
        pytest.skip(f"nothing can be mounted here: {ran.stderr.strip()}")
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.splitlines()


def assert_refused(lines: list[str], kind: str) -> None:
    """Each writer says what is wrong with which file; the command ends with 2."""
    for name in NAMES:
        (line,) = [line for line in lines if line.startswith(f"{name} ")]
        assert line == ("cli code 2" if name == "cli" else f"{name} {kind} True True"), lines


@pytest.mark.slow
def test_a_limit_of_sizes(old: Path) -> None:
    """RLIMIT_FSIZE, as quotas; a part of what is appended fits."""
    before = content(old)
    size = (old / "cache").stat().st_size + 10
    script = f"""
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
attempt()
"""
    assert_refused(run(script, old), "EFBIG")
    assert content(old) == before


FILLED = """
from swincompress_pl.accel import artifact
from test_files_faults import content, fill
fill(folder)
before = content(folder)
with open(folder / "rest", "wb", buffering=0) as rest:
    try:
        while True:
            rest.write(bytes(4096))
    except OSError:
        pass
attempt()
(folder / "rest").unlink()
print("same", content(folder) == before)
"""


@pytest.mark.slow
def test_a_full_file_system(tmp_path: Path) -> None:
    folder = tmp_path / "disk" / "files"
    (tmp_path / "disk").mkdir()
    lines = run(FILLED, folder, f"mount -t tmpfs -o size=128k none {tmp_path / 'disk'}")
    assert lines[-1] == "same True"
    assert_refused(lines, "ENOSPC")


CHECKPOINT = """
import os
from support.callback_cases import make_trainer
from swincompress_pl.models import CompressibleClassifier
folder.mkdir()
sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
module = CompressibleClassifier("VisionTransformer", 3, model_kwargs=sizes)
trainer = make_trainer(folder, 1)
trainer.strategy.connect(module)
file = folder / "last.ckpt"
trainer.save_checkpoint(file)
before = file.read_bytes()
with open(folder / "rest", "wb", buffering=0) as rest:
    try:
        while True:
            rest.write(bytes(4096))
    except OSError:
        pass
module.net.blocks[0].mlp.fc1.weight.data.add_(1)
try:
    trainer.save_checkpoint(file)
    print("saved")
except OSError as error:
    print(errno.errorcode[error.errno])
print("same", file.read_bytes() == before)
(folder / "rest").unlink()
trainer.save_checkpoint(file)
print("same", file.read_bytes() == before)
"""


@pytest.mark.slow
def test_a_checkpoint_on_a_full_file_system(tmp_path: Path) -> None:
    """Lightning's own writing, where its temporary files are on the same file system."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = (f"mount -t tmpfs -o size=1m none {disk}", f"export TMPDIR={disk}")
    assert run(CHECKPOINT, disk / "files", *mounted)[-3:] == ["ENOSPC", "same True", "same False"]


@pytest.mark.slow
def test_a_read_only_file_system(old: Path) -> None:
    before = content(old)
    lines = run("attempt()", old, f"mount --bind {old} {old}", f"mount -o remount,ro,bind {old}")
    assert_refused(lines, "EROFS")
    assert content(old) == before


def test_a_checkpoint_on_a_full_file_system_is_never_read_as_another(tmp_path: Path) -> None:
    """Lightning writes it to the folder of temporary files and moves it: to another file system that is a copy, which
    may end in the middle. That is refused by whatever reads it."""
    whole = (GOLDEN / "quantized.ckpt").read_bytes()
    path = tmp_path / "torn.ckpt"
    for part in (0, 1, 4, 100, len(whole) // 3, len(whole) // 2, len(whole) - 100, len(whole) - 1):
        path.write_bytes(whole[:part])
        for command in (["inspect", str(path)], ["export", str(path), "-o", str(tmp_path / "out")]):
            assert main(command) == 2, (part, command)
    assert sorted(os.listdir(tmp_path)) == ["torn.ckpt"]


def test_links_that_lead_nowhere(tmp_path: Path) -> None:
    """A loop is refused; a link to what is not there yet makes it; one into a folder that is not there is refused."""
    loop, other = tmp_path / "loop", tmp_path / "other"
    loop.symlink_to(other)
    other.symlink_to(loop)
    lost = tmp_path / "lost"
    lost.symlink_to(tmp_path / "no folder" / "file")
    for path, kind in ((loop, errno.ELOOP), (lost, errno.ENOENT)):
        for write in (
            lambda path: accel.export(small_program(3), path),
            lambda path: write_file(path, lambda file: file.write(b"new")),
            lambda path: append_line(path, b"new"),
        ):
            with pytest.raises(OSError, match=rf"cannot be written: .*'.*{path.name}'") as found:
                write(path)
            assert found.value.errno == kind
    with pytest.raises(OSError, match=r"cannot be written: .*'.*loop'"):
        EvaluationCache(loop, "f", units=UNITS)
    assert sorted(os.listdir(tmp_path)) == ["loop", "lost", "other"]
    assert all(path.is_symlink() for path in (loop, other, lost))


MANY = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = [{tests!r}]
from support.program_cases import small_program
from swincompress_pl import accel
from swincompress_pl.accel import artifact
from swincompress_pl.pruning.prime.evaluation_cache import EvaluationCache
from test_files_faults import GOOD, UNITS
path, cache = Path(sys.argv[1]) / "artifact", Path(sys.argv[1]) / "cache"
programs = [small_program(seed) for seed in range(8)]
EvaluationCache(cache, "f", units=UNITS)
children = []
for number, program in enumerate(programs):
    child = os.fork()
    if child:
        children.append(child)
        continue
    known = EvaluationCache(cache, "f", units=UNITS)
    for time in range(20):
        accel.export(program, path)
        known.put({{"a": 1 + 20 * number + time}}, GOOD)
        if number == 7 and time == 10:
            os.kill(os.getpid(), signal.SIGKILL)
    os._exit(0)
print(sum(os.waitpid(child, 0)[1] != 0 for child in children))
print(path.read_bytes() in [artifact.to_bytes(program) for program in programs])
"""


def test_eight_processes_write_the_same_files(tmp_path: Path) -> None:
    """And one of them is killed: the artifact is of one of them, and every entry of the cache is there."""
    script = MANY.format(tests=str(Path(__file__).parent))
    ran = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines() == ["1", "True"]
    accel.export(small_program(3), tmp_path / "artifact")  # removes what the kill left
    assert sorted(os.listdir(tmp_path)) == ["artifact", "cache"]
    again = EvaluationCache(tmp_path / "cache", "f", units=UNITS)
    assert all(again.get({"a": width}) == GOOD for width in range(1, 20 * 7 + 12))
    assert (tmp_path / "cache").read_bytes().count(b"\n") == 1 + 20 * 7 + 11


def test_what_a_kill_left_of_a_line_is_cut_off_by_the_next(tmp_path: Path) -> None:
    """Another process, which is at work and knows nothing of it, does not write behind it."""
    path = tmp_path / "cache"
    cache = EvaluationCache(path, "f", units=UNITS)
    with path.open("ab") as torn:
        torn.write(json.dumps({"widths": {"a": 1}}).encode()[:-1] + b" " * 10_000)
    cache.put({"a": 2}, GOOD)
    again = EvaluationCache(path, "f", units=UNITS)
    assert (again.get({"a": 1}), again.get({"a": 2})) == (None, GOOD)
    assert path.read_bytes().count(b"\n") == 2


def test_an_append_that_is_interrupted_leaves_the_old_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "lines"
    path.write_bytes(b"first\n")
    with monkeypatch.context() as patched:
        patched.setattr("builtins.open", _Full.open)
        with pytest.raises(OSError, match=r"cannot be written: full: '.*lines'"):
            append_line(path, b"second")
    assert path.read_bytes() == b"first\n"


class _Full(io.FileIO):
    """A file on a disk that has room for three more bytes."""

    @classmethod
    def open(cls, path: Any, mode: str, buffering: int = -1) -> _Full:
        return cls(path, mode)

    def write(self, content: Any) -> int:
        if len(content) < 7:
            raise OSError(errno.ENOSPC, "full")
        return super().write(content[:3]) or 0

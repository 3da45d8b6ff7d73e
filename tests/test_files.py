"""Files are the old one or the new one, whoever interrupts, and leave nothing behind."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.program_cases import small_program

from swincompress_pl import accel, files
from swincompress_pl.files import write_file
from swincompress_pl.pruning.prime.evaluation_cache import EvaluationCache
from swincompress_pl.report import RunRecord, write_report
from swincompress_pl.report.plain import write_text


def put(path: Path, content: bytes) -> Path:
    return write_file(path, lambda file: file.write(content))


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_a_file_is_written_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "file"
    assert put(path, b"old") == path
    assert put(path, b"new") == path
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == ["file"]


def test_new_files_follow_the_umask_and_old_ones_keep_their_permissions(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        private = write_text(tmp_path / "private", "text")
        shared = put(tmp_path / "shared", b"")
        shared.chmod(0o664)
        put(shared, b"again")
    finally:
        os.umask(before)
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    assert stat.S_IMODE(shared.stat().st_mode) == 0o664


def fail(error: BaseException) -> Callable[..., Any]:
    def write(file: Any) -> None:
        file.write(b"half")
        raise error

    return write


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError(), OSError(errno.ENOSPC, "No space left")])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: BaseException) -> None:
    path = put(tmp_path / "file", b"old")
    with pytest.raises(type(error)):
        write_file(path, fail(error))
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_a_full_disk_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"cannot be written: No space left: '.*model'"):
        write_file(tmp_path / "model", fail(OSError(errno.ENOSPC, "No space left")))


@pytest.mark.parametrize("length", [241, 242, 255])
def test_names_as_long_as_a_folder_takes_are_written(tmp_path: Path, length: int) -> None:
    path = accel.export(small_program(3), tmp_path / ("n" * length))
    accel.load(path, threads=1)
    assert names(tmp_path) == ["n" * length]
    with pytest.raises(OSError, match="File name too long"):
        put(tmp_path / ("n" * 256), b"")
    assert names(tmp_path) == ["n" * length]


def test_links_stay_links(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    target, link = tmp_path / "other" / "target", tmp_path / "link"
    link.symlink_to(target)
    for content in (b"first", b"second"):  # a link to nothing yet, then to a file
        put(link, content)
        assert link.is_symlink()
        assert target.read_bytes() == content
    assert names(tmp_path) == ["link", "other"]


def test_what_is_no_regular_file_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, error in ((tmp_path / "pipe", FileExistsError), (tmp_path, IsADirectoryError)):
        with pytest.raises(error, match="cannot be written"):
            put(path, b"")
    assert names(tmp_path) == ["pipe"]


KILLED = """
import os, signal, sys
from swincompress_pl.files import write_file
def write(file):
    file.write(b"half")
    file.flush()
    print("at work", flush=True)
    if sys.argv[2] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    sys.stdin.readline()
write_file(sys.argv[1], write)
"""


def writer(path: Path, how: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", KILLED, str(path), how]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "at work\n"
    return process


def test_what_a_kill_left_is_removed_by_the_next_write_to_that_path(tmp_path: Path) -> None:
    path = put(tmp_path / "file", b"old")
    with writer(path, "kill") as killed:
        assert killed.wait() == -signal.SIGKILL
    assert path.read_bytes() == b"old"
    assert len(names(tmp_path)) == 2
    put(tmp_path / "other", b"")  # minds its own leftovers
    assert len(names(tmp_path)) == 3
    put(path, b"new")
    assert names(tmp_path) == ["file", "other"]


def test_a_writer_at_work_is_let_alone(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with writer(path, "wait") as working:
        put(path, b"meanwhile")
        working.communicate("go on\n")
        assert working.returncode == 0
    assert path.read_bytes() == b"half"
    assert names(tmp_path) == ["file"]


def test_many_writers_of_one_path_leave_one_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    contents = [bytes([number]) * 300_000 for number in range(4)]
    errors: list[BaseException] = []

    def work(content: bytes) -> None:
        try:
            for _ in range(15):
                put(path, content)
                assert path.read_bytes() in contents
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert names(tmp_path) == ["file"]


def test_two_reports_may_be_written_into_one_folder_at_once(tmp_path: Path) -> None:
    record = RunRecord(name="run")
    for name in ("float", "pruned"):
        record.add_stage(name, parameters=10, macs=10)
    errors: list[BaseException] = []

    def work() -> None:
        try:
            write_report(record, tmp_path)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert not [name for name in names(tmp_path) if name.startswith(".")]


LIMITED = """
import resource, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from support.program_cases import small_program
from swincompress_pl import accel
from swincompress_pl.pruning.prime.evaluation_cache import EvaluationCache
from swincompress_pl.report.plain import write_text
folder, program = Path(sys.argv[1]), small_program(3)
write = {{
    "artifact": lambda: accel.export(program, folder / "artifact"),
    "text": lambda: write_text(folder / "text", "x" * 5000),
    "cache": lambda: EvaluationCache(folder / "cache", "x" * 5000),
}}
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
for name, call in write.items():
    try:
        call()
    except OSError as error:
        print(name, error.errno, str(folder / name) in str(error))
"""


@pytest.mark.slow
def test_a_limit_of_sizes_leaves_the_old_files(tmp_path: Path) -> None:
    for name in ("artifact", "text"):
        put(tmp_path / name, b"old")
    script = LIMITED.format(tests=str(Path(__file__).parent))
    ran = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    assert ran.stdout.split("\n")[:-1] == [f"{name} {errno.EFBIG} True" for name in ("artifact", "text", "cache")]
    assert names(tmp_path) == ["artifact", "text"]
    assert (tmp_path / "artifact").read_bytes() == (tmp_path / "text").read_bytes() == b"old"


def test_folders_that_may_not_be_written_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put(tmp_path / "file", b"old")

    def refuse(*_: Any) -> None:  # a super-user may write everywhere, so that permissions alone test nothing
        raise PermissionError(errno.EACCES, "Permission denied", "a temporary name")

    monkeypatch.setattr(files, "_open_beside", refuse)
    with pytest.raises(PermissionError, match=r"cannot be written: Permission denied: '.*file'"):
        put(path, b"new")
    assert path.read_bytes() == b"old"


def test_an_evaluation_cache_that_cannot_be_begun_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(OSError, match="full"):
        EvaluationCache(tmp_path / "cache", "about")
    assert names(tmp_path) == []

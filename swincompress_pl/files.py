"""Writes files so that there is never a part of one: as a temporary file beside its place, which is then moved there.

After a kill or a full disk, and for readers and other writers at any time, there is the old file or the new one. Lines
are appended whole. All files of this package are written by this module.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from io import FileIO
from pathlib import Path
from typing import IO, BinaryIO

try:
    import fcntl
except ImportError:  # Windows: temporary files of a killed writer stay
    fcntl = None  # type: ignore[assignment]

_BLOCK = 4096


def write_file(path: str | os.PathLike[str], write: Callable[[BinaryIO], object]) -> Path:
    """Lets `write` fill a temporary file beside `path`, moves that to `path`, and returns `path`.

    A link stays, and the file that it points to is replaced. An existing file keeps its permissions; a new one has
    those of the umask. Temporary files of killed writers of the same path are removed. An OSError names `path` if the
    folder is missing, the disk is full, permission is missing, or something else than a regular file is there.
    """
    destination = Path(os.path.realpath(path))
    with _naming(path):
        mode = _mode_of(destination)
        _remove_leftovers(destination)
        file, temporary = _open_beside(destination)
        try:
            with file:
                write(file)
                file.flush()
                if mode is not None:
                    os.chmod(temporary, mode)
                os.fsync(file.fileno())
                if fcntl is not None:  # move it while it is locked, so that nobody takes it for a leftover
                    os.replace(temporary, destination)
            if fcntl is None:  # Windows cannot move an open file
                os.replace(temporary, destination)
        finally:
            temporary.unlink(missing_ok=True)
    return Path(path)


def append_line(path: str | os.PathLike[str], line: bytes) -> None:
    """Adds `line` and a line break to the file at `path`, whole or not at all.

    Several processes that do so at once add their lines one after the other. A last line without a line break is what a
    killed writer left; it is removed first. An OSError names `path` if the file is missing, the disk is full, or
    permission is missing.
    """
    with _naming(path), open(path, "r+b", buffering=0) as file:
        _lock(file)
        size = _whole_lines(file)
        file.truncate(size)
        file.seek(size)
        rest = memoryview(line + b"\n")
        try:
            while rest:
                rest = rest[file.write(rest) :]  # less than all where the disk ends in the middle of it
        except BaseException:
            file.truncate(size)
            raise


def _whole_lines(file: FileIO) -> int:
    """The size in bytes of the lines of `file` that end with a line break."""
    end = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - _BLOCK)
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


@contextlib.contextmanager
def _naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Lets an OSError name the path that could not be written, whatever file it was about."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, f"cannot be written: {error.strerror}", str(path)) from error


def _mode_of(destination: Path) -> int | None:
    """The permissions of the file at `destination`; None if there is none."""
    try:
        found = destination.stat()
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, "a folder is there; name a file")
    if not stat.S_ISREG(found.st_mode):  # replacing /dev/null, for one, would break it for everybody
        raise FileExistsError(errno.EEXIST, "what is there is not a regular file; name another path")
    return stat.S_IMODE(found.st_mode)


def _prefix(destination: Path) -> str:
    """The prefix of the temporary files of one path, short enough for names of any length that a folder takes."""
    return f".swincompress-{hashlib.sha256(os.fsencode(destination.name)).hexdigest()[:16]}-"


def _open_beside(destination: Path) -> tuple[BinaryIO, Path]:
    """A new temporary file, locked for as long as it is open."""
    while True:
        temporary = destination.with_name(f"{_prefix(destination)}{secrets.token_hex(8)}")
        file = open(temporary, "xb")  # noqa: SIM115  # the caller closes it
        _lock(file)
        if temporary.exists():  # a second writer may have taken it for a leftover before it was locked
            return file, temporary
        file.close()


def _lock(file: IO[bytes]) -> None:
    """Locks `file` until it is closed."""
    if fcntl is not None:
        with contextlib.suppress(OSError):  # a file system without locks: nothing is taken for a leftover there
            fcntl.flock(file, fcntl.LOCK_EX)


def _remove_leftovers(destination: Path) -> None:
    """Removes temporary files whose writer has ended, as its locks end with it."""
    if fcntl is None:
        return
    for leftover in destination.parent.glob(f"{_prefix(destination)}*"):
        try:
            with open(leftover, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                leftover.unlink(missing_ok=True)
        except OSError:  # its writer is at work, or we may not remove it
            continue

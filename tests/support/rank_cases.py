"""Work done by several processes, or by one that is killed: forked, so that nothing is imported again."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import socket
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_CONTEXT = multiprocessing.get_context("fork")
_PATIENCE_S = 300.0  # only to end a test whose ranks wait for each other for ever


def on_ranks(folder: Path, world_size: int, work: Callable[[int], Any]) -> list[Any]:
    """What `work(rank)` gives (tensors and plain data) in each of `world_size` processes, set up for Lightning's DDP.

    Raises RuntimeError with the traceback of the first process that failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def run(rank: int) -> None:
        os.environ |= {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "LOCAL_RANK": str(rank),
            "NODE_RANK": "0",
            "WORLD_SIZE": str(world_size),
        }
        torch.set_num_threads(1)
        try:
            torch.save(work(rank), folder / f"rank{rank}.pt")
        except BaseException:
            (folder / f"rank{rank}.error").write_text(traceback.format_exc())
        finally:
            os._exit(0)  # the parent's exit handlers are not ours

    processes = [_CONTEXT.Process(target=run, args=(rank,)) for rank in range(world_size)]
    for process in processes:
        process.start()
    _wait_for_all(processes, folder)
    for rank in range(world_size):
        error = folder / f"rank{rank}.error"
        if error.exists():
            raise RuntimeError(f"rank {rank}: {error.read_text()}")
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(world_size)]


def _wait_for_all(processes: list[Any], folder: Path) -> None:
    """Until all have ended; soon after one has failed, the others, which wait for it, are ended."""
    deadline = time.monotonic() + _PATIENCE_S
    while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
        if any(folder.glob("rank*.error")):
            deadline = min(deadline, time.monotonic() + 5)
        time.sleep(0.02)
    for process in processes:
        if process.is_alive():
            process.kill()
        process.join()


def killed(folder: Path, work: Callable[[Path], None]) -> None:
    """Run `work(flag)` in a process and kill it (SIGKILL) as soon as it has written the file `flag`; `work` then waits.

    Raises RuntimeError when the process ends before.
    """
    folder.mkdir(parents=True, exist_ok=True)
    flag, error = folder / "kill-me", folder / "error"

    def run() -> None:
        torch.set_num_threads(1)
        try:
            work(flag)
            error.write_text("it was never where it was to be killed")
        except BaseException:
            error.write_text(traceback.format_exc())
        finally:
            os._exit(0)

    process = _CONTEXT.Process(target=run)
    process.start()
    while not flag.exists() and process.is_alive():
        time.sleep(0.01)
    if not flag.exists():
        process.join()
        raise RuntimeError(error.read_text() if error.exists() else "the process ended")
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL


def call_for_kill(flag: Path) -> None:
    """In a process run by `killed`: write the flag and wait for the end."""
    flag.write_text("now")
    time.sleep(_PATIENCE_S)


def digest(state: Any) -> str:
    """A hash of every bit of nested tensors and plain data."""
    found = hashlib.sha256()
    _feed(found, state)
    return found.hexdigest()


def _feed(found: Any, state: Any) -> None:
    if isinstance(state, Tensor):
        found.update(f"{state.dtype}{tuple(state.shape)}".encode())
        found.update(state.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    elif isinstance(state, dict):
        for key, value in state.items():
            found.update(repr(key).encode())
            _feed(found, value)
    elif isinstance(state, list | tuple):
        for value in state:
            _feed(found, value)
    else:
        found.update(repr(state).encode())

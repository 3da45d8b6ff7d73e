"""The progress of long calls: bars in terminals and notebooks, and plain lines anywhere else."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass

import nbformat
import pytest
import torch
from nbclient import NotebookClient
from timm.models import VisionTransformer

from swincompress_pl import progress
from swincompress_pl.progress import progress_bar, told_progress, with_progress
from swincompress_pl.pruning import AdaptivePruningConfig, prune
from swincompress_pl.quant import quantize

PREPROCESSING = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def shown(self) -> str:
        """All that was drawn, without the moves of the cursor."""
        return self.getvalue().replace("\x1b[A", "").replace("\r", "\n")


@contextmanager
def a_terminal() -> Iterator[Terminal]:
    """The standard error is a terminal in this context."""
    with redirect_stderr(Terminal()) as terminal:
        yield terminal


@dataclass
class Step:
    number: int

    def __str__(self) -> str:
        return f"step {self.number} was good"


def _network() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=3)


def test_a_terminal_shows_a_bar_and_removes_it() -> None:
    with a_terminal() as terminal, progress_bar() as report:
        for done in range(5):
            report("reading", done, 4)
    assert "reading:   0%|" in terminal.shown()
    assert " 0/4 [" in terminal.shown()
    assert terminal.shown().rstrip("\n").splitlines()[-1].strip() == ""


def test_a_bar_begins_again_with_the_next_stage() -> None:
    with a_terminal() as terminal, progress_bar() as report:
        report("reading", 3, 4)
        report("writing", 1, 7, "the first file")
        report("closing", 0, 7)  # another stage of the same length
    assert "writing:  14%|" in terminal.shown()
    assert " 1/7 [" in terminal.shown()
    assert "closing:   0%|" in terminal.shown()


def test_a_bar_shows_every_step_and_goes_with_an_exception() -> None:
    def search() -> None:
        with told_progress(True, lambda step: ("searching", step.number, 3)) as on_step:
            assert on_step is not None
            on_step(Step(1))
            on_step(Step(2))
            raise RuntimeError("later")

    with a_terminal() as terminal, pytest.raises(RuntimeError, match="later"):
        search()
    assert "step 1 was good" in terminal.shown()
    assert "step 2 was good" in terminal.shown()
    assert terminal.shown().rstrip("\n").splitlines()[-1].strip() == ""


def test_elsewhere_a_stage_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar() as report:
        for what, done in (("round 1 of 3", 0), ("round 2 of 3", 1), ("writing", 2)):
            report(what, done, 3)
    assert capsys.readouterr().err == "round 1 of 3 (0/3)\nwriting (2/3)\n"


def test_elsewhere_a_step_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    with told_progress(True, lambda step: ("searching", step.number, 3)) as on_step:
        assert on_step is not None
        on_step(Step(1))
        on_step(Step(2))
    assert capsys.readouterr() == ("step 1 was good\nstep 2 was good\n", "")


def test_a_function_and_false_are_left_as_they_are() -> None:
    told: list[Step] = []
    with told_progress(told.append, lambda step: ("", 0, 0)) as on_step:
        assert on_step == told.append
    with told_progress(False, lambda step: ("", 0, 0)) as on_step:
        assert on_step is None


def test_without_tqdm_a_terminal_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with a_terminal() as terminal, progress_bar() as report:
        report("reading", 0, 4)
    assert terminal.getvalue() == "reading (0/4)\n"


def test_short_loops_are_silent(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert list(with_progress(range(5), "counting", 5)) == list(range(5))
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(progress, "SILENT_S", -1.0)
    assert list(with_progress(iter("abc"), "counting", 3)) == ["a", "b", "c"]
    assert capsys.readouterr().err == "counting (0/3)\n"


def test_short_loops_are_silent_in_a_terminal() -> None:
    with a_terminal() as terminal:
        assert list(with_progress(range(5), "counting", 5)) == list(range(5))
    assert terminal.shown().strip() == ""


def test_searches_show_bars_in_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    network = _network()
    with a_terminal() as terminal:
        result = prune(network, lambda _: 90.0, AdaptivePruningConfig(max_rounds=2), progress=True)
        quantize(network, [torch.zeros(4, 3, 16, 16)], preprocessing=PREPROCESSING, search={"rows": 8}, progress=True)
    assert "pruning round 1: " in terminal.shown()
    assert f"/{len(result.state.targets)} [" in terminal.shown()
    assert all(str(step) in terminal.shown() for step in result.steps)
    assert "searching scales: " in terminal.shown()
    assert capsys.readouterr().out == ""


def test_lines_come_now_and_then_and_tell_the_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now_s = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now_s[0])
    with progress_bar() as report:
        for done in range(9):
            report("training" if done < 6 else "measuring", done, 8)
            now_s[0] += 4.0
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["training (0/8)", "training (3/8), 20 s left", "measuring (6/8), 8 s left"]


def test_searches_print_lines_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    network = _network()
    result = prune(network, lambda _: 90.0, AdaptivePruningConfig(max_rounds=1), progress=True)
    printed = capsys.readouterr()
    assert printed.out.splitlines() == [str(step) for step in result.steps]
    quantize(network, [torch.zeros(4, 3, 16, 16)], preprocessing=PREPROCESSING, search={"rows": 8}, progress=True)
    assert capsys.readouterr().err.startswith("searching scales (0/")


def test_a_notebook_shows_a_bar() -> None:
    code = """
from swincompress_pl.progress import told_progress
with told_progress(True, lambda step: ("pruning round 1", step, 3)) as on_step:
    for step in (1, 2, 3):
        on_step(step)
"""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    outputs = notebook.cells[0].outputs
    bars = [output for output in outputs if output.get("name") == "stderr" or "data" in output]  # a widget has data
    assert bars == outputs
    assert "pruning round 1" in str(outputs) or "application/vnd.jupyter.widget-view+json" in str(outputs)
    assert "Warning" not in str(outputs)

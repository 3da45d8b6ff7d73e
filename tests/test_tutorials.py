"""docs/tutorials: each page runs as a notebook, and prints what stands under its cells.

jupytext turns a page into a notebook. Its `python` and `bash` blocks are the cells, and a `text` block right after a
cell is what the cell printed. Words have to be equal. Numbers have to be near, since another CPU sums in another order,
and so trains another network. Times, instruction sets, and the classes and names of layers in a ranking are free.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / "docs" / "tutorials"
EXECUTED = ("compress_a_vit", "spiking_to_cpp", "which_layer_hurts", "deploy")
NEED_CMAKE = ("spiking_to_cpp", "deploy")
NOT_EXECUTED = ("imagenet_cluster",)
BLOCK = re.compile(r"^(<!-- not run: .+ -->\n)?```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"(-?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?)(\s?%)?")
TIME = re.compile(r"[\d.]+(?= (?:ms|s|microseconds)\b)")
INSTRUCTIONS = re.compile(r"(?:(?:amx_int8|avx512_vnni|avx_vnni|avx2|neon\w*|scalar)(?:, )?)+")
RULE = re.compile(r"-{3,}")  # of a table: as wide as its widest cell
LAYER = re.compile(r"\b(?:blocks|layers|stages?)\.\d+\.[\w.]+")
# How far a number may lie from the page's: percentages in points, others by a part or so much of their own unit.
POINTS, RELATIVE, ABSOLUTE = 10.0, 0.2, 2.0
# Sums in one order on every x86 CPU, as far as the libraries let choose (MKL keeps AVX2's order on Intel alone).
SAME_SUMS = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_CBWR": "COMPATIBLE",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "OMP_NUM_THREADS": "1",
}


def text_of(page: str) -> str:
    return (PAGES / f"{page}.md").read_text(encoding="utf-8")


def printed_on_page(page: str) -> list[str | None]:
    """What stands under each cell of a page, None where nothing does."""
    text, cells, end = text_of(page), list[str | None](), 0
    for block in BLOCK.finditer(text):
        if block[2] in ("python", "bash"):
            cells.append(None)
        elif block[2] == "text" and cells and not text[end : block.start()].strip():
            cells[-1] = block[3]
        end = block.end()
    return cells


def differences(shown: str, printed: str) -> list[str]:
    """The lines of a run that are not those of the page."""
    old, new = shown.rstrip().splitlines(), printed.rstrip().splitlines()
    if len(old) != len(new):
        return [f"{len(new)} lines, the page has {len(old)}: {printed}"]
    return [
        f"{line!r}, the page has {was.rstrip()!r}" for was, line in zip(old, new, strict=True) if not same(was, line)
    ]


def same(shown: str, printed: str) -> bool:
    shown, printed = (
        RULE.sub("RULE", LAYER.sub("LAYER", INSTRUCTIONS.sub("ISA", TIME.sub("TIME", line))))
        for line in (shown, printed)
    )
    if NUMBER.sub(r"#\2", shown).split() != NUMBER.sub(r"#\2", printed).split():
        return False
    ranking = not NUMBER.sub("", shown).strip()  # nothing but numbers: classes, of which the fifth may differ
    return all(
        (ranking and len(old) == len(new) == 1)
        or near(*(float(found.replace(",", "")) for found in (old, new)), percent=bool(percent))
        for (old, percent), (new, _) in zip(NUMBER.findall(shown), NUMBER.findall(printed), strict=True)
    )


def near(shown: float, printed: float, *, percent: bool) -> bool:
    return abs(shown - printed) <= (POINTS if percent else max(ABSOLUTE, RELATIVE * abs(shown)))


@pytest.mark.parametrize(
    ("shown", "printed", "equal"),
    [
        ("float: 97.33% of 300", "float: 97.33% of 300", True),
        ("float: 97.33% of 300", "float: 96.00% of 300", True),
        ("float: 97.33% of 300", "float: 67.33% of 300", False),
        ("float: 97.33% of 300", "float: 86.00% of 300", False),
        ("sops: 649 -> 619 (5% less)", "sops: 615 -> 527 (14% less)", True),
        ("sops: 649 -> 619 (5% less)", "sops: 615 -> 420 (14% less)", False),
        ("engine: 0.035 ms", "engine: 3.1 ms", True),
        ("runs avx512_vnni, avx2, scalar", "runs avx2, scalar", True),
        ("heads 4 -> 3", "layers 4 -> 3", False),
        ("| blocks.0.attn.qkv | weight |", "| blocks.1.mlp.fc1  | weight |", True),
        ("| blocks.0.attn.qkv | weight |", "| blocks.0.attn.qkv | activation |", False),
        ("equal: True", "equal: False", False),
        ("61,234 bytes", "59,000 bytes", True),
        ("61,234 bytes", "9,000 bytes", False),
        ("    5    -2.0321  5", "    1    -3.0274  1", True),
        ("    5    -2.0321  5", "    1    -7.0274  1", False),
        ("layer 5 of 9", "layer 1 of 9", False),
        ("| ----- | ---: |", "| --------- | ---: |", True),
        ("a\nb", "a", False),
    ],
)
def test_outputs_are_compared(shown: str, printed: str, equal: bool) -> None:
    assert (not differences(shown, printed)) == equal


def test_every_page_is_here_and_in_the_navigation() -> None:
    assert {page.stem for page in PAGES.glob("*.md")} == {*EXECUTED, *NOT_EXECUTED}
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in (*EXECUTED, *NOT_EXECUTED):
        assert f"tutorials/{page}.md" in navigation


@pytest.mark.parametrize("page", EXECUTED)
def test_an_executed_page_shows_what_it_prints_and_its_time(page: str) -> None:
    cells = [block for block in BLOCK.finditer(text_of(page)) if block[2] in ("python", "bash")]
    shown = printed_on_page(page)
    assert len(cells) == len(shown) > 5
    for cell, output in zip(cells, shown, strict=True):
        assert cell[1] is None, f"{page}: everything on this page runs"
        if cell[2] == "python":
            compile(cell[3], page, "exec")
            if re.search(r"^print\(", cell[3], re.MULTILINE):
                assert output, f"{page}: what does this print?\n{cell[3]}"
    assert re.search(r"The page takes about \d+ minutes? on 2 cores", text_of(page))


@pytest.mark.parametrize("page", NOT_EXECUTED)
def test_what_is_not_run_says_why(page: str) -> None:
    blocks = [block for block in BLOCK.finditer(text_of(page)) if block[2] in ("python", "bash")]
    assert blocks
    assert all(block[1] is not None for block in blocks)


@pytest.mark.slow
@pytest.mark.parametrize("page", EXECUTED)
def test_the_page_runs_and_prints_what_it_shows(page: str, tmp_path: Path) -> None:
    if page in NEED_CMAKE and shutil.which("cmake") is None:
        pytest.skip("the page builds the C++ library; there is no cmake")
    jupytext = pytest.importorskip("jupytext")
    nbformat = pytest.importorskip("nbformat")
    notebook = jupytext.read(PAGES / f"{page}.md")
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python", "language": "python"}
    file = tmp_path / f"{page}.ipynb"
    jupytext.write(notebook, file)

    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | SAME_SUMS | {"PYTHONPATH": str(ROOT), "REPOSITORY": str(ROOT), "PATH": path}
    options = ["--nbmake", "--overwrite", "--nbmake-timeout=1200", "-p", "no:xdist", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", "-c", os.devnull, f"--rootdir={tmp_path}", *options, str(file)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:]

    cells = [cell for cell in nbformat.read(file, as_version=4).cells if cell.cell_type == "code"]
    shown = printed_on_page(page)
    assert len(cells) == len(shown)
    found = []
    for cell, output in zip(cells, shown, strict=True):
        streams = [part.text for part in cell.outputs if part.output_type == "stream" and part.name == "stdout"]
        found += differences(output or "", "".join(streams))
    assert not found, "\n".join(found)

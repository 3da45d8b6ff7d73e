"""Sizes of artifacts in every form, and what makes the measurement fail."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from support.program_cases import small_program

from benchmarks.quantization import sizes
from benchmarks.quantization.jobs import FORMS
from swincompress_pl import spec
from swincompress_pl.accel import artifact


def fake_reader(folder: Path, logits: str) -> Path:
    """A program that answers like read_artifacts."""
    path = folder / "reader"
    path.write_text(
        f'#!/bin/sh\nwhat=$1; shift\nfor file; do [ $what = load ] && echo 1500000 || echo "{logits}"; done\n'
    )
    path.chmod(0o755)
    return path


def printed(program: spec.Program) -> str:
    shape = (2, *program.input.value.shape)
    images = (37 * np.arange(np.prod(shape)) + 11).astype(np.uint8).reshape(shape)
    return " ".join(str(logit) for logit in spec.run(program, images).ravel())


def test_masks_take_the_smallest_weights() -> None:
    program = small_program(channels=24)
    half = sizes.masked(program, 0.5)
    for op in program.operations:
        if "weight" in op.tensors:
            before, after = program.tensors[op.tensors["weight"]], half.tensors[op.tensors["weight"]]
            assert (after == 0).sum() >= before.size // 2
            kept = np.abs(before[after != 0].astype(int))
            assert kept.min() >= np.abs(before[after == 0].astype(int)).max()


def test_every_form_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizes, "_ROUNDS", 1)
    program = sizes.masked(small_program(channels=32), 0.54)
    found = json.loads(json.dumps(sizes.measure(program, fake_reader(tmp_path, printed(program)))))
    assert tuple(found["forms"]) == FORMS
    packed, plain, lzma = (found["forms"][form] for form in FORMS)
    assert lzma["file_bytes"] < plain["file_bytes"] < packed["file_bytes"]
    assert plain["file_bytes"] == len(artifact.to_bytes(program))
    assert found["nonzero"] / found["weights"] == pytest.approx(0.46, abs=0.02)
    assert all(form["cpp_ms"] == 1.5 and form["python_ms"] > 0 for form in found["forms"].values())


def test_other_logits_are_found(tmp_path: Path) -> None:
    program = small_program()
    with pytest.raises(ValueError, match=r"packed\.safetensors: C\+\+ gives other logits"):
        sizes.measure(program, fake_reader(tmp_path, "1 2 3"))

"""Text of strangers steers no terminal and is no markup."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.artifact_bytes import parts, sealed
from support.program_cases import small_program
from support.report_cases import full_record

from swincompress_pl import accel, cli
from swincompress_pl.printable import printable, printable_data
from swincompress_pl.report import RunRecord, render_report, write_report
from swincompress_pl.report.markdown import render_markdown
from swincompress_pl.report.record import RecordError

EVIL = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202eevil\r\n"


@given(st.text())
def test_printable_text_prints_and_printable_characters_stay(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    assert (shown == text) == text.isprintable()
    assert printable(shown) == shown


def test_data_is_printable_through_and_through() -> None:
    assert printable_data({"a\x1b": [("\n", 1, None)]}) == {"a\\x1b": [["\\n", 1, None]]}


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    program = small_program(3)
    operations = tuple(dataclasses.replace(op, name=op.name + EVIL) for op in program.operations)
    classes = tuple(f"{number}{EVIL}" for number in range(5))
    history = [{EVIL: EVIL}, {"quantize": {"method": EVIL}}]
    origin = {"network": {"name": EVIL, "kwargs": {EVIL: EVIL}}, "history": history}
    changed = dataclasses.replace(program, operations=operations, classes=classes, origin=origin)
    return accel.export(changed, tmp_path / "evil.safetensors")


def require_harmless(text: str) -> None:
    assert "evil" in text
    assert [c for c in text if not c.isprintable() and c not in "\n"] == []


def test_inspect_and_bench_print_no_escapes(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["inspect"], ["inspect", "--json"], ["bench", "--operations", "--rounds", "1"]):
        assert cli.main([*arguments, str(artifact)]) == 0
        require_harmless(capsys.readouterr().out)


def test_a_profile_prints_no_escapes(artifact: Path) -> None:
    for engine in (accel.load(artifact, threads=1), accel.reference(artifact)):
        images = np.zeros((1, *engine.input_shape), np.uint8)
        require_harmless(str(engine.profile(images, repeats=1)))


@pytest.mark.parametrize("key", ["name", "kind", "dtype", "inputs", "attributes", "output"])
def test_errors_print_no_escapes(key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    description, tensors = parts(small_program(3))
    operation = description["operations"][3]
    operation["inputs"] = ["no such"]
    operation[key] = [EVIL] if key == "inputs" else {EVIL: 1.5} if key == "attributes" else EVIL
    path = tmp_path / "evil.safetensors"
    path.write_bytes(sealed(description, tensors))
    for read in (accel.load, accel.reference):
        with pytest.raises(accel.ArtifactError) as caught:
            read(path)
        assert str(caught.value).isprintable()
    assert cli.main(["inspect", str(path)]) == cli.USER_ERROR
    assert capsys.readouterr().err.strip("\n").isprintable()


def test_a_long_error_is_cut(tmp_path: Path) -> None:
    description, tensors = parts(small_program(3))
    description["operations"][3]["dtype"] = "x" * 10**6
    path = tmp_path / "evil.safetensors"
    path.write_bytes(sealed(description, tensors))
    for read in (accel.load, accel.reference):
        with pytest.raises(accel.ArtifactError) as caught:
            read(path)
        assert len(str(caught.value)) < 3000


# --- reports


@pytest.mark.parametrize(
    ("evil", "raw"),
    [
        ("<script>x</script>", r"(?<!\\)<"),
        ("![x](http://a/b)", r"(?<!\\)\[x\]"),
        ("[x](javascript:x)", r"(?<!\\)\[x\]"),
        ("a\n\n# b", r"\n# b"),
        ("a\n---\n", r"\n---\n"),
        ("\x1b[2J", "\x1b"),
        ("\\<b>", r"(?<!\\)(\\\\)*<b>"),
        ("`x`", r"(?<!\\)`"),
    ],
)
def test_markdown_has_no_markup_of_its_figures(evil: str, raw: str) -> None:
    record = RunRecord(name=evil, notes=[evil], data=evil)
    record.add_stage(evil, parameters=10, macs=10)
    record.add_check(evil, True, evil)
    text = render_markdown(record)
    assert not re.search(raw, text)


def test_a_dollar_in_a_name_is_a_dollar(tmp_path: Path) -> None:
    record = full_record()
    record.name = "$\\frac$"
    for name in ("$x$ ^{", "$$"):
        record.add_stage(name, parameters=10, macs=10)
    write_report(record, tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        "[" * 100_000,
        '{"record_version": 1, "name": ' + "[" * 50_000 + "]" * 50_000 + "}",
        '{"record_version": 1' + "0" * 5000 + "}",
        '{"record_version": NaN}',
        '"\\ud800"',
        "\x00",
        "",
    ],
)
def test_a_record_that_is_none_is_an_error_that_names_the_file(content: str, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(RecordError, match=r"report\.json"):
        render_report(tmp_path)
    assert cli.main(["report", str(tmp_path)]) == cli.USER_ERROR


@pytest.mark.parametrize(
    "change",
    [
        {"name": {}},
        {"name": 1},
        {"notes": [1]},
        {"data": None},
        {"environment": []},
        {"stages": [{"name": [], "parameters": 1, "macs": 1, "size": None, "accuracy": None, "latency_ms": {}}]},
        {"stages": [{"name": "x", "parameters": "1", "macs": 1, "size": None, "accuracy": None, "latency_ms": {}}]},
        {"checks": [{"name": "x", "passed": "yes", "detail": ""}]},
    ],
)
def test_a_record_with_other_types_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    data = json.loads(full_record().save(tmp_path / "report.json").read_text())
    (tmp_path / "report.json").write_text(json.dumps(data | change))
    with pytest.raises(RecordError, match=r"report\.json: .* is .*, not "):
        render_report(tmp_path)

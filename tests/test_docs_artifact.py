"""docs/reference/artifact.md: a reader from the page alone reads every form of file, and the tables are right."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.docs_blocks import blocks_of
from support.program_cases import masked, operation_cases, small_program, with_maps
from support.spiking_programs import spiking_cases, spiking_program

from swincompress_pl import accel, spec
from swincompress_pl.accel import artifact, storage
from swincompress_pl.accel.artifact import METADATA_KEY
from swincompress_pl.spec.kinds import KINDS
from swincompress_pl.spec.program import (
    ELEMENTS_MAX,
    NAME_BYTES_MAX,
    OPERATIONS_MAX,
    OUTPUTS_MAX,
    PREPARED_BYTES_FREE,
    PREPARED_RATIO_MAX,
)

PAGE = "docs/reference/artifact.md"
ROOT = Path(__file__).resolve().parent.parent
Reader = Callable[[Path], tuple[dict[str, Any], dict[str, Any]]]


@pytest.fixture(scope="module")
def read() -> Reader:
    (block,) = (block for block in blocks_of(PAGE) if block.title == "read_artifact.py")
    namespace: dict[str, Any] = {}
    exec(block.text, namespace)
    return namespace["read"]  # type: ignore[no-any-return]


def with_bias_map() -> spec.Program:
    """A convolution on a padded image, whose border has biases of its own, and a classifier."""
    rng, size, channels = np.random.default_rng(0), 16, 4
    near = np.minimum(np.arange(size), 1) + (np.arange(size) == size - 1)
    one = {"mult": np.full(channels, 2**21, np.int32), "shift": np.full(channels, 28, np.uint8)}
    tensors = {
        "conv.weight": rng.integers(-127, 128, (channels, 3, 3, 3)).astype(np.int8),
        "conv.bias": rng.integers(-999, 999, (3, 3, channels)).astype(np.int32)[near][:, near],
        "head.weight": rng.integers(-127, 128, (channels, channels)).astype(np.int8),
        "head.bias": np.zeros(channels, np.int32),
        **{f"one.{role}": tensor for role, tensor in one.items()},
    }
    ones = {role: f"one.{role}" for role in one}
    geometry = {"kernel": [3, 3], "stride": [1, 1], "padding": [1, 1]}
    steps = (
        ("conv2d", "conv", "images", "int8", {"channels": channels, **geometry}, ones),
        ("mean", "pool", "conv", "int8", {}, ones),
        ("linear", "head", "pool", "int32", {"channels": channels}, ones),
    )
    operations = [
        spec.Operation(
            kind=kind, name=name, inputs=(source,), output=name, dtype=dtype, attributes=attributes,
            tensors=roles | {role: f"{name}.{role}" for role in ("weight", "bias") if kind != "mean"},
        )
        for kind, name, source, dtype, attributes, roles in steps
    ]  # fmt: skip
    taken = spec.InputDescription(height=size, width=size)
    return spec.Program(input=taken, operations=tuple(operations), tensors=tensors, logit_scale=0.1)


PROGRAMS: dict[str, tuple[Callable[..., spec.Program], dict[str, Any], str | None]] = {
    "plain": (small_program, {}, None),
    "packed": (small_program, {"weight": "int4"}, None),
    "sparse": (lambda: masked(small_program(channels=24), 0.5), {}, None),
    "sparse, narrow": (lambda: masked(small_program(channels=24, weight="int5"), 0.5), {}, None),
    "folded": (with_bias_map, {}, None),
    "maps": (lambda: with_maps(small_program()), {}, None),
    "events": (spiking_program, {"events": True}, None),
    "compressed": (small_program, {}, "lzma"),
    "compressed, narrow": (small_program, {"weight": "int3"}, "lzma"),
    "compressed, maps": (lambda: with_maps(small_program()), {}, "lzma"),
    "compressed, spiking": (spiking_program, {}, "lzma"),
}


def metadata(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    found: dict[str, Any] = json.loads(header["__metadata__"][METADATA_KEY])
    return found


@pytest.mark.parametrize("form", list(PROGRAMS))
def test_the_reader_reads_what_export_writes(form: str, read: Reader, tmp_path: Path) -> None:
    make, options, compression = PROGRAMS[form]
    program = make(**options)
    path = accel.export(program, tmp_path / "model.safetensors", compression=compression)
    stored = metadata(path).get("storage", {})
    assert metadata(path)["version"] == (1 if form in ("plain", "maps", "events") else 3 if "sparse" in form else 2)
    assert form not in ("packed", "sparse", "folded") or form in stored
    description, tensors = read(path)
    assert description == json.loads(json.dumps(program.describe()))
    assert tensors.keys() == program.tensors.keys()
    for key, tensor in program.tensors.items():
        assert tensors[key].dtype == tensor.dtype
        assert np.array_equal(tensors[key], tensor)
    again = spec.Program.from_description(description, tensors)
    assert artifact.to_bytes(again, compression) == path.read_bytes()


@pytest.mark.parametrize("path", sorted((ROOT / "tests/golden").rglob("*.safetensors")), ids=lambda path: path.name)
def test_the_reader_reads_what_earlier_versions_wrote(path: Path, read: Reader) -> None:
    description, tensors = read(path)
    program = artifact.read(path)
    assert description == json.loads(json.dumps(program.describe()))
    assert all(np.array_equal(tensors[key], tensor) for key, tensor in program.tensors.items())


def test_the_reader_finds_damage(read: Reader, tmp_path: Path) -> None:
    path = accel.export(small_program(), tmp_path / "model.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="checksum"):
        read(path)


def operations() -> dict[str, tuple[int, set[str], set[str]]]:
    """{kind: (inputs, attributes, roles of tensors)} of the page's table."""
    found = {}
    for kind, inputs, attributes, tensors in re.findall(
        r"^\| `(\w+)` \| (\d) \| (.*?) ?\| (.*?) ?\| \[\d\]", (ROOT / PAGE).read_text("utf-8"), flags=re.MULTILINE
    ):
        roles = set(re.findall(r"`(\w+)`", tensors)) | ({"mult", "shift"} if "requantize" in tensors else set())
        found[kind] = (int(inputs), set(re.findall(r"`(\w+)`", attributes)), roles)
    return found


def test_the_table_has_every_kind() -> None:
    assert operations().keys() == KINDS.keys()
    assert all(KINDS[kind].arity == inputs for kind, (inputs, _, _) in operations().items())


def test_the_table_has_what_the_kinds_take() -> None:
    taken: dict[str, tuple[set[str], set[str]]] = {}
    drawn: list[Any] = [(op.kind, op.attributes, tensors) for op, _, tensors, _ in operation_cases(60)]
    drawn += [(op.kind, op.attributes, op.tensors) for op in small_program().operations]
    drawn += [(case.kind, case.attributes, case.tensors) for case in spiking_cases(60)]
    for kind, attributes, tensors in drawn:
        names, roles = taken.setdefault(kind, (set(), set()))
        names.update(attributes)
        roles.update(tensors)
    assert taken == {kind: (attributes, roles) for kind, (_, attributes, roles) in operations().items()}


def test_limits_are_the_programs() -> None:
    text = (ROOT / PAGE).read_text("utf-8")
    assert f"1 to {OPERATIONS_MAX:,}" in text
    assert f"| named outputs | {OUTPUTS_MAX} |" in text
    assert f"{NAME_BYTES_MAX:,} bytes" in text
    assert ELEMENTS_MAX == 2**32
    assert (PREPARED_BYTES_FREE, PREPARED_RATIO_MAX) == (64 * 2**20, 8)
    assert (storage._DECODED_BYTES_FREE, storage._DECODED_RATIO_MAX, storage._AXES_MAX) == (16 * 2**20, 128, 8)
    assert (artifact._JSON_BYTES_FREE, artifact._JSON_RATIO_MAX) == (2**20, 64)
    assert artifact._JSON_BYTES_MAX == 16 * 2**20

"""Weights with many zeros: a bitmap and the nonzeros, chosen where they are smaller, read as written or refused."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from support.artifact_bytes import container, header_of, sealed
from support.artifact_mutants import stored_mutant
from support.artifact_verdicts import Figures, require_agreement
from support.program_cases import masked, small_program
from support.whole_programs import images_of

from swincompress_pl import accel, spec
from swincompress_pl.accel import ArtifactError, artifact, storage
from swincompress_pl.accel.core import read_artifact

Array = npt.NDArray[Any]
SHAPES = st.lists(st.integers(1, 12), min_size=2, max_size=4).map(tuple)


def drawn(seed: int, shape: tuple[int, ...], bits: int, share: float) -> Array:
    """Weights of `bits` bits, -(2^(bits - 1)) included, of which about `share` are 0."""
    rng = np.random.default_rng(seed)
    values = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), shape)
    return (values * (rng.random(shape) >= share)).astype(np.int8)


def stored_sparse(tensor: Array, bits: int) -> bytes:
    layout = {"sparse": {"w": [bits, list(tensor.shape)]}}
    return sealed({}, {"w": tensor}, {"w": storage.pack_sparse(tensor, bits)}, layout)


@given(st.integers(0, 2**32 - 1), SHAPES, st.integers(2, 8), st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]))
@settings(max_examples=300)
def test_sparse_tensors_come_back(seed: int, shape: tuple[int, ...], bits: int, share: float) -> None:
    tensor = drawn(seed, shape, bits, share)
    packed = storage.pack_sparse(tensor, bits)
    ones = int(np.count_nonzero(tensor))
    assert packed.dtype == np.uint8
    assert packed.shape == (math.ceil(tensor.size / 8) + math.ceil(ones * bits / 8),)
    _, tensors = read_artifact(stored_sparse(tensor, bits))
    assert tensors["w"].dtype == np.int8
    np.testing.assert_array_equal(tensors["w"], tensor)


@pytest.mark.parametrize("bits", range(2, 9))
def test_every_byte_of_a_bitmap_is_read(bits: int) -> None:
    rows = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1)
    values = drawn(bits, rows.shape, bits, 0)
    tensor = np.where(values == 0, 1, values).astype(np.int8) * rows.astype(np.int8)
    _, tensors = read_artifact(stored_sparse(tensor, bits))
    np.testing.assert_array_equal(tensors["w"], tensor)


def test_the_first_value_is_the_highest_bit() -> None:
    tensor = np.array([[0, 1, 0, 0, -1], [0, 0, 0, 7, -7]], np.int8)
    assert storage.pack_sparse(tensor, 4).tolist() == [0b01001000, 0b11000000, 0x1F, 0x79]
    assert storage.pack_sparse(tensor, 8).tolist() == [0b01001000, 0b11000000, 1, 0xFF, 7, 0xF9]
    assert storage.pack_sparse(tensor[:1], 3).tolist() == [0b01001000, 0b00111100]


# --- what is written --------------------------------------------------------------------------------------------------


def metadata_of(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    found: dict[str, Any] = json.loads(header["__metadata__"][artifact.METADATA_KEY])
    return found


def test_each_tensor_has_its_smallest_form() -> None:
    tensors = {
        "dense": drawn(1, (40, 40), 8, 0),
        "narrow": drawn(2, (40, 40), 4, 0) // 2,
        "sparse": drawn(3, (40, 40), 8, 0.5),
        "few zeros": drawn(4, (40, 40), 8, 0.1),  # a bit for each value takes more than they save
        "narrow and sparse": drawn(5, (40, 40), 4, 0.5) // 2,
        "zeros": np.zeros((40, 40), np.int8),
        "tiny": np.zeros((3, 3), np.int8),  # its entry in the header takes more than is saved
        "table": np.zeros(256, np.int8),
        "wide": np.zeros((40, 40), np.int16),
    }
    stored, layout = storage.pack_tensors(tensors)
    assert set(layout["sparse"]) == {"sparse", "narrow and sparse", "zeros"}
    assert set(layout["packed"]) == {"narrow", "tiny"}
    for key, tensor in tensors.items():
        bits = storage.weight_bits(tensor)
        size = math.ceil(tensor.size / 8) + math.ceil(np.count_nonzero(tensor) * bits / 8)
        assert stored[key].nbytes == (
            size if key in layout["sparse"] else math.ceil(tensor.nbytes * bits / 8) if bits < 8 else tensor.nbytes
        )


def test_blocks_of_zeros_are_sparse_too() -> None:
    weight = drawn(1, (64, 64), 8, 0)
    pairs = np.where(np.arange(64) % 4 < 2, weight, 0).astype(np.int8)  # 2 of 4
    rows = np.where(np.arange(64)[:, None] < 32, weight, 0).astype(np.int8)
    stored, layout = storage.pack_tensors({"pairs": pairs, "rows": rows})
    assert set(layout["sparse"]) == {"pairs", "rows"}
    assert all(tensor.nbytes <= 64 * 64 * 5 // 8 for tensor in stored.values())


@pytest.mark.parametrize("weight", ["int8", "int6", "int4", "int3"])
def test_a_masked_network_is_smaller_and_gives_the_same_logits(weight: str, tmp_path: Path) -> None:
    whole = small_program(1, channels=48, weight=weight)
    program = masked(whole, 0.6)
    path = accel.export(program, tmp_path / "masked.safetensors")
    assert path.stat().st_size < accel.export(whole, tmp_path / "whole.safetensors").stat().st_size
    metadata = metadata_of(path)
    assert metadata["version"] == 3
    assert metadata["storage"]["sparse"]
    given_back = artifact.read(path)
    assert given_back.describe() == program.describe()
    for key, tensor in program.tensors.items():
        assert given_back.tensors[key].dtype == tensor.dtype
        np.testing.assert_array_equal(given_back.tensors[key], tensor)
    assert accel.export(given_back, tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
    images = images_of(program, 3)
    expected = spec.run(program, images)
    for implementation in accel.implementations():
        np.testing.assert_array_equal(accel.load(path, implementation=implementation).run_integer(images), expected)
    np.testing.assert_array_equal(accel.reference(path).run_integer(images), expected)


def test_half_zeros_take_the_bits_that_they_should() -> None:
    for bits, share in ((8, 0.146), (4, 0.089)):  # of float32
        tensor = drawn(0, (400, 400), bits, 0.54)
        tensor = np.where(tensor == -(2 ** (bits - 1)), 1, tensor).astype(np.int8)
        stored, layout = storage.pack_tensors({"w": tensor})
        assert list(layout) == ["sparse"]
        assert stored["w"].nbytes / (4 * tensor.size) == pytest.approx(share, abs=0.005)


def test_files_that_need_no_bitmap_are_as_before(tmp_path: Path) -> None:
    for weight, version in (("int8", 1), ("int4", 2)):
        path = accel.export(small_program(2, weight=weight), tmp_path / "model.safetensors")
        assert metadata_of(path)["version"] == version
        assert "sparse" not in metadata_of(path).get("storage", {})


# --- what is refused --------------------------------------------------------------------------------------------------

TENSOR = np.array([[0, 3, 0, 0, -2], [1, 0, 0, 2, 0]], np.int8)  # a bitmap of 2 bytes, and 4 values of 3 bits
DECLARED = [3, [2, 5]]


@pytest.mark.parametrize(
    ("sparse", "message"),
    [
        ([], "its list of sparse tensors is not a mapping"),
        ({"other": DECLARED}, 'entry of sparse tensor "other" is wrong'),
        ({"w": 3}, 'entry of sparse tensor "w" is wrong'),
        ({"w": [3]}, 'entry of sparse tensor "w" is wrong'),
        ({"w": [1, [2, 5]]}, 'entry of sparse tensor "w" is wrong'),
        ({"w": [9, [2, 5]]}, 'entry of sparse tensor "w" is wrong'),
        ({"w": [3.0, [2, 5]]}, 'entry of sparse tensor "w" is wrong'),
        ({"w": [3, 10]}, 'tensor "w" has shape 10'),
        ({"w": [3, []]}, 'tensor "w" has shape []'),
        ({"w": [3, [2, 0]]}, 'tensor "w" has shape [2,0]'),
        ({"w": [3, [2**32, 2]]}, 'tensor "w" has shape [4294967296,2]'),
        ({"w": [3, [2**62, 2**62]]}, 'tensor "w" has shape'),
        ({"w": [3, [1] * 9]}, 'tensor "w" has shape'),
        ({"w": [3, [2**31]]}, 'the bytes of "w" do not hold a bitmap of 2147483648 values'),
        ({"w": [3, [2, 4]]}, 'the bytes of "w" do not hold the 3 values of 3 bits that its bitmap has'),
        ({"w": [3, [1, 5]]}, "padding bits are set"),
        ({"w": [5, [2, 5]]}, 'the bytes of "w" do not hold the 4 values of 5 bits that its bitmap has'),
        ({"w": [2, [2, 5]]}, 'the bytes of "w" do not hold the 4 values of 2 bits that its bitmap has'),
    ],
)
def test_wrong_entries_are_refused(sparse: Any, message: str) -> None:
    content = sealed({}, {"w": TENSOR}, {"w": storage.pack_sparse(TENSOR, 3)}, {"sparse": sparse})
    with pytest.raises(ValueError, match=re.escape(f"truncated or damaged ({message}")):
        read_artifact(content)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s[:1], 'the bytes of "w" do not hold a bitmap of 10 values'),
        (lambda s: s[:-1], "do not hold the 4 values of 3 bits"),
        (lambda s: np.append(s, np.uint8(0)), "do not hold the 4 values of 3 bits"),
        (lambda s: s | np.array([0xB0, 0, 0, 0], np.uint8), 'do not hold the 7 values of 3 bits that its bitmap has'),
        (lambda s: s | np.array([0, 0x20, 0, 0], np.uint8), "padding bits are set"),
        (lambda s: s | np.array([0, 0x01, 0, 0], np.uint8), "padding bits are set"),
        (lambda s: s | np.array([0, 0, 0, 0x01], np.uint8), "padding bits are set"),
        (lambda s: s.view(np.int8), 'the bytes of "w" do not hold a bitmap'),
        (lambda s: s[None], 'the bytes of "w" do not hold a bitmap'),
        (lambda s: s.astype(np.int16), 'the bytes of "w" do not hold a bitmap'),
    ],
)  # fmt: skip
def test_wrong_bytes_are_refused(change: Any, message: str) -> None:
    stored = {"w": change(storage.pack_sparse(TENSOR, 3))}
    with pytest.raises(ValueError, match=re.escape(message)):
        read_artifact(sealed({}, {"w": TENSOR}, stored, {"sparse": {"w": DECLARED}}))


def test_a_tensor_has_one_form() -> None:
    stored = {"w": storage.pack_sparse(TENSOR, 3)}
    layout = {"sparse": {"w": DECLARED}, "packed": {"w": [3, [10]]}}
    with pytest.raises(ValueError, match=r"truncated or damaged \(the bytes of"):
        read_artifact(sealed({}, {"w": TENSOR}, stored, layout))


@pytest.mark.parametrize("version", [1, 2])
def test_earlier_versions_have_no_sparse_tensors(version: int) -> None:
    stored = {"w": storage.pack_sparse(TENSOR, 3)}
    content = {"format": artifact.FORMAT, "version": version, "description": {}}
    content |= {"sha256": artifact.checksum({}, {"w": TENSOR}), "storage": {"sparse": {"w": DECLARED}}}
    message = "its checksum differs" if version == 1 else "does not say how its tensors are stored"
    with pytest.raises(ValueError, match=message):
        read_artifact(container(*header_of(stored, json.dumps(content))))


def test_a_file_is_bounded_by_its_bitmap() -> None:
    """Nothing but zeros: eight values in each byte of the file, and no more."""
    tensor = np.zeros((4096, 4096), np.int8)
    content = stored_sparse(tensor, 8)
    assert len(content) < tensor.nbytes / 8 + 1000
    _, tensors = read_artifact(content)
    assert not tensors["w"].any()


@pytest.fixture(scope="module")
def program() -> spec.Program:
    return masked(small_program(3, channels=16, weight="int5"), 0.7)


def test_truncation_anywhere_is_refused(program: spec.Program, tmp_path: Path) -> None:
    path = accel.export(program, tmp_path / "model.safetensors")
    content = path.read_bytes()
    for length in range(9, len(content), 97):
        path.write_bytes(content[:length])
        with pytest.raises(ArtifactError, match=r"model\.safetensors: truncated"):
            artifact.read(path)


def test_any_bit_counts(program: spec.Program, tmp_path: Path) -> None:
    path = accel.export(program, tmp_path / "model.safetensors")
    content, stored = path.read_bytes(), load_file(path)
    header = 8 + int.from_bytes(content[:8], "little")
    assert any(stored[key].dtype == np.uint8 for key in metadata_of(path)["storage"]["sparse"])
    for number, place in enumerate(np.random.default_rng(0).integers(header, len(content), 300)):
        altered = bytearray(content)
        altered[place] ^= 1 << number % 8
        path.write_bytes(altered)
        with pytest.raises(ArtifactError, match=r"altered|damaged"):
            accel.load(path)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak of the memory from /proc")
def test_readers_agree_on_changed_storage(program: spec.Program, tmp_path: Path) -> None:
    assert require_agreement(accel.export(program, tmp_path / "model.safetensors"), "sparse")
    figures = Figures()
    for number in range(200):
        figures.add(tmp_path / "mutant.safetensors", stored_mutant([program], number), f"mutant {number}")
    assert figures.failures == []
    assert 5 < figures.accepted < 195

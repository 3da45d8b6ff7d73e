"""Packed and compressed artifacts: every value comes back, sizes are near the entropy, and bad bytes are refused."""

from __future__ import annotations

import dataclasses
import json
import lzma
import math
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save, save_file
from support.artifact_bytes import sealed
from support.program_cases import small_program
from support.spiking_programs import spiking_program
from support.whole_programs import images_of

from swincompress_pl import accel, spec
from swincompress_pl.accel import ArtifactError, artifact, storage
from swincompress_pl.accel.core import read_artifact
from swincompress_pl.accel.storage import StorageError

Array = npt.NDArray[Any]
SHAPES = st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple)


def weights(seed: int, shape: tuple[int, ...], bits: int, style: str) -> Array:
    rng = np.random.default_rng(seed)
    high = 2 ** (bits - 1) - 1
    drawn = {
        "uniform": lambda: rng.integers(-high, high + 1, shape),
        "corners": lambda: rng.choice([-high, 0, high], shape),
        "constant": lambda: np.full(shape, rng.choice([-high, 0, high])),
        "laplace": lambda: np.clip(np.rint(rng.laplace(size=shape) * high / 5), -high, high),
        "sparse": lambda: rng.integers(-high, high + 1, shape) * (rng.random(shape) < 0.5),
    }[style]()
    return np.asarray(drawn).astype(np.int8)


STYLES = st.sampled_from(["uniform", "corners", "constant", "laplace", "sparse"])


@given(st.integers(0, 2**32 - 1), SHAPES, st.integers(2, 8), STYLES)
def test_packing_is_lossless(seed: int, shape: tuple[int, ...], bits: int, style: str) -> None:
    tensor = weights(seed, shape, bits, style)
    packed = storage.pack(tensor, bits)
    assert packed.dtype == np.uint8
    assert packed.shape == (math.ceil(tensor.size * bits / 8),)
    again = storage.unpack(packed, bits, shape)
    assert again.dtype == np.int8
    np.testing.assert_array_equal(again, tensor)


def test_nibbles_are_twos_complement_first_value_high() -> None:
    assert storage.pack(np.array([[1, -1], [7, -7]], np.int8), 4).tolist() == [0x1F, 0x79]
    assert storage.pack(np.array([[1, -1, 0, 1, -1]], np.int8), 2).tolist() == [0b01110001, 0b11000000]


@pytest.mark.parametrize(
    ("largest", "bits"), [(0, 2), (1, 2), (2, 3), (3, 3), (4, 4), (7, 4), (8, 5), (31, 6), (63, 7), (64, 8), (127, 8)]
)
def test_width_is_the_narrowest_that_holds_the_values(largest: int, bits: int) -> None:
    for sign in (1, -1):
        assert storage.weight_bits(np.array([[0, sign * largest]], np.int8)) == bits
    assert storage.weight_bits(np.array([largest], np.int8)) == 8  # a table is no weight
    assert storage.weight_bits(np.array([[largest]], np.int16)) == 8


def test_unpacking_refuses_what_does_not_fit() -> None:
    packed = storage.pack(np.ones((3, 3), np.int8), 3)
    for shape in [(3, 2), (3, 4), (2**40, 2**40)]:
        with pytest.raises(StorageError, match="do not hold"):
            storage.unpack(packed, 3, shape)
    with pytest.raises(StorageError, match="padding"):
        storage.unpack(packed | 1, 3, (3, 3))
    with pytest.raises(StorageError, match="do not hold"):
        storage.unpack(packed.astype(np.int32), 3, (3, 3))


@st.composite
def tensor_sets(draw: st.DrawFn) -> dict[str, Array]:
    tensors: dict[str, Array] = {}
    for number in range(draw(st.integers(1, 6))):
        shape, seed = draw(SHAPES), draw(st.integers(0, 2**32 - 1))
        dtype = draw(st.sampled_from(["int8", "int8", "uint8", "int16", "int32", "int64"]))
        if dtype == "int8":
            tensors[f"t{number}"] = weights(seed, shape, draw(st.integers(2, 8)), draw(STYLES))
        else:
            held = np.iinfo(dtype)
            drawn = np.random.default_rng(seed).integers(held.min, held.max, shape, endpoint=True, dtype=dtype)
            tensors[f"t{number}"] = drawn
    return tensors


@given(tensor_sets(), st.sampled_from([("weight",), ("weight", "bias")]))
@settings(max_examples=150)
def test_streams_and_packs_give_every_tensor_back(tensors: dict[str, Array], roles: tuple[str, ...]) -> None:
    role_of = {key: roles[number % len(roles)] for number, key in enumerate(tensors)}
    stored, entries = storage.compress_tensors(tensors, role_of)
    again = storage.decompress_tensors(stored, json.loads(json.dumps(entries)))
    packed, layout = storage.pack_tensors(tensors)
    _, unpacked = read_artifact(sealed({}, tensors, packed, layout or None))
    for given_back in (again, unpacked):
        assert set(given_back) == set(tensors)
        for key, tensor in tensors.items():
            assert given_back[key].dtype == tensor.dtype
            np.testing.assert_array_equal(given_back[key], tensor)


CODERS = sorted(storage._CODERS)


@given(st.sampled_from(CODERS), st.binary(max_size=400))
def test_coders_are_lossless_and_know_their_length(coder: str, data: bytes) -> None:
    coded = np.frombuffer(storage._CODERS[coder][0](data), np.uint8)
    assert storage.decode(coder, coded, len(data)) == data
    for wrong in {len(data) + 1, len(data) - 1, 2 * len(data) + 3} - {-1}:
        with pytest.raises(StorageError):
            storage.decode(coder, coded, wrong)
    with pytest.raises(StorageError):
        storage.decode(coder, np.append(coded, np.uint8(0)), len(data))


@pytest.mark.parametrize("coder", CODERS)
def test_a_stream_cut_anywhere_is_refused(coder: str) -> None:
    data = weights(1, (500,), 8, "laplace").tobytes()
    coded = np.frombuffer(storage._CODERS[coder][0](data), np.uint8)
    for length in range(coded.size):
        with pytest.raises(StorageError):
            storage.decode(coder, coded[:length], len(data))


@pytest.mark.parametrize("coder", ["huffman", "lzma"])
def test_a_bomb_is_refused_before_it_unfolds(coder: str) -> None:
    zeros = bytes(2**26)
    if coder == "lzma":
        bomb = lzma.compress(zeros, lzma.FORMAT_RAW, filters=storage._LZMA_FILTERS)
    else:
        deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
        bomb = deflate.compress(zeros) + deflate.flush()
    coded = np.frombuffer(bomb, np.uint8)
    tracemalloc.start()
    try:
        with pytest.raises(StorageError, match="at most"):
            storage.decode(coder, coded, 2**40)  # declares it
        with pytest.raises(StorageError, match=r"does not end|does not hold"):
            storage.decode(coder, coded, 1000)  # and conceals it
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 2**21


def entropy_bytes(values: Array) -> float:
    _, counts = np.unique(values, return_counts=True)
    shares = counts / counts.sum()
    return float(-(shares * np.log2(shares)).sum() * values.size / 8)


@pytest.mark.parametrize(("bits", "slack"), [(8, 1.015), (6, 1.015), (4, 1.02), (3, 1.1)])
@pytest.mark.parametrize("sparse", [False, True])
def test_weights_come_near_their_order_0_entropy(bits: int, slack: float, sparse: bool) -> None:
    rng = np.random.default_rng(bits)
    real = rng.laplace(size=(600, 400))
    high = 2 ** (bits - 1) - 1
    weight = np.rint(real / np.abs(real).max(axis=1, keepdims=True) * high).astype(np.int8)
    if sparse:
        weight = weight * (rng.random(weight.shape) < 0.5).astype(np.int8)
    stored, _ = storage.compress_tensors({"w": weight}, {"w": "weight"})
    assert sum(stream.nbytes for stream in stored.values()) < slack * entropy_bytes(weight)


# --- whole artifacts --------------------------------------------------------------------------------------------------


@pytest.fixture(params=["int4", "int7", "int2", "int8"])
def program(request: pytest.FixtureRequest) -> spec.Program:
    return small_program(5, weight=request.param)


@pytest.fixture
def narrow() -> spec.Program:
    return small_program(6, channels=24, weight="int4")


def metadata_of(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return json.loads(header["__metadata__"][artifact.METADATA_KEY])


def assert_same(given_back: spec.Program, program: spec.Program) -> None:
    assert given_back.describe() == program.describe()
    assert set(given_back.tensors) == set(program.tensors)
    for key, tensor in program.tensors.items():
        assert given_back.tensors[key].dtype == tensor.dtype
        np.testing.assert_array_equal(given_back.tensors[key], tensor)


@pytest.mark.parametrize("compression", [None, "lzma"])
def test_round_trip_and_the_same_bytes_again(program: spec.Program, compression: str | None, tmp_path: Path) -> None:
    first = accel.export(program, tmp_path / "first.safetensors", compression)
    assert_same(artifact.read(first), program)
    second = accel.export(artifact.read(first), tmp_path / "second.safetensors", compression=compression)
    assert first.read_bytes() == second.read_bytes()
    images = images_of(program, 3)
    np.testing.assert_array_equal(accel.load(first, threads=1).run_integer(images), spec.run(program, images))


def test_the_file_shrinks_by_packing_and_more_by_compression(tmp_path: Path) -> None:
    sizes = {}
    for weight in ("int8", "int4"):
        for compression in (None, "lzma"):
            program = small_program(1, channels=96, weight=weight)
            file = accel.export(program, tmp_path / "model.safetensors", compression)
            sizes[weight, compression] = file.stat().st_size
    weights_8 = sum(t.nbytes for key, t in small_program(1, channels=96).tensors.items() if key.endswith("weight"))
    assert sizes["int8", None] - sizes["int4", None] > 0.45 * weights_8
    assert sizes["int4", "lzma"] < sizes["int4", None] - 10_000  # the description alone is that large
    assert sizes["int8", "lzma"] < sizes["int8", None]


def test_plain_programs_stay_version_1_and_old_files_load(tmp_path: Path) -> None:
    for weight, version in (("int8", 1), ("int4", 2)):
        program = small_program(2, weight=weight)
        tensors = {key: np.ascontiguousarray(program.tensors[key]) for key in sorted(program.tensors)}
        content = {"format": artifact.FORMAT, "version": 1, "description": program.describe()}
        content["sha256"] = artifact.checksum(program.describe(), tensors)
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        old = save(tensors, {artifact.METADATA_KEY: text})
        (tmp_path / "old.safetensors").write_bytes(old)
        assert_same(artifact.read(tmp_path / "old.safetensors"), program)
        new = accel.export(program, tmp_path / "new.safetensors")
        assert metadata_of(new)["version"] == version
        assert (new.read_bytes() == old) == (version == 1)


def test_compressed_files_hold_only_streams(narrow: spec.Program, tmp_path: Path) -> None:
    path = accel.export(narrow, tmp_path / "model.safetensors", "lzma")
    metadata = metadata_of(path)
    assert set(metadata) == {"format", "version", "sha256", "content"}
    assert metadata["version"] == 2
    assert metadata["sha256"] == artifact.checksum(narrow.describe(), narrow.tensors)
    assert {str(tensor.dtype) for tensor in load_file(path).values()} == {"uint8"}


@pytest.mark.parametrize("compression", [None, "lzma"])
def test_truncation_anywhere_is_refused(narrow: spec.Program, compression: str | None, tmp_path: Path) -> None:
    path = accel.export(narrow, tmp_path / "model.safetensors", compression)
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    for length in sorted({*range(9, len(content), 97), *range(header - 3, header + 9), len(content) - 1}):
        path.write_bytes(content[:length])
        with pytest.raises(ArtifactError, match=r"model\.safetensors: truncated"):
            artifact.read(path)


@pytest.mark.parametrize("compression", [None, "lzma"])
def test_an_altered_payload_is_refused(narrow: spec.Program, compression: str | None, tmp_path: Path) -> None:
    path = accel.export(narrow, tmp_path / "model.safetensors", compression)
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    refused = 0
    places = np.random.default_rng(0).integers(header, len(content), 300)
    for number, place in enumerate(places):
        altered = bytearray(content)
        altered[place] ^= 1 << number % 8
        path.write_bytes(altered)
        try:
            given_back = artifact.read(path)
        except ArtifactError as error:
            assert any(word in str(error) for word in ("altered", "damaged"))  # noqa: PT017
            refused += 1
        else:  # the last bits of a coded stream may mean nothing
            assert compression is not None
            assert_same(given_back, narrow)
    assert refused >= (len(places) if compression is None else len(places) - 3)


def rewrite(path: Path, change: Any) -> None:
    """Writes the packed artifact again with another storage and a correct checksum."""
    metadata = metadata_of(path)
    metadata["storage"] = change(metadata["storage"])
    save_file(load_file(path), path, {artifact.METADATA_KEY: json.dumps(metadata)})


@pytest.mark.parametrize(
    "change",
    [
        lambda s: None,
        lambda s: {},
        lambda s: {"packed": []},
        lambda s: {"packed": {}, "streams": []},
        lambda s: {"packed": {**s["packed"], "nowhere": [4, [1]]}},
        lambda s: {"packed": {**s["packed"], "fc1.weight": 4}},
        lambda s: {"packed": {**s["packed"], "fc1.weight": [8, [20, 24]]}},
        lambda s: {"packed": {**s["packed"], "fc1.weight": [4, [20, 25]]}},
        lambda s: {"packed": {**s["packed"], "fc1.weight": [4, [20, -24]]}},
        lambda s: {"packed": {**s["packed"], "fc1.weight": [4, [2**62, 2**62]]}},
        lambda s: {"packed": {**s["packed"], "fc1.weight": [4, [True, 480]]}},
        lambda s: {"packed": {**s["packed"], "fc1.weight": [4, []]}},
        lambda s: {"packed": {**s["packed"], "fc1.bias": [4, [20]]}},
        lambda s: {"streams": []},
    ],
)
def test_wrong_packing_is_refused(narrow: spec.Program, change: Any, tmp_path: Path) -> None:
    path = accel.export(narrow, tmp_path / "model.safetensors")
    rewrite(path, change)
    with pytest.raises(ArtifactError, match=r"model\.safetensors: truncated or damaged"):
        accel.load(path)


def rewrite_content(path: Path, change: Any) -> None:
    """Writes the compressed artifact anew with other contents."""
    metadata, stored = metadata_of(path), load_file(path)
    declared = metadata["content"]
    content = json.loads(storage.decode(declared["coder"], stored["content"], declared["size_bytes"]))
    change(content, stored)
    text = content["text"] if "text" in content else json.dumps(content).encode()
    coder, stored["content"] = storage.encode(text)
    metadata["content"] = {"coder": coder, "size_bytes": len(text)}
    save_file(stored, path, {artifact.METADATA_KEY: json.dumps(metadata)})


def entry(number: int, **values: Any) -> Any:
    return lambda content, _: content["storage"]["streams"][number].update(values)


@pytest.mark.parametrize(
    "change",
    [
        entry(0, coder="zip"),
        entry(0, coder=["lzma"]),
        entry(0, dtype="float32"),
        entry(0, bits=3),
        entry(0, bits="8"),
        entry(0, tensors=[]),
        entry(0, tensors=[["bias", [2**31, 2**31]]]),
        entry(0, tensors=[["bias", [10**6, 10**6]]]),
        entry(0, tensors=[["bias"]]),
        entry(0, tensors=[[["bias"], [1]]]),
        entry(0, tensors=7),
        lambda content, _: content["storage"]["streams"].pop(),
        lambda content, _: content["storage"]["streams"].__setitem__(0, 5),
        lambda content, _: content["storage"]["streams"].append(content["storage"]["streams"][0]),
        lambda content, _: content.update(storage={"streams": 3}),
        lambda content, _: content.pop("storage"),
        lambda content, _: content.update(text=b"{"),
        lambda content, _: content.update(text=b"[]"),
        lambda content, _: content.update(text=b"[" * 100_000),
        lambda content, _: content.update(text=b"\xff\xfe\xff"),
        lambda _, stored: stored.pop("stream1"),
        lambda _, stored: stored.update(stream99=np.zeros(1, np.uint8)),
        lambda _, stored: stored.update(stream0=stored["stream0"].view(np.int8)),
        lambda _, stored: stored.update(stream0=stored["stream0"][:-3]),
    ],
)
def test_wrong_streams_are_refused(narrow: spec.Program, change: Any, tmp_path: Path) -> None:
    path = accel.export(narrow, tmp_path / "model.safetensors", "lzma")
    rewrite_content(path, change)
    with pytest.raises(ArtifactError, match=r"model\.safetensors: truncated or damaged"):
        accel.load(path)


@pytest.mark.parametrize("declared", [None, 5, {}, {"coder": "lzma"}, {"coder": "lzma", "size_bytes": -1}])
def test_a_wrong_content_is_refused(narrow: spec.Program, declared: Any, tmp_path: Path) -> None:
    path = accel.export(narrow, tmp_path / "model.safetensors", "lzma")
    metadata = {**metadata_of(path), "content": declared}
    save_file(load_file(path), path, {artifact.METADATA_KEY: json.dumps(metadata)})
    with pytest.raises(ArtifactError, match=r"model\.safetensors: truncated or damaged"):
        accel.load(path)


def test_altered_content_with_whole_streams_is_refused(narrow: spec.Program, tmp_path: Path) -> None:
    path = accel.export(narrow, tmp_path / "model.safetensors", "lzma")
    rewrite_content(path, lambda content, _: content["description"].update(logit_scale=(1.0).hex()))
    with pytest.raises(ArtifactError, match="altered"):
        accel.load(path)


def test_what_could_not_be_read_back_is_not_written(
    narrow: spec.Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "_DECODED_BYTES_FREE", 0)
    monkeypatch.setattr(storage, "_DECODED_RATIO_MAX", 1)
    with pytest.raises(ArtifactError, match="export it without compression"):
        accel.export(narrow, tmp_path / "model.safetensors", "lzma")


def test_unknown_compressions_are_refused_before_anything_else(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="compression is 'zip'; choose None or 'lzma'"):
        accel.export(object(), tmp_path / "model.safetensors", compression="zip")


def test_unused_history_compresses_too(narrow: spec.Program, tmp_path: Path) -> None:
    history = [{"prune": {f"blocks.{i}": list(range(0, 1000, 2)) for i in range(12)}}]
    program = dataclasses.replace(narrow, origin={"history": history})
    plain = accel.export(program, tmp_path / "plain.safetensors").stat().st_size
    coded = accel.export(program, tmp_path / "coded.safetensors", "lzma")
    assert plain - coded.stat().st_size > 25_000
    assert artifact.read(coded).origin["history"] == history


@given(st.lists(st.integers(0, 3), min_size=1, max_size=9), st.lists(st.integers(0, 2), min_size=1, max_size=9))
def test_folding_maps_loses_nothing(rows: list[int], columns: list[int]) -> None:
    distinct = np.arange(4 * 3 * 5, dtype=np.int32).reshape(4, 3, 5)
    tensors = {"map": distinct[rows][:, columns], "weight": np.ones((2, 2, 2), np.int8), "flat": np.zeros(4, np.int32)}
    stored, folded = storage.fold_maps(tensors)
    assert set(folded) <= {"map"}
    assert stored["map"].size <= tensors["map"].size
    assert ("map" in folded) == (2 * len(set(rows)) * len(set(columns)) <= len(rows) * len(columns))
    _, restored = read_artifact(sealed({}, tensors, stored, {"folded": folded}))
    assert all(np.array_equal(restored[key], tensor) for key, tensor in tensors.items())


@pytest.mark.parametrize(
    ("folded", "message"),
    [
        ([], "not a mapping"),
        ({"other": [[0], [0]]}, "entry of folded map 'other'"),
        ({"flat": [[0], [0]]}, "entry of folded map 'flat'"),
        ({"map": [[0, 1]]}, "entry of folded map 'map'"),
        ({"map": [[0, 2], [0]]}, "rows or columns that it lacks"),
        ({"map": [[0], [-1]]}, "rows or columns that it lacks"),
        ({"map": [[], [0]]}, "rows or columns that it lacks"),
        ({"map": [[0], [0.5]]}, "rows or columns that it lacks"),
        ({"map": [[0] * 40_000, [0] * 40_000]}, "unfold to more than"),
    ],
)
def test_folded_maps_that_do_not_fit_are_refused(folded: Any, message: str) -> None:
    tensors = {"map": np.zeros((2, 2, 3), np.int32), "flat": np.zeros(3, np.int32)}
    with pytest.raises(ValueError, match=message.replace("'", '"')):
        read_artifact(sealed({}, tensors, layout={"folded": folded}))


def test_a_spiking_stem_takes_no_map_in_the_file(tmp_path: Path) -> None:
    program = spiking_program()
    (conv,) = [op for op in program.operations if op.kind == "conv2d" and "images" in op.inputs]
    shape = spec.check(program)[conv.output].shape
    border = np.broadcast_to(np.arange(shape[-1], dtype=np.int32), shape[-3:]).copy()
    border[0] += 7
    border[:, -1] -= 3
    mapped = dataclasses.replace(program, tensors={**program.tensors, conv.tensors["bias"]: border})
    file = accel.export(mapped, tmp_path / "mapped.safetensors")
    assert metadata_of(file)["storage"]["folded"]
    with safe_open(file, framework="numpy") as stored:
        assert stored.get_tensor(conv.tensors["bias"]).shape == (2, 2, shape[-1])
    assert np.array_equal(artifact.read(file).tensors[conv.tensors["bias"]], border)
    images = np.zeros((2, *program.input.value.shape), np.uint8)
    assert np.array_equal(accel.load(file).run_integer(images), accel.ReferenceEngine(mapped).run_integer(images))
